"""Tell the content of a disk or a partition by its first bytes: a file system, or something
else."""

from __future__ import annotations

HEAD_BYTES = 0x11000
"""Bytes of a disk's start for these functions; fewer are fine and tell less."""

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
"""Extents, 64 bits, flexible block groups: ext2 and ext3 do not have these."""

SQUASHFS_COMPRESSORS = ("", "ZLIB", "", "LZO", "XZ", "LZ4", "ZSTD")
"""By their number in the superblock (fs/squashfs/squashfs_fs.h), named as in the kernel's options.
Linux has none for 2, lzma."""
_SQUASHFS_COMPRESSOR_OFFSET = 20

_EXT_BLOCK_OFFSET = 0x418
_EXT_INCOMPAT_KNOWN = 0x3E7D6
"""fs/ext4/ext4.h: all but compression, an external journal and a directory's own data."""
_MAX_SHIFT = 24

# Contents that a kernel does not mount as a root by itself.
_OTHERS = (
    (0x0, b"LUKS\xba\xbe", "LUKS"),
    (0x218, b"LVM2 001", "LVM"),
    (0x1000, b"\xfc\x4e\x2b\xa9", "RAID"),
    (0xFF6, b"SWAPSPACE2", "swap"),
    (0x36, b"FAT", "vfat"),
    (0x52, b"FAT32", "vfat"),
    (0x3, b"NTFS    ", "ntfs"),
    (0x3, b"-FVE-FS-", "BitLocker"),
    (0x3, b"EXFAT   ", "exfat"),
)
# Offsets of the UUID and of the label, and the label's length.
_IDENTITIES = {
    "ext2": (0x468, 0x478, 16),
    "ext3": (0x468, 0x478, 16),
    "ext4": (0x468, 0x478, 16),
    "xfs": (0x20, 0x6C, 12),
    "btrfs": (0x10020, 0x1012B, 256),
    "erofs": (0x430, 0x440, 16),
}


def detect(head: bytes) -> str | None:
    """Return the file system of a disk that starts with ``head``.

    None for an unknown one, or a partition table.  The names are the kernel's, and the keys of
    ``requirements.FILE_SYSTEMS``.
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
    """Return the compression of a squashfs that starts with ``head``, "" if unknown."""
    number = _number(head, _SQUASHFS_COMPRESSOR_OFFSET, 2)
    return SQUASHFS_COMPRESSORS[number] if number < len(SQUASHFS_COMPRESSORS) else ""


def other_content(head: bytes) -> str:
    """Return the content of a disk or partition that ``detect`` does not know; "" if nothing tells.

    A kernel does not mount such content without help.  ``empty`` means that all of ``head`` is
    zero.
    """
    for offset, magic, name in _OTHERS:
        if head[offset : offset + len(magic)] == magic:
            return name
    return "empty" if len(head) >= HEAD_BYTES and not any(head) else ""


def identity(head: bytes, kind: str) -> tuple[str, str] | None:
    """Return ``(UUID, label)`` of a file system of ``kind``, "" for a missing one.

    None if this module does not know where such a file system has them.
    """
    if kind not in _IDENTITIES:
        return None
    uuid_at, label_at, label_bytes = _IDENTITIES[kind]
    text = head[uuid_at : uuid_at + 16].hex()
    uuid = f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
    label = head[label_at : label_at + label_bytes].split(b"\0", 1)[0]
    return uuid, label.decode("utf-8", "replace")


def block_bytes(head: bytes, kind: str) -> int:
    """Return the size of a block of a file system of ``kind``; 0 if it is not known."""
    if kind in ("ext2", "ext3", "ext4"):
        shift = _number(head, _EXT_BLOCK_OFFSET, 4)
        return 1024 << shift if shift <= _MAX_SHIFT else 0
    if kind == "xfs":
        return int.from_bytes(head[4:8], "big")
    if kind == "btrfs":
        return _number(head, 0x10090, 4)
    if kind in ("f2fs", "erofs"):
        at, length = (0x410, 4) if kind == "f2fs" else (0x40C, 1)
        shift = _number(head, at, length)
        return 1 << shift if shift <= _MAX_SHIFT else 0
    return 0


def unknown_ext_features(head: bytes) -> int:
    """Return the bits of an ext file system's incompatible features that no Linux mounts."""
    return _number(head, _EXT_INCOMPAT_OFFSET, 4) & ~_EXT_INCOMPAT_KNOWN


def _number(head: bytes, offset: int, length: int) -> int:
    return int.from_bytes(head[offset : offset + length], "little")
