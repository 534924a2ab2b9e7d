"""The ways into a kernel, each followed to user space; Linux says which it was entered by."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.guest import IMAGE, KERNEL, VMLINUX, boot, run_in_guest
from tests.support.kernels import pvh_note

pytestmark = pytest.mark.kvm

# What the boot loader, here pyvmm or Linux's own PVH code for it, wrote to type_of_loader.
SHOW_LOADER = "cat /proc/sys/kernel/bootloader_type; exit 3"
LOADER_UNDEFINED, LOADER_PVH = "255", "176"


@pytest.fixture
def plain_vmlinux(tmp_path: Path) -> Path:
    """build/vmlinux with its PVH note made nobody's."""
    content = VMLINUX.read_bytes()
    head = pvh_note(0)[:16]
    assert content.count(head) == 1
    path = tmp_path / "vmlinux"
    path.write_bytes(content.replace(head, head.replace(b"Xen", b"nox")))
    return path


def test_a_vmlinux_with_a_pvh_note_is_entered_by_pvh() -> None:
    run = boot("--disk", f"{IMAGE},ro", "-v", append=run_in_guest(SHOW_LOADER), kernel=VMLINUX)
    assert run.status == 3, run.console + run.messages
    assert LOADER_PVH in run.console.splitlines()
    assert "ELF vmlinux, 32-bit PVH entry at 0x" in run.messages


def test_pvh_hands_over_the_initrd() -> None:
    initrd = IMAGE.with_name("initramfs.cpio.gz")
    run = boot("--initrd", initrd, append=run_in_guest("exit 5"), kernel=VMLINUX)
    assert run.status == 5, run.console + run.messages


def test_a_vmlinux_without_is_entered_in_64_bit_mode(plain_vmlinux: Path) -> None:
    run = boot("--disk", f"{IMAGE},ro", "-v", append=run_in_guest(SHOW_LOADER),
               kernel=plain_vmlinux)
    assert run.status == 3, run.console + run.messages
    assert LOADER_UNDEFINED in run.console.splitlines()
    assert "ELF vmlinux, 64-bit Linux entry at 0x" in run.messages


def test_a_bzimage_is_entered_in_64_bit_mode() -> None:
    run = boot("--disk", f"{IMAGE},ro", "-v", append=run_in_guest(SHOW_LOADER), kernel=KERNEL)
    assert run.status == 3, run.console + run.messages
    assert LOADER_UNDEFINED in run.console.splitlines()
    assert "bzImage, boot protocol 2.15, Linux 6.1" in run.messages
