"""Put a kernel and its initrd into guest RAM.

All of this is done before any vCPU runs.  Every fault is a ConfigError of one line: the file or
option, the mistake, the limit.  The memory has its first region at address 0.
"""

from __future__ import annotations

import os

from pyvmm.memory import PAGE_SIZE, GuestMemory
from pyvmm.x86.image import (
    ELF_MAGIC,
    SETUP_HEADER_MAX_END,
    EntryKind,
    ImageFile,
    Kernel,
    KernelKind,
    align_up,
)

# The module for one kind of kernel is imported for a kernel of that kind.

__all__ = [
    "EntryKind",
    "Kernel",
    "KernelKind",
    "load_initrd",
    "load_kernel",
    "parse_kernel",
    "write_boot_info",
]


def load_kernel(memory: GuestMemory, path: str | os.PathLike[str]) -> Kernel:
    """Load the bzImage or ELF vmlinux at ``path``; its content decides which it is.

    All headers are checked before the first byte is stored in ``memory``.
    """
    with ImageFile(path) as image:
        kernel = parse_kernel(image, memory.regions[0].end)
        for segment in kernel.segments:
            with memory.view(segment.gpa, segment.length) as view:
                image.read_into(view, segment.file_offset)
    return kernel


def parse_kernel(image: ImageFile, ram_end: int) -> Kernel:
    """Return the plan for loading ``image``; ``ram_end`` is the end of RAM below 4 GiB."""
    head = image.read_at(0, min(image.size_bytes, SETUP_HEADER_MAX_END))
    if head.startswith(ELF_MAGIC):
        from pyvmm.x86 import elf

        return elf.parse(image, head, ram_end)

    from pyvmm.x86 import bzimage

    if bzimage.matches(head):
        return bzimage.parse(image, head, ram_end)
    from pyvmm.storage.image_kinds import HEAD_BYTES, kind_of_head

    kind = kind_of_head(image.read_at(0, min(image.size_bytes, HEAD_BYTES)))
    what = ""
    if kind is not None:
        what = f"; it is {kind.name}: {kind.remedy(image.path)}"
    elif head.startswith(b"MZ"):
        what = "; it is an EFI program, and there is no EFI firmware here"
    raise image.error("not a Linux kernel: neither an ELF magic at byte 0 "
                      f"nor 'HdrS' at byte {bzimage.HEADER_MAGIC_OFFSET:#x} (bzImage){what}")


def load_initrd(
    memory: GuestMemory, path: str | os.PathLike[str], kernel: Kernel, *, front: bytes = b""
) -> tuple[int, int]:
    """Load an initrd as high as the kernel allows; return ``(gpa, size in bytes)``.

    It lies page-aligned under the end of RAM below 4 GiB and the kernel's initrd_addr_max.
    ``front`` are bytes that go before the file's: an archive of our own.
    """
    with ImageFile(path) as image:
        size_bytes = len(front) + image.size_bytes
        ceiling, whose = memory.regions[0].end, "the end of RAM (--memory)"
        if kernel.initrd_addr_max + 1 < ceiling:
            ceiling, whose = kernel.initrd_addr_max + 1, "the kernel's initrd_addr_max"
        room = max(0, (ceiling & -PAGE_SIZE) - kernel.end)
        if align_up(size_bytes, PAGE_SIZE) > room:
            raise image.error(f"{size_bytes} bytes are too large for an initrd: the limit is "
                              f"{room}, between the kernel's end at {kernel.end:#x} and {whose} "
                              f"at {ceiling:#x}")
        gpa = (ceiling - size_bytes) & -PAGE_SIZE
        with memory.view(gpa, size_bytes) as view:
            view[: len(front)] = front
            with view[len(front) :] as rest:
                image.read_into(rest, 0)
    return gpa, size_bytes


def write_boot_info(
    memory: GuestMemory,
    kernel: Kernel,
    cmdline: str,
    initrd: tuple[int, int] | None,
    *,
    rsdp: int = 0,
) -> None:
    """Tell ``kernel`` about the machine in the way its entry asks for.

    This calls ``write_boot_params`` or ``write_start_info``, which document the arguments.
    ``cpu.setup_boot`` points the vCPU to the result.
    """
    if kernel.entry_kind is EntryKind.PVH:
        from pyvmm.x86.pvh import write_start_info

        write_start_info(memory, kernel, cmdline, initrd, rsdp=rsdp)
    else:
        from pyvmm.x86.boot_params import write_boot_params

        write_boot_params(memory, kernel, cmdline, initrd, rsdp=rsdp)
