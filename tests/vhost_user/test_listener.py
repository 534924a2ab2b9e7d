"""The socket under its name: appears ready, replaces what is stale, spares everything else."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.vhost_user.listener import Listener
from tests.support.vhost_rig import open_fds


@pytest.fixture(autouse=True)
def no_leaks(tmp_path: Path) -> Iterator[None]:
    before = open_fds()
    yield
    assert open_fds() == before
    assert not list(tmp_path.glob(".pyvmm-*"))


def connects(path: Path) -> bool:
    """Whether somebody listens."""
    with socket.socket(socket.AF_UNIX) as caller:
        return caller.connect_ex(str(path)) == 0


def test_a_socket_for_its_owner_that_is_gone_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "s"
    umask = os.umask(0)
    try:
        listener = Listener(str(path))
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert connects(path)
    listener.close()
    listener.close()
    assert not path.exists()


def test_a_name_without_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    listener = Listener("s")
    assert connects(tmp_path / "s")
    monkeypatch.chdir("/")
    listener.close()
    assert not (tmp_path / "s").exists()


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    listener = Listener(str(path))
    assert connects(path)
    listener.close()


def test_a_socket_in_use_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = Listener(str(path))
    with pytest.raises(ConfigError, match="is in use: somebody listens on it") as caught:
        Listener(str(path))
    assert caught.value.subject == str(path)
    assert connects(path)
    first.close()


def test_a_queue_that_is_full_is_in_use_too(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as caller:
        busy.bind(str(path))
        busy.listen(0)
        caller.connect(str(path))
        with pytest.raises(ConfigError, match="is in use"):
            Listener(str(path))


@pytest.mark.parametrize("kind", ["file", "directory", "fifo", "link"])
def test_what_is_no_socket_is_spared(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("elsewhere")
    before = path.lstat()
    with pytest.raises(ConfigError, match="is there, and is no socket"):
        Listener(str(path))
    assert path.lstat().st_ino == before.st_ino


@pytest.mark.parametrize("path", ["", "x" * 108, "a\0b", "/nowhere/s", "/proc/s", "/"])
def test_a_path_that_cannot_be(path: str) -> None:
    with pytest.raises(ConfigError):
        Listener(path)


def test_the_longest_path(tmp_path: Path) -> None:
    name = "n" * (107 - len(str(tmp_path)) - 1)
    listener = Listener(str(tmp_path / name))
    assert connects(tmp_path / name)
    listener.close()


def test_a_name_that_is_somebody_elses_by_now(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = Listener(str(path))
    path.unlink()
    second = Listener(str(path))
    first.close()
    assert connects(path)
    second.close()
