"""The files of an image: a directory, and for each name in it mode, owner and device number.

A user without root cannot make another user's files, or devices.  So a tree notes what each entry
is in the image; the file on disk need only have the contents.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pyvmm.errors import ConfigError

MAX_LINKS = 40
INITS = ("/sbin/init", "/etc/init", "/bin/init", "/bin/sh")
"""The programs that a kernel tries on a root, in its order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One file, directory, link or device: ``mode`` has its kind too, as in ``st_mode``."""

    mode: int
    uid: int = 0
    gid: int = 0
    device: tuple[int, int] = (0, 0)

    @property
    def is_device(self) -> bool:
        """True for a character or block device."""
        return stat.S_ISCHR(self.mode) or stat.S_ISBLK(self.mode)


@dataclass(slots=True, kw_only=True)
class Tree:
    """``entries`` by path relative to ``root``, without it; parents stand before their children.

    An entry whose file is not there is a device or a pipe that this user could not make.
    """

    root: Path
    entries: dict[str, Entry] = field(default_factory=dict)

    def lost(self) -> Iterator[tuple[str, Entry, os.stat_result | None]]:
        """Yield the entries that are not so on disk: path, entry, and the file's status if any."""
        for name, entry in self.entries.items():
            try:
                found = (self.root / name).lstat()
            except FileNotFoundError:
                yield name, entry, None
                continue
            mode = found.st_mode if stat.S_ISLNK(found.st_mode) else entry.mode
            if (found.st_mode, found.st_uid, found.st_gid) != (mode, entry.uid, entry.gid):
                yield name, entry, found

    def content_bytes(self) -> int:
        """Return the bytes of all files, each rounded up to 4 KiB."""
        total, seen = 0, set()
        for name, entry in self.entries.items():
            if stat.S_ISREG(entry.mode):
                status = (self.root / name).lstat()
                if (status.st_dev, status.st_ino) not in seen:
                    total += -(-status.st_size // 4096) * 4096
                    seen.add((status.st_dev, status.st_ino))
        return total

    def init(self, kind: str) -> str:
        """Return the path of what a kernel would start as init; "" if there is none.

        In an initramfs, which is a ``kind`` too, it looks for /init first.
        """
        for name in ("/init", *INITS) if kind == "initramfs" else INITS:
            place = resolve(self.root, name)
            if place is not None and place.is_file():
                return name
        return ""


def scan(root: Path) -> Tree:
    """Return the tree of the directory ``root``.

    This user's files become root's; all others keep their owners.  Sockets are left out.
    ConfigError names a directory that cannot be read.
    """
    tree = Tree(root=root)
    mine, group = os.geteuid(), os.getegid()

    def refuse(error: OSError) -> None:
        raise ConfigError(str(error.filename or root), str(error.strerror)) from error

    for folder, folders, files in os.walk(root, onerror=refuse):
        folders.sort()
        for name in sorted(folders + files):
            path = Path(folder, name)
            found = path.lstat()
            if stat.S_ISSOCK(found.st_mode):
                continue
            if stat.S_ISREG(found.st_mode) and not os.access(path, os.R_OK):
                raise ConfigError(str(path), "cannot be read: an image needs all of its files")
            uid = 0 if found.st_uid == mine else found.st_uid
            gid = 0 if found.st_gid == group else found.st_gid
            device = (os.major(found.st_rdev), os.minor(found.st_rdev))
            tree.entries[str(path.relative_to(root))] = Entry(
                mode=found.st_mode, uid=uid, gid=gid, device=device
            )
    tree.entries = _ordered(tree.entries)
    return tree


def with_files(tree: Tree, names: Iterable[str]) -> Tree:
    """Return ``tree`` with the entries ``names``, which were written into it, as root's.

    A directory that was in the tree before keeps its owner.
    """
    entries = dict(tree.entries)
    for name in names:
        mode = (tree.root / name).lstat().st_mode
        if name not in entries or not stat.S_ISDIR(entries[name].mode):
            entries[name] = Entry(mode=mode)
    return Tree(root=tree.root, entries=_ordered(entries))


def _ordered(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Return ``entries`` with each directory before what is in it, and nothing between them."""
    return dict(sorted(entries.items(), key=lambda item: item[0].split("/")))


def resolve(root: Path, name: str) -> Path | None:
    """Return the place of ``name`` as a process with the root ``root`` sees it; None if a link on
    the way leads nowhere or in a circle.

    No part of the result but the last can be a link, so nothing outside ``root`` is reached.
    """
    rest = [part for part in name.split("/") if part not in ("", ".")]
    done: list[str] = []
    links = 0
    while rest:
        part = rest.pop(0)
        if part == "..":
            done = done[:-1]
            continue
        place = root.joinpath(*done, part)
        if place.is_symlink():
            links += 1
            if links > MAX_LINKS:
                return None
            target = os.readlink(place)
            done = [] if target.startswith("/") else done
            rest[:0] = [step for step in target.split("/") if step not in ("", ".")]
        else:
            done.append(part)
    return root.joinpath(*done)
