"""From a Debian package to a kernel in the cache, without a network: apt and dpkg are scripts."""

from __future__ import annotations

import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from pyvmm.errors import HostError
from pyvmm.lab import kernel
from pyvmm.linux import packages
from tests.support import fake_apt
from tests.support.fake_apt import ELF, NAME, apt_log


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of scripts named as apt and dpkg; touch ``known`` and ``fresh`` in it."""
    directory = tmp_path / "tools"
    fake_apt.install(directory, monkeypatch)
    return directory


def as_user(monkeypatch: pytest.MonkeyPatch, uid: int) -> None:
    monkeypatch.setattr(packages, "os", SimpleNamespace(geteuid=lambda: uid))


def test_builds_vmlinux_and_modules_in_load_order(tools: Path, tmp_path: Path) -> None:
    (tools / "known").touch()
    (tools / "fresh").touch()
    said: list[str] = []
    built = kernel.obtain(tmp_path / "cache", said.append)
    assert built.vmlinux.read_bytes() == ELF
    names = [path.name[3:-3] for path in built.modules]
    assert sorted(names) == sorted(
        ["virtio_console", "9pnet", "9pnet_virtio", "netfs", "9p", "irqbypass", "kvm", "kvm_amd"]
    )
    for first, then in (("9pnet", "9pnet_virtio"), ("netfs", "9p"), ("kvm", "kvm_amd")):
        assert names.index(first) < names.index(then)
    assert said[0] == f"downloading {NAME} 6.1.1-2 (70.0 MB)..."
    assert apt_log(tools) == ["download"]
    again = kernel.obtain(tmp_path / "cache", said.append)
    assert again == built
    assert apt_log(tools) == ["download"], "the second use takes it from the cache"
    kept = {path.name for path in (tmp_path / "cache").iterdir()}
    assert kept == {"lab.lock", built.vmlinux.parent.name}
    assert {path.name for path in built.vmlinux.parent.iterdir()} == {"vmlinux", "modules"}
    assert stat.S_IMODE(built.vmlinux.parent.stat().st_mode) == 0o755


def test_root_refreshes_absent_lists(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_user(monkeypatch, 0)
    said: list[str] = []
    kernel.obtain(tmp_path / "cache", said.append)
    assert apt_log(tools) == ["update", "download"]
    assert "running apt-get update" in said[0]


def test_root_refreshes_lists_that_point_to_a_package_long_gone(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_user(monkeypatch, 0)
    (tools / "known").touch()
    kernel.obtain(tmp_path / "cache", lambda line: None)
    assert apt_log(tools) == ["download", "update", "download"]


def test_others_are_told_the_command_for_absent_lists(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_user(monkeypatch, 1000)
    with pytest.raises(HostError, match=r"^lab: .* linux-image-amd64.* sudo apt-get update"):
        kernel.obtain(tmp_path / "cache", lambda line: None)
    assert apt_log(tools) == []


def test_a_failed_download_says_why_and_leaves_nothing(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_user(monkeypatch, 1000)
    (tools / "known").touch()
    with pytest.raises(HostError, match=r"E: 404  Not Found; .*run: sudo apt-get update"):
        kernel.obtain(tmp_path / "cache", lambda line: None)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lab.lock"]


def test_without_apt_it_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_user(monkeypatch, 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="apt-cache is missing"):
        kernel.obtain(tmp_path / "cache", lambda line: None)
