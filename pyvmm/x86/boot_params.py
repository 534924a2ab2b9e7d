"""``struct boot_params``, the "zero page" that tells Linux about the machine.

Names, sizes and order are those of ``<asm/bootparam.h>`` (a test compares them through a C
compiler); meanings are in Documentation/arch/x86/boot.rst and zero-page.rst.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_uint8 as u8
from ctypes import c_uint16 as u16
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64

from pyvmm.errors import ConfigError
from pyvmm.memory import PAGE_SIZE, GuestMemory
from pyvmm.x86 import layout
from pyvmm.x86.image import SETUP_HEADER_MAX_END, Kernel

SETUP_HEADER_OFFSET = 0x1F1
"""The offset of the next member of boot_params: no setup header can be longer."""

BOOT_FLAG = 0xAA55
HEADER_MAGIC = b"HdrS"
LOADED_HIGH = 1 << 0
LOADER_TYPE_UNDEFINED = 0xFF
VID_MODE_NORMAL = 0xFFFF

E820_TYPE_RAM = 1
E820_TYPE_RESERVED = 2

_ELF_PROTOCOL = 0x020C
_ELF_ALIGNMENT = 0x100_0000
_TSS_PAGES = 3


class SetupHeader(ctypes.LittleEndianStructure):
    """struct setup_header, from offset 0x1f1 of a bzImage and of boot_params."""

    __slots__ = ()
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [
        ("setup_sects", u8),
        ("root_flags", u16),
        ("syssize", u32),
        ("ram_size", u16),
        ("vid_mode", u16),
        ("root_dev", u16),
        ("boot_flag", u16),
        ("jump", u16),
        ("header", u32),
        ("version", u16),
        ("realmode_swtch", u32),
        ("start_sys_seg", u16),
        ("kernel_version", u16),
        ("type_of_loader", u8),
        ("loadflags", u8),
        ("setup_move_size", u16),
        ("code32_start", u32),
        ("ramdisk_image", u32),
        ("ramdisk_size", u32),
        ("bootsect_kludge", u32),
        ("heap_end_ptr", u16),
        ("ext_loader_ver", u8),
        ("ext_loader_type", u8),
        ("cmd_line_ptr", u32),
        ("initrd_addr_max", u32),
        ("kernel_alignment", u32),
        ("relocatable_kernel", u8),
        ("min_alignment", u8),
        ("xloadflags", u16),
        ("cmdline_size", u32),
        ("hardware_subarch", u32),
        ("hardware_subarch_data", u64),
        ("payload_offset", u32),
        ("payload_length", u32),
        ("setup_data", u64),
        ("pref_address", u64),
        ("init_size", u32),
        ("handover_offset", u32),
        ("kernel_info_offset", u32),
    ]


class BootE820Entry(ctypes.LittleEndianStructure):
    """struct boot_e820_entry: ``size`` bytes at ``addr`` are of ``type``."""

    __slots__ = ()
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [("addr", u64), ("size", u64), ("type", u32)]


class BootParams(ctypes.LittleEndianStructure):
    """struct boot_params; parts that pyvmm never fills in are arrays of bytes."""

    __slots__ = ()
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [
        ("screen_info", u8 * 0x40),
        ("apm_bios_info", u8 * 0x14),
        ("_pad2", u8 * 4),
        ("tboot_addr", u64),
        ("ist_info", u8 * 0x10),
        ("acpi_rsdp_addr", u64),
        ("_pad3", u8 * 8),
        ("hd0_info", u8 * 16),
        ("hd1_info", u8 * 16),
        ("sys_desc_table", u8 * 16),
        ("olpc_ofw_header", u8 * 16),
        ("ext_ramdisk_image", u32),
        ("ext_ramdisk_size", u32),
        ("ext_cmd_line_ptr", u32),
        ("_pad4", u8 * 112),
        ("cc_blob_address", u32),
        ("edid_info", u8 * 128),
        ("efi_info", u8 * 32),
        ("alt_mem_k", u32),
        ("scratch", u32),
        ("e820_entries", u8),
        ("eddbuf_entries", u8),
        ("edd_mbr_sig_buf_entries", u8),
        ("kbd_status", u8),
        ("secure_boot", u8),
        ("_pad5", u8 * 2),
        ("sentinel", u8),
        ("_pad6", u8 * 1),
        ("hdr", SetupHeader),
        ("_pad7", u8 * (SETUP_HEADER_MAX_END - SETUP_HEADER_OFFSET - ctypes.sizeof(SetupHeader))),
        ("edd_mbr_sig_buffer", u32 * 16),
        ("e820_table", BootE820Entry * 128),
        ("_pad8", u8 * 48),
        ("eddbuf", u8 * 492),
        ("_pad9", u8 * 276),
    ]


def write_boot_params(
    memory: GuestMemory,
    kernel: Kernel,
    cmdline: str,
    initrd: tuple[int, int] | None,
    *,
    rsdp: int = 0,
) -> None:
    """Write the command line at layout.CMDLINE and the zero page at layout.BOOT_PARAMS.

    ``cmdline`` is complete, with pyvmm's own additions.  ``initrd`` comes from ``load_initrd``:
    ``(gpa, size in bytes)``.  ``rsdp`` is the address of the ACPI tables, 0 without any.
    ConfigError if the kernel cannot take the command line.
    """
    text = encode_cmdline(cmdline, kernel)
    page = bytearray(ctypes.sizeof(BootParams))
    if kernel.setup_header is not None:
        end = SETUP_HEADER_OFFSET + len(kernel.setup_header)
        page[SETUP_HEADER_OFFSET:end] = kernel.setup_header
    params = BootParams.from_buffer(page)
    params.acpi_rsdp_addr = rsdp
    if kernel.setup_header is None:
        _fill_elf_header(params.hdr, kernel)
    _fill_header(params.hdr)
    if initrd is not None:
        gpa, size_bytes = initrd
        params.hdr.ramdisk_image = gpa & 0xFFFF_FFFF
        params.ext_ramdisk_image = gpa >> 32
        params.hdr.ramdisk_size = size_bytes & 0xFFFF_FFFF
        params.ext_ramdisk_size = size_bytes >> 32
    entries = e820_map([(region.gpa, region.length) for region in memory.regions])
    params.e820_entries = len(entries)
    for slot, entry in zip(params.e820_table, entries, strict=False):
        slot.addr, slot.size, slot.type = entry
    memory.write(layout.CMDLINE, text + b"\0")
    memory.write(layout.BOOT_PARAMS, page)


def e820_map(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Return the memory map as ``(address, size in bytes, type)``, ascending.

    The first region is RAM below 4 GiB, from address 0, with the BIOS hole cut out of it; the rest
    lies above.  The pages that KVM on Intel takes for itself are reserved, so that Linux gives them
    to no device.
    """
    (low_gpa, low_length), *high = ranges
    kvm_end = layout.TSS + _TSS_PAGES * PAGE_SIZE
    return [
        (0, layout.LOW_RAM_END, E820_TYPE_RAM),
        (layout.LOW_RAM_END, layout.HIGH_RAM_START - layout.LOW_RAM_END, E820_TYPE_RESERVED),
        (layout.HIGH_RAM_START, low_gpa + low_length - layout.HIGH_RAM_START, E820_TYPE_RAM),
        (layout.IDENTITY_MAP, kvm_end - layout.IDENTITY_MAP, E820_TYPE_RESERVED),
        *((gpa, length, E820_TYPE_RAM) for gpa, length in high),
    ]


