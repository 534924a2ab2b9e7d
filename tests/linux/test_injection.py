"""The agent brought into a guest: which initramfs it is put in front of, and what is refused."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from pyvmm.agent import binary
from pyvmm.errors import ConfigError, HostError
from pyvmm.linux.cpio import pack_cpio
from pyvmm.linux.host import static_busybox
from pyvmm.linux.injection import inject
from tests.support.cpio import unpack

RELEASE = "6.1.0-99-test"
VERSION = f"{RELEASE} (somebody@example) #1 SMP"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    path = tmp_path / "cache"
    monkeypatch.setenv("PYVMM_CACHE", str(path))
    return path


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """A kernel in the ``boot`` directory of an unpacked package."""
    path = tmp_path / "package/boot" / f"vmlinuz-{RELEASE}"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"a kernel")
    return path


class Said:
    """The lines for whoever waits."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        self.lines.append(line)


def add_module(folder: Path, name: str, depends: str = "") -> None:
    path = folder / "kernel/drivers" / f"{name}.ko"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(f"\x7fELF {name}\0depends={depends}\0".encode())


def contents(path: str | os.PathLike[str]) -> dict[str, bytes]:
    """Names and contents of a gzipped archive."""
    return {
        name: data for name, (_, data) in unpack(gzip.decompress(Path(path).read_bytes())).items()
    }


def test_the_agents_archive_has_its_program_and_a_length_that_suits_what_follows(
    kernel: Path,
) -> None:
    found = inject(kernel, VERSION, None, print)
    ((name, (mode, program)),) = unpack(found.front).items()
    assert f"/{name}" == "/pyvmm-agent"
    assert mode == 0o100755
    assert program[:4] == b"\x7fELF"
    assert len(found.front) % 512 == 0


@pytest.mark.parametrize(
    "data", [gzip.compress(pack_cpio([("init", 0o100755, b"x")])),
             pack_cpio([("init", 0o100755, b"x")]), b"\x28\xb5\x2f\xfd and so on"],
    ids=["gzip", "plain", "zstd"],
)  # fmt: skip
def test_an_initramfs_of_the_users_is_taken_as_it_is(
    kernel: Path, tmp_path: Path, data: bytes
) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(data)
    assert inject(kernel, VERSION, initrd, print).initrd == initrd


def test_an_initrd_that_is_a_file_system_is_refused(kernel: Path, tmp_path: Path) -> None:
    initrd = tmp_path / "disk.img"
    initrd.write_bytes(bytes(2048))
    with pytest.raises(ConfigError, match=r"^--initrd \S+disk\.img: is no initramfs \(a cpio arch"):
        inject(kernel, VERSION, initrd, print)


@pytest.mark.parametrize("name", ["missing", "empty", "."])
def test_a_file_that_cannot_be_read_is_left_to_whoever_loads_it(
    kernel: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "empty").touch()
    assert inject(kernel, VERSION, tmp_path / name, print).initrd == tmp_path / name


def test_a_kernel_that_was_fetched_has_its_initramfs_beside_it(
    kernel: Path, tmp_path: Path
) -> None:
    beside = kernel.with_name(f"initramfs-{RELEASE}.cpio.gz")
    beside.write_bytes(b"made by kernel fetch")
    link = tmp_path / "linux"
    link.symlink_to(kernel)
    unnamed = kernel.with_name(f"vmlinux-{RELEASE}")  # an ELF file does not tell its version
    unnamed.write_bytes(b"the same, unpacked")
    assert inject(kernel, VERSION, None, print).initrd == beside
    assert inject(link, VERSION, None, print).initrd == beside
    assert inject(unnamed, "", None, print).initrd == beside


@pytest.mark.parametrize("place", ["package/lib", "package/usr/lib", "package/boot/lib"])
def test_modules_near_the_kernel_are_in_the_initramfs_in_load_order(
    kernel: Path, tmp_path: Path, place: str
) -> None:
    folder = tmp_path / place / "modules" / RELEASE
    add_module(folder, "virtio_console")
    add_module(folder, "virtio_blk", "virtio")
    add_module(folder, "virtio")
    add_module(folder, "xfs")
    add_module(folder.with_name("5.10.0-other"), "virtio_mmio")
    said = Said()
    first = inject(kernel, VERSION, None, said).initrd
    names = list(contents(first))
    assert [name for name in names if name.startswith("modules/")] == [
        "modules/00-virtio.ko", "modules/01-virtio_blk.ko", "modules/02-virtio_console.ko",
    ]
    assert "file-systems/xfs/00-xfs.ko.gz" in names
    assert {"init", "bin/busybox"} <= set(names)
    assert len(said.lines) == 1
    assert inject(kernel, VERSION, None, said).initrd == first
    assert len(said.lines) == 1, "from the cache"
    add_module(folder, "virtio_mmio")
    os.utime(folder / "kernel", ns=(1, 1))
    assert "modules/00-virtio_mmio.ko" in contents(inject(kernel, VERSION, None, said).initrd)


def test_a_kernel_with_everything_built_in_needs_no_modules(tmp_path: Path) -> None:
    kernel = tmp_path / "arch/x86/boot/bzImage"
    kernel.parent.mkdir(parents=True)
    kernel.write_bytes(b"x")
    (tmp_path / ".config").write_text("CONFIG_VIRTIO_MMIO=y\nCONFIG_VIRTIO_BLK=y\n")
    found = contents(inject(kernel, "6.1.192-own", None, print).initrd)
    busybox = static_busybox()
    assert busybox is not None
    assert found["bin/busybox"] == busybox.read_bytes()
    assert not [name for name in found if name.startswith(("modules/", "file-systems/"))]


def test_modules_that_are_needed_and_nowhere_are_one_clear_error(kernel: Path) -> None:
    kernel.with_name(f"config-{RELEASE}").write_text("CONFIG_VIRTIO_MMIO=m\n")
    with pytest.raises(ConfigError) as caught:
        inject(kernel, VERSION, None, print)
    assert str(caught.value) == (
        f"--kernel {kernel}: has CONFIG_VIRTIO_MMIO=m, and --agent finds no modules of {RELEASE}: "
        f"they must be in ../lib/modules/{RELEASE} beside it, or in /lib/modules here (or give "
        "--initrd)"
    )


def test_a_damaged_module_is_one_clear_error(kernel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "package/lib/modules" / RELEASE / "kernel"
    folder.mkdir(parents=True)
    (folder / "virtio_blk.ko.xz").write_bytes(b"\xfd7zXZ\0 and then nothing")
    with pytest.raises(HostError, match=rf"^a module of {RELEASE} in \S+/package/lib/modules: "):
        inject(kernel, VERSION, None, print)


def test_a_version_that_is_a_path_leads_nowhere(tmp_path: Path) -> None:
    """The text is the kernel's, and the kernel may be anybody's."""
    kernel = tmp_path / "bzImage"
    kernel.write_bytes(b"x")
    (tmp_path / "initramfs-..").mkdir()
    initrd = inject(kernel, "../../etc x", None, print).initrd
    assert Path(initrd).name == "initramfs.cpio.gz"


def test_a_program_that_is_missing_is_said(
    kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binary, "PROGRAM", tmp_path / "no-such-agent")
    with pytest.raises(HostError, match=r"no-such-agent: the agent's program is missing"):
        inject(kernel, VERSION, None, print)
