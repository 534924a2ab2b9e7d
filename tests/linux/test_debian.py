"""From Debian's package to a kernel, a configuration and an initramfs; apt is made of scripts."""

from __future__ import annotations

import gzip
import platform
from pathlib import Path
from types import SimpleNamespace

import pytest

from pyvmm.errors import HostError
from pyvmm.linux import busybox, debian, packages
from tests.support import cpio
from tests.support.fake_apt import ELF, RELEASE, apt_log, module


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def ready(tools: Path) -> None:
    """Lists that are there and up to date."""
    (tools / "known").touch()
    (tools / "fresh").touch()


def quiet(line: str) -> None:
    """For those who wait for nothing."""


def on_debian(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **release: str) -> None:
    """A host with these lines in /etc/os-release, and with Debian's keys."""
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: release)
    keyring = tmp_path / "keys.gpg"
    keyring.touch()
    monkeypatch.setattr(packages, "KEYRING", keyring)


def test_fetch_leaves_kernel_config_and_initramfs(tools: Path, cache: Path) -> None:
    ready(tools)
    said: list[str] = []
    kernel = debian.fetch(cache, said.append)
    assert (kernel.release, kernel.version) == (RELEASE, "6.1.1-2")
    assert kernel.vmlinux.read_bytes() == ELF
    assert kernel.vmlinuz.name == f"vmlinuz-{RELEASE}"
    assert kernel.vmlinuz.read_bytes()[0x202:0x206] == b"HdrS"
    assert kernel.config.name == f"config-{RELEASE}", "where inspect and run look for it"
    assert kernel.config.parent == kernel.vmlinuz.parent
    files = cpio.unpack(gzip.decompress(kernel.initramfs.read_bytes()))
    assert files["init"][1].startswith(b"#!/bin/busybox sh\n")
    loaded = sorted(name for name in files if name.startswith("modules/"))
    assert [name.partition("-")[2] for name in loaded] == [
        "virtio_mmio.ko", "virtio_blk.ko", "virtio_console.ko", "crc32c_generic.ko", "jbd2.ko",
        "mbcache.ko", "ext4.ko",
    ]
    assert files[loaded[0]][1] == module("")
    assert "downloading" in said[0]
    kept = {path.name for path in kernel.vmlinuz.parent.iterdir()}
    assert kept == {path.name for path in
                    (kernel.vmlinuz, kernel.vmlinux, kernel.config, kernel.initramfs)}


def test_a_second_fetch_takes_it_from_the_cache(tools: Path, cache: Path) -> None:
    ready(tools)
    first = debian.fetch(cache, quiet)
    said: list[str] = []
    assert debian.fetch(cache, said.append, version="6.1.1-2") == first
    assert said == []
    assert apt_log(tools).count("download") == 1


def test_busybox_comes_from_its_package_where_the_host_has_none(
    tools: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready(tools)
    monkeypatch.setattr(busybox, "static_busybox", lambda: None)
    kernel = debian.fetch(cache, quiet)
    files = cpio.unpack(gzip.decompress(kernel.initramfs.read_bytes()))
    assert files["bin/busybox"] == (0o100755, b"a busybox")
    assert not (kernel.vmlinuz.parent / "busybox").exists()


def test_a_version_that_apt_does_not_know(
    tools: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready(tools)
    monkeypatch.setattr(packages, "os", SimpleNamespace(geteuid=lambda: 1000))
    with pytest.raises(HostError) as caught:
        debian.fetch(cache, quiet, version="9.9")
    assert str(caught.value) == (
        "apt knows no version 9.9 of linux-image-cloud-amd64, only 6.1.1-2, 6.1.0-1; "
        "if apt's lists are old, run: sudo apt-get update"
    )


def test_root_refreshes_lists_that_are_old(
    tools: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "os", SimpleNamespace(geteuid=lambda: 0))
    (tools / "known").touch()
    debian.fetch(cache, quiet)
    assert apt_log(tools) == ["download", "update", "download"]


def test_a_package_that_is_no_kernel(tools: Path, cache: Path) -> None:
    ready(tools)
    boot = tools / "package" / "boot"
    (boot / f"config-{RELEASE}").unlink()
    with pytest.raises(HostError, match=f"holds no boot/config-{RELEASE}"):
        debian.fetch(cache, quiet)
    (boot / f"config-{RELEASE}").touch()
    (boot / f"vmlinuz-{RELEASE}").write_bytes(b"MZ")
    with pytest.raises(HostError, match="Debian's kernel: not a bzImage"):
        debian.fetch(cache, quiet)
    assert [path.name for path in cache.iterdir()] == ["debian.lock"]


def test_backports_have_lists_of_their_own(
    tools: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_debian(monkeypatch, tmp_path, ID="debian", VERSION_CODENAME="bookworm")
    monkeypatch.setattr(packages, "os", SimpleNamespace(geteuid=lambda: 1000))
    kernel = debian.fetch(cache, quiet, backports=True)
    assert kernel.release == RELEASE
    assert (tools / "sources").read_text() == (
        f"deb [arch=amd64 signed-by={tmp_path}/keys.gpg] "
        "http://mirror.example/debian/ bookworm-backports main\n"
    )
    assert apt_log(tools) == ["indextargets", "update", "download"]


def test_backports_offline(
    tools: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_debian(monkeypatch, tmp_path, ID="debian", VERSION_CODENAME="bookworm")
    (tools / "offline").touch()
    with pytest.raises(HostError, match="apt-get update failed: E: no network"):
        debian.fetch(cache, quiet, backports=True)
    ready(tools)
    (cache / "apt-bookworm-backports" / "lists" / "mirror_main_Packages").touch()
    said: list[str] = []
    debian.fetch(cache, said.append, backports=True)
    assert said[0].endswith("going on with the lists of last time")


def test_backports_are_debians(
    tools: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_debian(monkeypatch, tmp_path, ID="ubuntu", PRETTY_NAME="Ubuntu 24.04")
    with pytest.raises(HostError, match=r"this host is Ubuntu 24\.04, and only Debian has"):
        debian.fetch(cache, quiet, backports=True)
    on_debian(monkeypatch, tmp_path, ID="debian", VERSION_CODENAME="bookworm")
    monkeypatch.setattr(packages, "KEYRING", tmp_path / "missing.gpg")
    with pytest.raises(HostError, match=r"missing\.gpg is missing; run: .*debian-archive-keyring"):
        debian.fetch(cache, quiet, backports=True)


def test_without_apt_it_is_one_error(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="apt-cache is missing: Debian's kernels come by apt"):
        debian.fetch(cache, quiet)
