"""A kernel from files: packages read without dpkg, and directories where one was unpacked."""

from __future__ import annotations

import contextlib
import functools
import gzip
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import ConfigError, HostError
from pyvmm.linux import deb, local_kernel
from tests.support import cpio, deb_packages
from tests.support.deb_packages import RELEASE, VERSION
from tests.support.fake_apt import ELF, MODULES


def quiet(line: str) -> None:
    """For those who wait for nothing."""


@pytest.fixture(scope="module")
def ubuntu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with Ubuntu's packages."""
    folder = tmp_path_factory.mktemp("ubuntu")
    for package in deb_packages.ubuntu():
        deb_packages.build(package, folder)
    return folder


def image_of(folder: Path) -> Path:
    return folder / f"linux-image-{RELEASE}_{VERSION}_amd64.deb"


def modules_of(folder: Path) -> Path:
    return folder / f"linux-modules-{RELEASE}_{VERSION}_amd64.deb"


@pytest.mark.parametrize("packing", ["zstd", "xz", "gzip", "none"])
def test_debians_package_is_one_file(packing: str, tmp_path: Path) -> None:
    (package,) = deb_packages.debian()
    path = deb_packages.build(package, tmp_path, packing)
    kernel = local_kernel.fetch_files(path, tmp_path / "cache", quiet)
    assert (kernel.release, kernel.version) == ("6.1.0-9-cloud-amd64", VERSION)
    assert kernel.vmlinux.read_bytes() == ELF
    files = cpio.unpack(gzip.decompress(kernel.initramfs.read_bytes()))
    assert any(name.endswith("-ext4.ko") for name in files)