def encode_cmdline(cmdline: str, kernel: Kernel) -> bytes:
    """Return ``cmdline`` as bytes without a NUL; ConfigError if ``kernel`` cannot take it."""
    for position, character in enumerate(cmdline):
        if character == "\0" or not character.isascii():
            raise ConfigError("the command line", f"has {character!a} at position {position}; "
                              "only ASCII without NUL can be passed to a kernel")
    if len(cmdline) > kernel.cmdline_limit:
        raise ConfigError("the command line", f"{len(cmdline)} bytes are too long: the"
                          f" limit of kernel {kernel.path} is {kernel.cmdline_limit}")
    return cmdline.encode("ascii")


def _fill_elf_header(hdr: SetupHeader, kernel: Kernel) -> None:
    """Fill in the least that a kernel without a setup header of its own expects."""
    hdr.boot_flag = BOOT_FLAG
    hdr.header = int.from_bytes(HEADER_MAGIC, "little")
    hdr.version = _ELF_PROTOCOL
    hdr.kernel_alignment = _ELF_ALIGNMENT
    hdr.cmdline_size = kernel.cmdline_limit


def _fill_header(hdr: SetupHeader) -> None:
    """Fill in the fields that a boot loader must (boot.rst, "The real-mode kernel header")."""
    hdr.vid_mode = VID_MODE_NORMAL
    hdr.type_of_loader = LOADER_TYPE_UNDEFINED
    # CAN_USE_HEAP and the rest are for the real-mode code, which never runs.
    hdr.loadflags = LOADED_HIGH
    hdr.cmd_line_ptr = layout.CMDLINE
    # The file's own values here would be addresses that mean nothing in this machine.
    hdr.setup_data = 0
    hdr.ramdisk_image = hdr.ramdisk_size = 0
