"""Synthetic kernels: small valid bzImage and ELF files, of which any header field can be bent.

The field tables are written down from Documentation/arch/x86/boot.rst and the System V ABI, not
taken from the package, so that they check it.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

CODE = bytes(range(256)) * 16
"""4 KiB in which every byte tells where it came from."""

# name -> (offset in the file, bytes)
SETUP_FIELDS = {
    "setup_sects": (0x1F1, 1),
    "root_flags": (0x1F2, 2),
    "syssize": (0x1F4, 4),
    "ram_size": (0x1F8, 2),
    "vid_mode": (0x1FA, 2),
    "root_dev": (0x1FC, 2),
    "boot_flag": (0x1FE, 2),
    "jump": (0x200, 2),
    "header": (0x202, 4),
    "version": (0x206, 2),
    "realmode_swtch": (0x208, 4),
    "start_sys_seg": (0x20C, 2),
    "kernel_version": (0x20E, 2),
    "type_of_loader": (0x210, 1),
    "loadflags": (0x211, 1),
    "setup_move_size": (0x212, 2),
    "code32_start": (0x214, 4),
    "ramdisk_image": (0x218, 4),
    "ramdisk_size": (0x21C, 4),
    "bootsect_kludge": (0x220, 4),
    "heap_end_ptr": (0x224, 2),
    "ext_loader_ver": (0x226, 1),
    "ext_loader_type": (0x227, 1),
    "cmd_line_ptr": (0x228, 4),
    "initrd_addr_max": (0x22C, 4),
    "kernel_alignment": (0x230, 4),
    "relocatable_kernel": (0x234, 1),
    "min_alignment": (0x235, 1),
    "xloadflags": (0x236, 2),
    "cmdline_size": (0x238, 4),
    "hardware_subarch": (0x23C, 4),
    "hardware_subarch_data": (0x240, 8),
    "payload_offset": (0x248, 4),
    "payload_length": (0x24C, 4),
    "setup_data": (0x250, 8),
    "pref_address": (0x258, 8),
    "init_size": (0x260, 4),
    "handover_offset": (0x264, 4),
    "kernel_info_offset": (0x268, 4),
}
SETUP_HEADER = 0x1F1
SETUP_HEADER_END = 0x26C

_VERSION_OFFSET = 0x300  # in the setup code, after the header


def bzimage(
    fields: Mapping[str, int] = MappingProxyType({}), /, *, code: bytes = CODE,
    version_text: bytes = b"6.1.0-synthetic", tail: bytes = b"", **more_fields: int,
) -> bytearray:
    """A bzImage that loads ``code`` at 2 MiB and needs 1 MiB there.

    Fields, given as to ``dict``, replace values of the setup header; the layout of the file stays
    what the defaults say: one setup sector beside the boot sector, then ``code``, then ``tail``.
    """
    code = code.ljust(-(-len(code) // 16) * 16, b"\0")
    values = {
        "setup_sects": 1,
        "syssize": len(code) // 16,
        "boot_flag": 0xAA55,
        "jump": 0xEB | (SETUP_HEADER_END - 0x202) << 8,
        "header": 0x53726448,
        "version": 0x020F,
        "kernel_version": _VERSION_OFFSET - 0x200,
        "loadflags": 0x01,
        "code32_start": 0x100000,
        "initrd_addr_max": 0x7FFFFFFF,
        "kernel_alignment": 2 * MIB,
        "relocatable_kernel": 1,
        "min_alignment": 21,
        "xloadflags": 0x01,
        "cmdline_size": 2047,
        "pref_address": 2 * MIB,
        "init_size": 1 * MIB,
        **fields,
        **more_fields,
    }
    image = bytearray(2 * 512)
    for name, value in values.items():
        offset, size = SETUP_FIELDS[name]
        image[offset : offset + size] = value.to_bytes(size, "little")
    image[_VERSION_OFFSET : _VERSION_OFFSET + len(version_text)] = version_text
    return image + code + tail


@dataclass(frozen=True, slots=True, kw_only=True)
class ElfSegment:
    """A program header and the bytes it stands for; None means: what fits ``data``."""

    data: bytes = CODE
    p_type: int = 1
    p_paddr: int = 2 * MIB
    p_filesz: int | None = None
    p_memsz: int | None = None
    p_offset: int | None = None


def note(name: bytes, kind: int, description: bytes) -> bytes:
    """An ELF note, padded to 4 bytes."""
    def padded(data: bytes) -> bytes:
        return data.ljust(-(-len(data) // 4) * 4, b"\0")

    head = struct.pack("<III", len(name), len(description), kind)
    return head + padded(name) + padded(description)


def pvh_note(entry: int, size: int = 8) -> bytes:
    """XEN_ELFNOTE_PHYS32_ENTRY as Linux writes it: the entry in ``size`` bytes."""
    return note(b"Xen\0", 18, entry.to_bytes(size, "little"))


def note_segment(*notes: bytes, p_filesz: int | None = None, p_offset: int | None = None,
                 ) -> ElfSegment:
    """A PT_NOTE segment of ``notes``."""
    return ElfSegment(p_type=4, data=b"".join(notes), p_paddr=0, p_filesz=p_filesz,
                      p_offset=p_offset)


ELF_HEADER = struct.Struct("<4s5B7xHHIQQQIHHHHHH")
ELF_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")


def elf(*segments: ElfSegment, **fields: int) -> bytearray:
    """An x86-64 ELF executable; by default one segment of CODE and 4 KiB of bss at 2 MiB.

    ``fields`` replace values of the ELF header, by name.  The segments' data follow the program
    headers in order.
    """
    segments = segments or (ElfSegment(p_memsz=len(CODE) + 4 * KIB),)
    values = {
        "ei_class": 2, "ei_data": 1, "ei_version": 1, "ei_osabi": 0, "ei_abiversion": 0,
        "e_type": 2, "e_machine": 62, "e_version": 1, "e_entry": segments[0].p_paddr,
        "e_phoff": ELF_HEADER.size, "e_shoff": 0, "e_flags": 0, "e_ehsize": ELF_HEADER.size,
        "e_phentsize": ELF_PROGRAM_HEADER.size, "e_phnum": len(segments),
        "e_shentsize": 0, "e_shnum": 0, "e_shstrndx": 0,
    }
    if unknown := fields.keys() - values.keys():
        raise KeyError(f"no ELF header field {unknown}")
    values.update(fields)
    image = bytearray(ELF_HEADER.pack(b"\x7fELF", *values.values()))
    data_offset = ELF_HEADER.size + len(segments) * ELF_PROGRAM_HEADER.size
    data = bytearray()
    for segment in segments:
        length = len(segment.data)
        offset = data_offset + len(data) if segment.p_offset is None else segment.p_offset
        file_bytes = length if segment.p_filesz is None else segment.p_filesz
        memory_bytes = file_bytes if segment.p_memsz is None else segment.p_memsz
        image += ELF_PROGRAM_HEADER.pack(
            segment.p_type, 7, offset, segment.p_paddr, segment.p_paddr,
            file_bytes, memory_bytes, 4096,
        )
        data += segment.data
    return image + data


def bz_with(payload: bytes, **fields: int) -> bytearray:
    """A bzImage of ``payload``, where a compressed kernel is."""
    return bzimage({"payload_offset": 0x400, "payload_length": len(payload)} | fields,
                   code=bytes(0x400) + payload)


def with_ikconfig(config: str) -> bytearray:
    """A bzImage that holds a vmlinux, gzip-compressed, that holds its configuration."""
    inside = b"IKCFG_ST" + gzip.compress(config.encode()) + b"IKCFG_ED"
    return bz_with(gzip.compress(elf(ElfSegment(
        data=b"Linux version 6.1.0-inside (who@where) #1\n\0" + inside + bytes(5000)
    ))))


_OPTIONS = """
64BIT PRINTK TTY SERIAL_8250 SERIAL_8250_CONSOLE SERIAL_8250_PNP VIRTIO_CONSOLE
SMP X86_MPPARSE ACPI PCI VIRTIO_MMIO VIRTIO_MMIO_CMDLINE_DEVICES
BLOCK VIRTIO_BLK EFI_PARTITION MSDOS_PARTITION
EXT4_FS EXT3_FS EXT2_FS XFS_FS BTRFS_FS F2FS_FS EROFS_FS ISO9660_FS JFS_FS CRAMFS ROMFS_FS
SQUASHFS SQUASHFS_ZLIB SQUASHFS_LZO SQUASHFS_XZ SQUASHFS_LZ4 SQUASHFS_ZSTD
BLK_DEV_INITRD BLK_DEV_RAM RD_GZIP RD_BZIP2 RD_LZMA RD_XZ RD_LZO RD_LZ4 RD_ZSTD
DEVTMPFS DEVTMPFS_MOUNT BINFMT_ELF BINFMT_SCRIPT
"""
OPTIONS = tuple(_OPTIONS.split())
"""All that are y or n; beside them there is NR_CPUS."""
COMPLETE_CONFIG = "".join(f"CONFIG_{name}=y\n" for name in OPTIONS) + "CONFIG_NR_CPUS=8\n"
"""A configuration with all that any guest needs."""


def lacking(*options: str) -> str:
    """COMPLETE_CONFIG without ``options``."""
    text = COMPLETE_CONFIG
    for option in options:
        assert f"CONFIG_{option}=y\n" in text
        text = text.replace(f"CONFIG_{option}=y\n", f"# CONFIG_{option} is not set\n")
    return text
