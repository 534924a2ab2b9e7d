"""What is on a disk, told by its first bytes: a partition table, a file system."""

from __future__ import annotations

HEAD_BYTES = 0x11000
"""How much of a disk's start these functions want to see; less is fine and tells less."""

# Offset and contents of magic numbers; ext2, 3 and 4 share one.
_MAGICS = (
    (0x0, b"XFSB", "xfs"),
    (0x0, b"hsqs", "squashfs"),
    (0x0, b"\x45\x3d\xcd\x28", "cramfs"),
    (0x0, b"-rom1fs-", "romfs"),
    (0x400, b"\xe2\xe1\xf5\xe0", "erofs"),
    (0x400, b"\x10\x20\xf5\xf2", "f2fs"),
    (0x8000, b"JFS1", "jfs"),
    (0x8001, b"CD001", "iso9660"),
    (0x10040, b"_BHRfS_M", "btrfs"),
)
_EXT_MAGIC_OFFSET, _EXT_MAGIC = 0x438, b"\x53\xef"
_EXT_COMPAT_OFFSET, _EXT_INCOMPAT_OFFSET = 0x45C, 0x460
_EXT_HAS_JOURNAL = 0x4
_EXT4_ONLY = 0x40 | 0x80 | 0x200
"""Extents, 64 bits, flexible block groups: what ext2 and ext3 do not have."""

SQUASHFS_COMPRESSORS = ("", "ZLIB", "", "LZO", "XZ", "LZ4", "ZSTD")
"""By their number in the superblock (fs/squashfs/squashfs_fs.h), as the kernel's options call
them; Linux has none for 2, lzma."""
_SQUASHFS_COMPRESSOR_OFFSET = 20

_SECTOR = 512
_DOS_TABLE, _DOS_ENTRY, _DOS_ENTRIES = 446, 16, 4
_GPT_ENTRY_MIN = 128


def detect(head: bytes) -> str | None:
    """The file system of a disk that starts with ``head``; None for another, or a partition table.

    The names are the kernel's, and the keys of ``requirements.FILE_SYSTEMS``.
    """
    for offset, magic, name in _MAGICS:
        if head[offset : offset + len(magic)] == magic:
            return name
    if head[_EXT_MAGIC_OFFSET : _EXT_MAGIC_OFFSET + 2] != _EXT_MAGIC:
        return None
    if _number(head, _EXT_INCOMPAT_OFFSET, 4) & _EXT4_ONLY:
        return "ext4"
    return "ext3" if _number(head, _EXT_COMPAT_OFFSET, 4) & _EXT_HAS_JOURNAL else "ext2"


def squashfs_compressor(head: bytes) -> str:
    """What a squashfs that starts with ``head`` is packed with, "" if that is not known."""
    number = _number(head, _SQUASHFS_COMPRESSOR_OFFSET, 2)
    return SQUASHFS_COMPRESSORS[number] if number < len(SQUASHFS_COMPRESSORS) else ""


def partition_table(head: bytes) -> str:
    """The kind of a disk's partition table, ``gpt`` or ``dos``; "" if it has neither."""
    if head[_SECTOR : _SECTOR + 8] == b"EFI PART":
        return "gpt"
    if head[510:512] != b"\x55\xaa":
        return ""
    # A boot sector without a table ends so, too: in a table the first byte of an entry is a flag.
    entries = [
        head[at : at + _DOS_ENTRY]
        for at in range(_DOS_TABLE, _DOS_TABLE + _DOS_ENTRIES * _DOS_ENTRY, _DOS_ENTRY)
    ]
    is_table = all(entry[0] in (0, 0x80) for entry in entries) and any(e[4] for e in entries)
    return "dos" if is_table else ""


def partition_offset(head: bytes, number: int) -> int | None:
    """Where partition ``number`` (from 1) begins, in bytes; None if ``head`` does not tell."""
    kind = partition_table(head)
    if kind == "dos" and 1 <= number <= _DOS_ENTRIES:
        entry = _DOS_TABLE + (number - 1) * _DOS_ENTRY
        return _number(head, entry + 8, 4) * _SECTOR or None
    if kind == "gpt" and number >= 1:
        # UEFI 2.10, 5.3: where the array of entries begins, and how long each is.
        table, size = _number(head, _SECTOR + 72, 8), _number(head, _SECTOR + 84, 4)
        entry = table * _SECTOR + (number - 1) * size
        if size >= _GPT_ENTRY_MIN and entry + size <= len(head):
            return _number(head, entry + 32, 8) * _SECTOR or None
    return None


def _number(head: bytes, offset: int, length: int) -> int:
    return int.from_bytes(head[offset : offset + length], "little")
