"""Files that are no kernel: said to be what they are, with the command that makes one of them."""

from __future__ import annotations

import gzip
import lzma
import subprocess
from pathlib import Path

import pytest

from pyvmm.cli.main import main
from pyvmm.errors import ConfigError
from pyvmm.x86 import layout
from pyvmm.x86.image import ImageFile, Kernel
from pyvmm.x86.loader import parse_kernel
from tests.support.kernels import ElfSegment, bzimage, elf, note, note_segment


def parsed(path: Path) -> Kernel:
    with ImageFile(path) as image:
        return parse_kernel(image, layout.MMIO_GAP_START)


@pytest.mark.parametrize(("packed", "name"), [
    (gzip.compress(elf()), "compressed with gzip: gunzip -c <"),
    (lzma.compress(elf()), "compressed with xz: xz -dc <"),
    (b"\x28\xb5\x2f\xfd" + bytes(100), "compressed with zstd: zstd -dc <"),
    (b"!<arch>\ndebian-binary   ".ljust(600), "an ar archive or Debian package: dpkg -x"),
    (b"070701".ljust(600, b"0"), "an initramfs (cpio): --initrd"),
    (b"QFI\xfb".ljust(600, b"\0"), "a qcow2 image"),
    (b"MZ".ljust(600, b"\0"), "an EFI program, and there is no EFI firmware here"),
])
def test_fault_26_a_file_of_another_kind_is_named(
    tmp_path: Path, packed: bytes, name: str
) -> None:
    path = tmp_path / "kernel.img"
    path.write_bytes(packed)
    with pytest.raises(ConfigError) as caught:
        parsed(path)
    assert "not a Linux kernel: neither an ELF magic at byte 0 nor" in str(caught.value)
    assert f"; it is {name}" in str(caught.value)


def test_fault_26_a_gzipped_kernel_boots_once_the_command_was_typed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "xen kernel.gz"
    path.write_bytes(gzip.compress(elf()))
    for command in (["run", "--kernel", str(path)], ["kernel", "inspect", str(path)]):
        assert main(command) == 125
        said = capsys.readouterr().err.rstrip().partition("compressed with gzip: ")[2]
    subprocess.run(["bash", "-c", said], check=True)
    assert parsed(tmp_path / "xen kernel").kind == "ELF vmlinux"


@pytest.mark.parametrize(("content", "is_linux"), [
    (bzimage(), True), (bzimage(version_text=b"Memtest86+ v6.10"), False),
    (bzimage(kernel_version=0), False), (elf(), False),
    (elf(ElfSegment(), note_segment(note(b"Linux\0", 0x100, b"\0"))), True),
])
def test_fault_26_only_linux_is_told_that_it_has_no_root(
    tmp_path: Path, content: bytes, is_linux: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(content)
    assert parsed(path).is_linux is is_linux
    assert ("Linux " in parsed(path).describe().replace("64-bit Linux entry", "")) is (
        is_linux and bool(parsed(path).version)
    )
    # CODE of the synthetic kernels does nothing good; what is said before it runs counts.
    main(["run", "--kernel", str(path), "--console", "none", "--timeout", "1"])
    said = capfd.readouterr().err
    if "/dev/kvm" not in said:
        assert ("no root to mount" in said) is is_linux
