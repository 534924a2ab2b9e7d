"""A tree as an initramfs: a gzipped "newc" archive."""

from __future__ import annotations

import gzip
import os
import stat
from pathlib import Path

from pyvmm.linux.images.tree import Entry, Tree

_CONSOLE = Entry(mode=stat.S_IFCHR | 0o600, device=(5, 1))


def write(tree: Tree, image: Path, time_s: int | None) -> None:
    """Write the archive of ``tree`` to ``image``; every file has ``time_s``, or its own time."""
    # The kernel opens /dev/console before init can mount devtmpfs on an initramfs.
    entries = {"dev": Entry(mode=stat.S_IFDIR | 0o755), "dev/console": _CONSOLE} | tree.entries
    archive = bytearray()
    for inode, (name, entry) in enumerate(entries.items(), 1):
        place, data, mtime = tree.root / name, b"", time_s or 0
        if stat.S_ISLNK(entry.mode):
            data = os.fsencode(os.readlink(place))
        elif stat.S_ISREG(entry.mode):
            data = place.read_bytes()
        if time_s is None and os.path.lexists(place):
            mtime = int(place.lstat().st_mtime)
        archive += cpio_entry(name, entry, data, time_s=mtime, inode=inode)
    archive += cpio_entry("TRAILER!!!", Entry(mode=0), b"", time_s=0, inode=0)
    image.write_bytes(gzip.compress(archive, 6, mtime=0))


def cpio_entry(name: str, entry: Entry, data: bytes, *, time_s: int, inode: int) -> bytes:
    """Return a member of a "new ASCII" cpio archive (Documentation/driver-api/early-userspace)."""
    encoded = os.fsencode(name) + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (inode, entry.mode, entry.uid, entry.gid, links, max(0, time_s), len(data), 0, 0,
              *entry.device, len(encoded), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
