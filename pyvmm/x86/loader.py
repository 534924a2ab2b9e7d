"""Putting a kernel and its initrd into guest RAM.

Everything here is done before any vCPU runs, and every fault is a ConfigError with one line: the
file or option, what is wrong with it, the limit.  The memory has its first region at address 0.
"""

from __future__ import annotations

import os

from pyvmm.memory import PAGE_SIZE, GuestMemory
from pyvmm.x86 import bzimage, elf
from pyvmm.x86.boot_params import write_boot_params
from pyvmm.x86.image import ImageFile, Kernel, KernelKind, align_up

__all__ = ["Kernel", "KernelKind", "load_initrd", "load_kernel", "write_boot_params"]


def load_kernel(memory: GuestMemory, path: str | os.PathLike[str]) -> Kernel:
    """Load the bzImage or ELF vmlinux at ``path``; its content decides which it is.

    All headers are checked before the first byte is stored in ``memory``.
    """
    with ImageFile(path) as image:
        head = image.read_at(0, min(image.size_bytes, bzimage.HEAD_BYTES))
        ram_end = memory.regions[0].end
        if elf.matches(head):
            kernel = elf.parse(image, head, ram_end)
        elif bzimage.matches(head):
            kernel = bzimage.parse(image, head, ram_end)
        else:
            raise image.error("not a Linux kernel: neither an ELF magic at byte 0 "
                              f"nor 'HdrS' at byte {bzimage.HEADER_MAGIC_OFFSET:#x} (bzImage)")
        for segment in kernel.segments:
            with memory.view(segment.gpa, segment.length) as view:
                image.read_into(view, segment.file_offset)
    return kernel


def load_initrd(
    memory: GuestMemory, path: str | os.PathLike[str], kernel: Kernel
) -> tuple[int, int]:
    """Load an initrd as high as it may be, out of the kernel's way: ``(gpa, size in bytes)``.

    That is page-aligned under the end of RAM below 4 GiB and the kernel's initrd_addr_max.
    """
    with ImageFile(path) as image:
        size_bytes = image.size_bytes
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
            image.read_into(view, 0)
    return gpa, size_bytes
