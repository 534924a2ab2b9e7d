"""Reading a bzImage for the 64-bit boot protocol (Documentation/arch/x86/boot.rst).

::

    file  0x0000  +---------------------------+
                  | real-mode setup (not used)|
          0x01f1  | setup header, "HdrS"      |  ends at 0x202 + the byte at 0x201
                  |                           |
                  +---------------------------+  (setup_sects + 1) * 512
                  | protected-mode code,      |  -> pref_address; 64-bit entry 0x200 into it
                  | syssize * 16 bytes        |
                  +---------------------------+
                  | signature, padding        |  (ignored)
                  +---------------------------+

Only the fields that booting depends on are judged: each one is either used or refused.
"""

from __future__ import annotations

import ctypes

from pyvmm.memory import PAGE_SIZE
from pyvmm.x86 import layout
from pyvmm.x86.boot_params import (
    BOOT_FLAG,
    HEADER_MAGIC,
    LOADED_HIGH,
    SETUP_HEADER_OFFSET,
    SetupHeader,
)
from pyvmm.x86.image import (
    SETUP_HEADER_MAX_END,
    EntryKind,
    ImageFile,
    Kernel,
    KernelKind,
    Segment,
    align_up,
    dotted,
    require_ram,
)

HEADER_MAGIC_OFFSET = 0x202

MIN_PROTOCOL = 0x020C
"""2.12 brought xloadflags, which say whether there is a 64-bit entry."""
ENTRY_64_OFFSET = 0x200
XLF_KERNEL_64 = 1 << 0

_SECTOR = 512
_PARAGRAPH = 16
_DEFAULT_SETUP_SECTS = 4
_SHORT_JUMP = 0xEB
_MIN_HEADER_BYTES = SetupHeader.init_size.offset + SetupHeader.init_size.size
_VERSION_MAX = 256


def matches(head: bytes) -> bool:
    """True if a file that starts with ``head`` calls itself a bzImage."""
    return head[HEADER_MAGIC_OFFSET : HEADER_MAGIC_OFFSET + 4] == HEADER_MAGIC


def parse(image: ImageFile, head: bytes, ram_end: int) -> Kernel:
    """Return the plan for loading the bzImage ``image``, whose first bytes are ``head``.

    ``head`` is as much of SETUP_HEADER_MAX_END as the file has.  No other copy of the header is
    read.  ``ram_end`` is the end of RAM below 4 GiB.  ConfigError names the field.
    """
    header_bytes = _header_bytes(image, head)
    header = SetupHeader.from_buffer_copy(header_bytes.ljust(ctypes.sizeof(SetupHeader), b"\0"))
    _check_protocol(image, header)
    if len(header_bytes) < _MIN_HEADER_BYTES:
        raise image.error(f"setup header is {len(header_bytes)} bytes, "
                          f"must be at least {_MIN_HEADER_BYTES} (to init_size)")
    code_offset, code_bytes = _locate_code(image, header)
    start, end = _place(image, header, code_bytes, ram_end)
    version = _version(image, header, code_offset)
    return Kernel(
        path=image.path,
        kind=KernelKind.BZIMAGE,
        start=start,
        end=end,
        entry=start + ENTRY_64_OFFSET,
        entry_kind=EntryKind.LINUX_64,
        segments=(Segment(file_offset=code_offset, gpa=start, length=code_bytes),),
        setup_header=header_bytes,
        initrd_addr_max=header.initrd_addr_max,
        cmdline_limit=min(header.cmdline_size, layout.CMDLINE_MAX - 1),
        protocol=header.version,
        version=version,
        is_linux=version[:1].isdigit(),  # Memtest86+ and MEMDISK begin with their names
    )


def _header_bytes(image: ImageFile, head: bytes) -> bytes:
    """Return the file's setup header, whose length is in the jump over it."""
    if head[0x200] != _SHORT_JUMP:
        raise image.error(f"byte 0x200 of the setup header is {head[0x200]:#x}, "
                          f"must be a short jump ({_SHORT_JUMP:#x})")
    end = 0x202 + head[0x201]
    if end > SETUP_HEADER_MAX_END:
        raise image.error(f"setup header ends at byte {end:#x}, "
                          f"past its limit of {SETUP_HEADER_MAX_END:#x}")
    if end > len(head):
        raise image.error(f"truncated: setup header ends at byte {end}, "
                          f"the file at {image.size_bytes}")
    return head[SETUP_HEADER_OFFSET:end]


