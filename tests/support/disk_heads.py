"""The first bytes of disks: file systems and partition tables, as their documents have them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

HEAD_BYTES = 0x11000
EXT_MAGIC, EXT4_EXTENTS, EXT_HAS_JOURNAL = b"\x53\xef", 0x40, 0x4
SQUASHFS_COMPRESSORS: Mapping[str, int] = MappingProxyType(
    {"ZLIB": 1, "LZMA": 2, "LZO": 3, "XZ": 4, "LZ4": 5, "ZSTD": 6}
)
MAGICS: Mapping[str, tuple[int, bytes]] = MappingProxyType({
    "xfs": (0, b"XFSB"),
    "squashfs": (0, b"hsqs"),
    "cramfs": (0, (0x28CD3D45).to_bytes(4, "little")),
    "romfs": (0, b"-rom1fs-"),
    "erofs": (1024, (0xE0F5E1E2).to_bytes(4, "little")),
    "f2fs": (1024, (0xF2F52010).to_bytes(4, "little")),
    "jfs": (0x8000, b"JFS1"),
    "iso9660": (0x8001, b"CD001"),
    "btrfs": (0x10040, b"_BHRfS_M"),
})


def put(head: bytearray, offset: int, data: bytes) -> None:
    head[offset : offset + len(data)] = data


def file_system(name: str, compressor: str = "ZLIB") -> bytes:
    """The start of a file system; ``compressor`` is a squashfs's."""
    head = bytearray(HEAD_BYTES)
    if name.startswith("ext"):
        put(head, 0x438, EXT_MAGIC)
        head[0x45C] = 0 if name == "ext2" else EXT_HAS_JOURNAL
        head[0x460] = EXT4_EXTENTS if name == "ext4" else 0
    else:
        put(head, *MAGICS[name])
    if name == "squashfs":
        put(head, 20, SQUASHFS_COMPRESSORS[compressor].to_bytes(2, "little"))
    return bytes(head)


def dos_disk(partition: int, start_sector: int, content: bytes = b"") -> bytes:
    """A disk with an MBR and one partition, ``content``."""
    head = bytearray(HEAD_BYTES)
    entry = 446 + (partition - 1) * 16
    head[entry + 4] = 0x83
    put(head, entry + 8, start_sector.to_bytes(4, "little") + b"\0\x10\0\0")
    put(head, 510, b"\x55\xaa")
    return _with_content(head, start_sector, content)


def gpt_disk(partition: int, start_sector: int, content: bytes = b"") -> bytes:
    """A disk with a GPT and one partition, ``content``."""
    head = bytearray(HEAD_BYTES)
    put(head, 446, b"\0\0\0\0\xee")
    put(head, 510, b"\x55\xaaEFI PART")
    put(head, 512 + 72, (2).to_bytes(8, "little") + (128).to_bytes(4, "little") * 2)
    entry = 1024 + (partition - 1) * 128
    put(head, entry, bytes(range(32)) + start_sector.to_bytes(8, "little"))
    return _with_content(head, start_sector, content)


def _with_content(head: bytearray, start_sector: int, content: bytes) -> bytes:
    return bytes(head).ljust(start_sector * 512, b"\0")[: start_sector * 512] + content \
        if content else bytes(head)
