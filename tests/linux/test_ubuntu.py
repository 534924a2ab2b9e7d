"""Ubuntu's kernel by this host's real apt, from a local repository of Ubuntu's shape."""

from __future__ import annotations

import gzip
import platform
import subprocess
from pathlib import Path

import pytest

from pyvmm.errors import HostError
from pyvmm.linux import debian
from tests.support import cpio, deb_packages
from tests.support.deb_packages import RELEASE, VERSION
from tests.support.fake_apt import ELF, MODULES, module


def quiet(line: str) -> None:
    """For those who wait for nothing."""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deb_packages.repository(deb_packages.ubuntu(), tmp_path_factory.mktemp("repository"))


@pytest.fixture
def on_ubuntu(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose apt knows the repository alone, its lists not fetched yet."""
    configuration = deb_packages.apt_configuration(tmp_path / "apt", repository)
    monkeypatch.setenv("APT_CONFIG", str(configuration))
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: {"ID": "ubuntu"})
    subprocess.run(["apt-get", "update", "-qq"], check=True, capture_output=True)


@pytest.mark.usefixtures("on_ubuntu")
def test_the_kernel_and_its_modules_come_from_two_packages(tmp_path: Path) -> None:
    said: list[str] = []
    kernel = debian.fetch_ubuntu(tmp_path / "cache", said.append)
    assert (kernel.release, kernel.version) == (RELEASE, VERSION)
    assert kernel.vmlinux.read_bytes() == ELF
    assert kernel.config.read_text() == "CONFIG_64BIT=y\n"
    assert kernel.modules is None
    files = cpio.unpack(gzip.decompress(kernel.initramfs.read_bytes()))
    loaded = {name.partition("-")[2]: files[name][1] for name in sorted(files)
              if name.startswith("modules/")}
    assert list(loaded) == ["virtio_mmio.ko", "virtio_blk.ko", "virtio_console.ko",
                            "crc32c_generic.ko", "jbd2.ko", "mbcache.ko", "ext4.ko"]
    assert loaded["ext4.ko"] == module("jbd2,mbcache"), "unpacked"
    assert [line.split()[1] for line in said if "downloading" in line] == [
        f"linux-image-{RELEASE}", f"linux-modules-{RELEASE}"]
    said.clear()
    assert debian.fetch_ubuntu(tmp_path / "cache", said.append) == kernel
    assert said == []


@pytest.mark.usefixtures("on_ubuntu")
def test_all_modules_are_left_unpacked_and_indexed(tmp_path: Path) -> None:
    kernel = debian.fetch_ubuntu(tmp_path / "cache", quiet, with_modules=True)
    assert kernel.modules is not None
    found = {str(path.relative_to(kernel.modules)) for path in kernel.modules.rglob("*.ko*")}
    assert found == {f"kernel/{path}" for path in MODULES}
    assert (kernel.modules / "kernel/fs/9p/9p.ko").read_bytes() == module("9pnet,netfs")
    assert (kernel.modules / "modules.dep").exists()
    assert kernel.modules.parts[-3:] == ("lib", "modules", RELEASE)


def test_another_host_is_told_of_the_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    empty = deb_packages.repository([], tmp_path / "empty")
    monkeypatch.setenv("APT_CONFIG", str(deb_packages.apt_configuration(tmp_path / "apt", empty)))
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: {"ID": "debian"})
    with pytest.raises(HostError) as caught:
        debian.fetch_ubuntu(tmp_path / "cache", quiet)
    assert str(caught.value).startswith("apt knows no package linux-image-virtual, because this")
    assert str(caught.value).endswith("pyvmm kernel fetch linux-image-*.deb")


@pytest.mark.usefixtures("on_ubuntu")
def test_a_version_that_apt_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"no version 9 of linux-image-virtual, only 6\.8\.0\.31"):
        debian.fetch_ubuntu(tmp_path / "cache", quiet, version="9")
