"""put, get, read and write: between this host and an agent that runs on it, too."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

import pyvmm
from pyvmm.launcher import files
from tests.support.patience import patient


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    """A directory that plays the guest's."""
    path = tmp_path / "guest"
    path.mkdir()
    return path


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A directory of the host's."""
    path = tmp_path / "here"
    path.mkdir()
    return path


def test_read_and_write(vm: pyvmm.Vm, guest: Path) -> None:
    vm.write(f"{guest}/a", "text\n")
    assert (guest / "a").read_text() == "text\n"
    assert stat.S_IMODE((guest / "a").stat().st_mode) == 0o644
    data = os.urandom(5 << 20)
    vm.write(f"{guest}/script", data, 0o755)
    assert stat.S_IMODE((guest / "script").stat().st_mode) == 0o755
    assert vm.read(f"{guest}/script") == data
    vm.write(f"{guest}/script", b"")
    assert vm.read(f"{guest}/script") == b""
    assert vm.read("/proc/self/comm").strip()  # a file without a size


@pytest.mark.parametrize(("target", "becomes"), [
    ("{0}/", "a.ko"), ("{0}", "a.ko"), ("{0}/b.ko", "b.ko"), ("{0}/link", "dir/a.ko"),
    ("{0}/new/", "new/a.ko"), ("{0}/new/c", "new/c"),
])
def test_put_a_file_as_cp_would(
    vm: pyvmm.Vm, guest: Path, here: Path, target: str, becomes: str
) -> None:
    (here / "a.ko").write_bytes(b"module")
    (here / "a.ko").chmod(0o751)
    (guest / "dir").mkdir()
    (guest / "link").symlink_to("dir")
    vm.put(here / "a.ko", target.format(guest))
    assert (guest / becomes).read_bytes() == b"module"
    assert stat.S_IMODE((guest / becomes).stat().st_mode) == 0o751


def test_put_and_get_a_tree(vm: pyvmm.Vm, guest: Path, here: Path) -> None:
    tree = here / "tree"
    (tree / "sub" / ("long" * 40)).mkdir(parents=True)
    (tree / "sub" / "data").write_bytes(os.urandom(300_000))
    (tree / "sub" / ("long" * 40) / "x").write_text("deep")
    (tree / "link").symlink_to("sub/data")
    (tree / "empty").mkdir()
    (tree / "run").write_text("#!/bin/sh\n")
    (tree / "run").chmod(0o755)
    vm.put(tree, f"{guest}/")
    vm.put(str(tree), f"{guest}/other")
    for copy in (guest / "tree", guest / "other"):
        assert_same(tree, copy)
    vm.get(f"{guest}/tree", here / "back")
    assert_same(tree, here / "back")
    (here / "empty").mkdir()
    vm.get(f"{guest}/tree/", f"{here}/empty/")
    assert_same(tree, here / "empty" / "tree")
    vm.get(f"{guest}/tree/run", here)
    assert stat.S_IMODE((here / "run").stat().st_mode) == 0o755


def assert_same(one: Path, other: Path) -> None:
    def listed(top: Path) -> dict[str, object]:
        return {
            str(path.relative_to(top)): os.readlink(path) if path.is_symlink()
            else path.read_bytes() if path.is_file() else "directory"
            for path in top.rglob("*")
        }

    assert listed(one) == listed(other)


def test_what_is_left_out_is_reported(
    vm: pyvmm.Vm, guest: Path, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (guest / "logs").mkdir()
    (guest / "logs" / "secret").symlink_to("/etc/shadow")
    (guest / "logs" / "up").symlink_to("../../here")
    os.mkfifo(guest / "logs" / "fifo")
    (guest / "logs" / "plain").write_text("x")
    vm.get(f"{guest}/logs", here)
    assert sorted(os.listdir(here / "logs")) == ["plain"]
    assert sum("left out" in record.getMessage() for record in caplog.records) == 3


def test_what_cannot_be_says_which_and_why(vm: pyvmm.Vm, guest: Path, here: Path) -> None:
    cases: list[tuple[Any, str]] = [
        (lambda: vm.put(here / "nothing", f"{guest}/"), "nothing: No such file"),
        (lambda: vm.get(f"{guest}/nothing", here), "get .*nothing.*No such file"),
        (lambda: vm.get("/etc/passwd", here / "a" / "b"), "No such file"),
        (lambda: vm.read(f"{guest}/nothing"), "read .*nothing.*No such file"),
        (lambda: vm.read(str(guest)), "Is a directory"),
        (lambda: vm.write(f"{guest}/no/file", b"x"), "write .*No such file"),
        (lambda: vm.write(f"{guest}", b"x"), "directory"),
        (lambda: vm.write("relative", b"x"), "must begin with /"),
        (lambda: vm.put(here, "relative"), "must begin with /"),
        (lambda: vm.get("relative", here), "must begin with /"),
        (lambda: vm.read("relative"), "must begin with /"),
        (lambda: vm.read("/dev/zero", timeout_s=0.5), "more than 64 MiB|within 0.5 s"),
    ]
    for call, words in cases:
        with pytest.raises(pyvmm.PyvmmError, match=words):
            call()
    with pytest.raises(TypeError, match="must be str"):
        vm.read(here)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="str or bytes"):
        vm.write(f"{guest}/x", 7)  # type: ignore[arg-type]
    assert vm.run(["true"]).is_success  # the agent has a place free


def test_more_than_read_keeps(
    vm: pyvmm.Vm, guest: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_READ_BYTES", 1 << 20)
    (guest / "large").write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(pyvmm.OutputLimitError, match="use get"):
        vm.read(f"{guest}/large")
    vm.get(f"{guest}/large", here)
    assert (here / "large").stat().st_size == (1 << 20) + 1


def test_a_full_disk_here_is_an_error_and_not_the_end(
    vm: pyvmm.Vm, guest: Path, here: Path
) -> None:
    (here / "small").symlink_to("/dev/full")
    (guest / "large").write_bytes(bytes(1 << 20))
    vm.get(f"{guest}/large", here / "small")  # a link is replaced, not followed
    assert (here / "small").stat().st_size == 1 << 20
    with pytest.raises(pyvmm.PyvmmError, match="No space left"):
        vm.write("/dev/full", bytes(1 << 20))
    assert vm.run(["true"], timeout_s=patient(20)).is_success
