"""Which file system is on a disk, told by its superblock."""

from __future__ import annotations

HEAD_BYTES = 0x11000
"""How much of a disk's start ``detect`` wants to see; less is fine and tells less."""

# Offset and contents of magic numbers; ext2, 3 and 4 share one.
_MAGICS = (
    (0x0, b"XFSB", "xfs"),
    (0x0, b"hsqs", "squashfs"),
    (0x400, b"\xe2\xe1\xf5\xe0", "erofs"),
    (0x400, b"\x10\x20\xf5\xf2", "f2fs"),
    (0x10040, b"_BHRfS_M", "btrfs"),
)
_EXT_MAGIC_OFFSET, _EXT_MAGIC = 0x438, b"\x53\xef"
_EXT_COMPAT_OFFSET, _EXT_INCOMPAT_OFFSET = 0x45C, 0x460
_EXT_HAS_JOURNAL = 0x4
_EXT4_ONLY = 0x40 | 0x80 | 0x200
"""Extents, 64 bits, flexible block groups: what ext2 and ext3 do not have."""


def detect(head: bytes) -> str | None:
    """The file system of a disk that starts with ``head``; None for another, or a partition table.

    The names are the kernel's, and the keys of ``requirements.FILE_SYSTEMS``.
    """
    for offset, magic, name in _MAGICS:
        if head[offset : offset + len(magic)] == magic:
            return name
    if head[_EXT_MAGIC_OFFSET : _EXT_MAGIC_OFFSET + 2] != _EXT_MAGIC:
        return None
    if int.from_bytes(head[_EXT_INCOMPAT_OFFSET : _EXT_INCOMPAT_OFFSET + 4], "little") & _EXT4_ONLY:
        return "ext4"
    compatible = int.from_bytes(head[_EXT_COMPAT_OFFSET : _EXT_COMPAT_OFFSET + 4], "little")
    return "ext3" if compatible & _EXT_HAS_JOURNAL else "ext2"
