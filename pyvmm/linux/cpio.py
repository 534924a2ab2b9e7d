"""The archive format of an initramfs."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable


def pack_cpio(entries: Iterable[tuple[str, int, bytes]]) -> bytes:
    """Return a "newc" archive of ``(name, mode, contents)`` entries.

    Documentation/driver-api/early-userspace/buffer-format.rst: a header of thirteen 8-digit
    hexadecimal fields, name and contents each padded to 4 bytes.
    """
    archive = bytearray()
    for inode, (name, mode, contents) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        path = os.fsencode(name) + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        fields = (inode, mode, 0, 0, links, 0, len(contents), 0, 0, 0, 0, len(path), 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields)
        archive += path
        archive += bytes(-len(archive) % 4)
        archive += contents
        archive += bytes(-len(archive) % 4)
    return bytes(archive)
