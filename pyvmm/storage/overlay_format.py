"""The file format of overlays (docs/disks.md, "File format, version 1")."""

from __future__ import annotations

import struct
import zlib

from pyvmm.errors import ConfigError
from pyvmm.storage.backend import SECTOR_SIZE, BlockBackend
from pyvmm.storage.bitmap import BLOCK_SIZE, PAGE_SIZE, block_count, page_count

# char magic[8]; le32 version; le32 block_size; le64 size_bytes; le64 data_offset;
# le64 base_stamp; le32 crc32, of all before it; the rest of the store's first sector is 0.
_HEADER = struct.Struct("<8sIIQQQ")
_MAGIC = b"pyvmmcow"
_VERSION = 1
BITMAP_OFFSET = 4096


def store_bytes(size_bytes: int) -> int:
    """Return the size of the store of a disk of ``size_bytes``; nearly all of it stays a hole."""
    return data_offset(size_bytes) + block_count(size_bytes) * BLOCK_SIZE


def data_offset(size_bytes: int) -> int:
    """Return where the disk's bytes begin in the store of a disk of ``size_bytes``."""
    return BITMAP_OFFSET + page_count(size_bytes) * PAGE_SIZE


def format_store(store: BlockBackend, size_bytes: int, base_stamp: int = 0) -> None:
    """Make ``store``, all zero and of ``store_bytes``, an empty one for a disk of ``size_bytes``.

    ``base_stamp`` is any number that changes when the base does: its mtime in ns.
    """
    fields = _HEADER.pack(
        _MAGIC, _VERSION, BLOCK_SIZE, size_bytes, data_offset(size_bytes), base_stamp
    )
    header = (fields + zlib.crc32(fields).to_bytes(4, "little")).ljust(SECTOR_SIZE, b"\0")
    store.writev([memoryview(header)], 0)


def load_page(store: BlockBackend, index: int) -> bytearray:
    """Return page ``index`` of the bitmap in ``store``; OSError."""
    page = bytearray(PAGE_SIZE)
    store.readv([memoryview(page)], BITMAP_OFFSET + index * PAGE_SIZE)
    return page


def holds_any(store: BlockBackend, size_bytes: int) -> bool:
    """True if ``store`` holds any block of a disk of ``size_bytes``."""
    page = bytearray(PAGE_SIZE)
    for offset in range(BITMAP_OFFSET, data_offset(size_bytes), PAGE_SIZE):
        store.readv([memoryview(page)], offset)
        if any(page):
            return True
    return False


def check_store(store: BlockBackend, size_bytes: int, name: str) -> int:
    """Return the stamp of the base; ConfigError unless ``store`` fits a disk of ``size_bytes``."""
    sector = bytearray(SECTOR_SIZE)
    try:
        store.readv([memoryview(sector)], 0)
    except OSError as error:
        raise ConfigError(name, f"cannot be read: {error.strerror}") from error
    magic, version, block_size, disk_bytes, data_at, stamp = _HEADER.unpack_from(sector)
    if magic != _MAGIC:
        from pyvmm.storage.image_kinds import kind_of_head

        kind = kind_of_head(bytes(sector))
        what = "is no overlay" if kind is None else f"is {kind.name}, no overlay"
        raise ConfigError(name, f"{what} of pyvmm's; name a file that does not exist yet")
    fields = sector[: _HEADER.size]
    checksum = int.from_bytes(sector[_HEADER.size : _HEADER.size + 4], "little")
    if checksum != zlib.crc32(fields):
        raise ConfigError(name, "has a damaged header (its checksum is wrong)")
    if version != _VERSION:
        raise ConfigError(name, f"is an overlay of version {version}; this pyvmm knows {_VERSION}")
    if disk_bytes != size_bytes:
        raise ConfigError(
            name, f"belongs to a base of {disk_bytes} bytes, and this one has {size_bytes}"
        )
    if (block_size, data_at) != (BLOCK_SIZE, data_offset(size_bytes)):
        raise ConfigError(name, "has a damaged header (it does not fit its own size)")
    if store.size_bytes < store_bytes(size_bytes):
        raise ConfigError(
            name, f"is cut off: it has {store.size_bytes} bytes of {store_bytes(size_bytes)}"
        )
    return int(stamp)