def _check_protocol(image: ImageFile, header: SetupHeader) -> None:
    """Refuse a kernel that the 64-bit boot protocol cannot start."""
    if header.boot_flag != BOOT_FLAG:
        raise image.error(f"setup header: boot_flag is {header.boot_flag:#06x}, "
                          f"must be {BOOT_FLAG:#06x}")
    if header.version < MIN_PROTOCOL:
        raise image.error(f"boot protocol is {dotted(header.version)}, "
                          f"must be {dotted(MIN_PROTOCOL)} or later (Linux 3.8)")
    if not header.loadflags & LOADED_HIGH:
        raise image.error(f"setup header: loadflags {header.loadflags:#x} lack LOADED_HIGH "
                          f"({LOADED_HIGH:#x}): a zImage, not a bzImage")
    if not header.xloadflags & XLF_KERNEL_64:
        raise image.error(f"no 64-bit entry (xloadflags {header.xloadflags:#x} lack "
                          f"XLF_KERNEL_64 ({XLF_KERNEL_64:#x})): a 32-bit kernel")


def _locate_code(image: ImageFile, header: SetupHeader) -> tuple[int, int]:
    """Return ``(file offset, length in bytes)`` of the protected-mode code.

    ``syssize`` counts paragraphs of 16 bytes.  The file may lack a part of the last one.
    """
    sectors = header.setup_sects or _DEFAULT_SETUP_SECTS
    offset = (sectors + 1) * _SECTOR
    length = header.syssize * _PARAGRAPH
    if length <= ENTRY_64_OFFSET:
        raise image.error(f"setup header: syssize gives {length} bytes of kernel, "
                          f"must be more than {ENTRY_64_OFFSET} (the 64-bit entry)")
    if offset + length - image.size_bytes >= _PARAGRAPH:
        raise image.error(f"truncated: setup_sects ({sectors}) and syssize say the kernel is bytes "
                          f"{offset} to {offset + length}, the file ends at {image.size_bytes}")
    return offset, min(length, image.size_bytes - offset)


def _place(
    image: ImageFile, header: SetupHeader, code_bytes: int, ram_end: int
) -> tuple[int, int]:
    """Return ``(start, end)`` of the RAM that the kernel needs: init_size bytes at pref_address.

    A relocatable kernel is not placed lower when RAM is short.  Its 64-bit decompressor moves
    itself up to pref_address before it unpacks, so it needs the RAM there all the same.  A kernel
    that is not relocatable may leave kernel_alignment 0.  It builds its page tables from
    pref_address.
    """
    start, alignment = header.pref_address, header.kernel_alignment
    if (header.relocatable_kernel and alignment == 0) or alignment & (alignment - 1):
        raise image.error(f"setup header: kernel_alignment is {alignment:#x}, "
                          "must be a power of two")
    if start % max(alignment, 1):
        raise image.error(f"setup header: pref_address {start:#x} is not a multiple of "
                          f"kernel_alignment {alignment:#x}")
    if start % PAGE_SIZE:
        raise image.error(f"setup header: pref_address {start:#x} is not a multiple of "
                          f"a page, {PAGE_SIZE:#x}")
    if header.init_size < code_bytes:
        raise image.error(f"setup header: init_size is {header.init_size} bytes, "
                          f"must be at least the {code_bytes} of the kernel itself")
    end = align_up(start + header.init_size, PAGE_SIZE)
    require_ram(image, "kernel (pref_address, init_size)", start, end, ram_end)
    return start, end


def _version(image: ImageFile, header: SetupHeader, setup_end: int) -> str:
    """Return the kernel's version text, "" if the header points at none; never a terminal
    escape."""
    if header.kernel_version == 0:
        return ""
    offset = header.kernel_version + 0x200
    if offset >= setup_end:
        return ""
    text = image.read_at(offset, min(_VERSION_MAX, setup_end - offset)).split(b"\0", 1)[0]
    return "".join(chr(byte) if 0x20 <= byte < 0x7F else "?" for byte in text)