def test_ubuntus_modules_are_taken_from_beside_it(
    ubuntu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("zstd", "busybox"):
        (programs / name).symlink_to(shutil.which(name) or "")
    monkeypatch.setenv("PATH", str(programs))  # neither dpkg nor apt
    kernel = local_kernel.fetch_files(image_of(ubuntu), tmp_path / "cache", said.append)
    assert kernel.release == RELEASE
    assert kernel.config.read_text() == "CONFIG_64BIT=y\n"
    assert said == [
        f"unpacking {image_of(ubuntu).name} (once; kept in the cache)...",
        f"and {modules_of(ubuntu).name}, which is beside it",
    ]
    assert local_kernel.fetch_files(image_of(ubuntu), tmp_path / "cache", said.append) == kernel
    assert len(said) == 2


def test_missing_modules_are_named(ubuntu: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copy(image_of(ubuntu), tmp_path))
    with pytest.raises(ConfigError) as caught:
        local_kernel.fetch_files(alone, tmp_path / "cache", quiet)
    assert str(caught.value) == (
        f"{alone}: has no modules; put linux-modules-{RELEASE}_VERSION_amd64.deb beside it"
    )


def test_a_package_without_a_kernel_says_which_has_it(ubuntu: Path, tmp_path: Path) -> None:
    meta = next(ubuntu.glob("linux-image-virtual_*.deb"))
    with pytest.raises(ConfigError, match=f"no boot/vmlinuz-.*; it needs linux-image-{RELEASE}"):
        local_kernel.fetch_files(meta, tmp_path / "cache", quiet)
    with pytest.raises(ConfigError, match="a kernel's package is called linux-image-RELEASE"):
        local_kernel.fetch_files(modules_of(ubuntu), tmp_path / "cache", quiet)
    (package,) = deb_packages.debian()
    arm = deb_packages.build(package, tmp_path, architecture="arm64")
    with pytest.raises(ConfigError, match="is for arm64, and guests here are amd64"):
        local_kernel.fetch_files(arm, tmp_path / "cache", quiet)


def test_zstd_that_is_missing_is_named(
    ubuntu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("pyvmm.linux.compression._zstd_module", lambda: None)
    with pytest.raises(HostError, match=r"^zstd is missing; run: .* zstd, or use Python 3\.14"):
        local_kernel.fetch_files(image_of(ubuntu), tmp_path / "cache", quiet)


@pytest.mark.parametrize("cut", [0, 7, 8, 60, 100, 130, 200, -3, -200])
def test_a_damaged_package_is_one_line(cut: int, ubuntu: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.deb"
    broken.write_bytes(image_of(ubuntu).read_bytes()[:cut])
    with pytest.raises(ConfigError, match=rf"^{broken}: (is|\(.*\)) ?"):
        local_kernel.fetch_files(broken, tmp_path / "cache", quiet)


@settings(deadline=None, max_examples=150)
@given(
    place=st.floats(0, 1), bit=st.integers(0, 7), packing=st.sampled_from(["none", "gzip", "xz"])
)
def test_no_byte_of_a_package_makes_it_fail_in_another_way(
    place: float, bit: int, packing: str
) -> None:
    """Its files are small, so most bytes are headers."""
    data = bytearray(_debians(packing))
    data[int(place * (len(data) - 1))] ^= 1 << bit
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.deb")
        path.write_bytes(data)
        with contextlib.suppress(ConfigError):
            deb.unpack(deb.read(path), Path(folder, "out"))


@functools.cache
def _debians(packing: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        (package,) = deb_packages.debian()
        return deb_packages.build(package, Path(folder), packing).read_bytes()


def test_names_of_a_package_stay_below_the_directory(tmp_path: Path) -> None:
    """dpkg-deb would not pack it, so the archive is made by hand."""
    (package,) = deb_packages.debian()
    path = deb_packages.build(package, tmp_path, "none")
    whole = path.read_bytes()
    old = b"./boot/config-6.1.0-9-cloud-amd64"
    new = b"./boot/../../../evil-cloud-amd64x"
    assert len(old) == len(new)
    at = whole.index(old)
    header = bytearray(whole[at : at + 512].replace(old, new))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(whole[:at] + header + whole[at + 512 :])
    with pytest.raises(ConfigError, match="holds no boot/config-"):
        local_kernel.fetch_files(path, tmp_path / "cache" / "deep", quiet)
    assert not list(tmp_path.rglob("evil*"))


@pytest.fixture
def tree(ubuntu: Path, tmp_path: Path) -> Path:
    """A directory where Ubuntu's packages are unpacked."""
    for path in (image_of(ubuntu), modules_of(ubuntu)):
        subprocess.run(["dpkg-deb", "-x", path, tmp_path / "tree"], check=True)
    return tmp_path / "tree"


@pytest.mark.parametrize("layout", ["debian", "fedora"])
def test_a_tree(layout: str, tree: Path, tmp_path: Path) -> None:
    if layout == "fedora":
        (tree / "usr").mkdir()
        (tree / "lib").rename(tree / "usr/lib")
        (tree / "lib").symlink_to("usr/lib")
        folder = tree / "usr/lib/modules" / RELEASE
        (tree / f"boot/vmlinuz-{RELEASE}").rename(folder / "vmlinuz")
        (tree / f"boot/config-{RELEASE}").rename(folder / "config")
    kernel = local_kernel.fetch_tree(tree, tmp_path / "cache", quiet, with_modules=True)
    assert (kernel.release, kernel.version) == (RELEASE, "")
    assert kernel.modules is not None
    assert len(list(kernel.modules.rglob("*.ko"))) == len(MODULES)
    (tree / f"boot/config-{RELEASE}").write_text("CONFIG_SMP=y\n")
    newer = local_kernel.fetch_tree(tree, tmp_path / "cache", quiet, with_modules=True)
    assert newer != kernel, "the tree has changed"


def test_several_kernels_in_a_tree_ask_for_a_choice(tree: Path, tmp_path: Path) -> None:
    for name in ("vmlinuz", "config"):
        shutil.copy(tree / f"boot/{name}-{RELEASE}", tree / f"boot/{name}-6.9")
    with pytest.raises(ConfigError, match=r"--version 6\.8\.0-31-generic or 6\.9$"):
        local_kernel.fetch_tree(tree, tmp_path / "cache", quiet)
    with pytest.raises(ConfigError, match=r"--version 5: .* has 6\.8\.0-31-generic, 6\.9$"):
        local_kernel.fetch_tree(tree, tmp_path / "cache", quiet, release="5")
    assert local_kernel.fetch_tree(tree, tmp_path / "cache", quiet, release="6.9").release == "6.9"


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "arch/x86").mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"has no boot/vmlinuz.*pyvmm kernel build {tmp_path}$"):
        local_kernel.fetch_tree(tmp_path, tmp_path / "cache", quiet)
