"""A tar archive as the tree of an image: unpacked without root, its owners and devices noted.

The archive is not trusted to stay where it is unpacked: names are resolved as in a chroot.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from pyvmm.errors import ConfigError
from pyvmm.linux.host import find_tool
from pyvmm.linux.images.tree import Entry, Tree, resolve, with_files

_ZSTD = b"\x28\xb5\x2f\xfd"
_KINDS = {tarfile.DIRTYPE: stat.S_IFDIR, tarfile.SYMTYPE: stat.S_IFLNK,
          tarfile.CHRTYPE: stat.S_IFCHR, tarfile.BLKTYPE: stat.S_IFBLK,
          tarfile.FIFOTYPE: stat.S_IFIFO}


def unpack(archive: str, root: Path) -> Tree:
    """Unpack ``archive`` ("-" is standard input) into the empty directory ``root``.

    It may be packed by gzip, bzip2, xz or zstd.  ConfigError if it is damaged or no archive.
    """
    tree = Tree(root=root)
    try:
        with _opened(archive) as stream, tarfile.open(fileobj=stream, mode="r|*") as members:
            for member in members:
                _add(tree, members, member, archive)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise ConfigError(archive, f"is no tar archive, or is damaged: {error}") from error
    if not tree.entries:
        raise ConfigError(archive, "has no files in it")
    return with_files(tree, ())


@contextlib.contextmanager
def _opened(archive: str) -> Iterator[IO[bytes]]:
    if archive == "-":
        yield sys.stdin.buffer
        return
    try:
        file = Path(archive).open("rb", buffering=0)  # noqa: SIM115 - the context of this function
    except OSError as error:
        raise ConfigError(archive, str(error.strerror)) from error
    with file:
        if file.read(4) != _ZSTD:
            file.seek(0)
            yield file
            return
        file.seek(0)
        with subprocess.Popen(
            [find_tool("zstd", "zstd", f"{archive} is packed by it"), "-dcq"], stdin=file,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        ) as process:
            assert process.stdout is not None, "a pipe was asked for"
            yield process.stdout


def _add(
    tree: Tree, members: tarfile.TarFile, member: tarfile.TarInfo, archive: str
) -> None:
    """Put one member of the archive into ``tree``."""
    pure = PurePosixPath(member.name)
    if pure.is_absolute():
        pure = pure.relative_to("/")
    if ".." in pure.parts:
        raise ConfigError(archive, f"{member.name!r} would be outside the image")
    if not pure.parts:
        return  # the root itself
    parent = resolve(tree.root, str(pure.parent))
    if parent is None:
        raise ConfigError(archive, f"{member.name!r} is below a link that leads nowhere")
    _make_parents(tree, parent)
    place = parent / pure.name
    if place.is_symlink() or (place.exists() and not (member.isdir() and place.is_dir())):
        _remove(tree, place)
    name = str(place.relative_to(tree.root))
    if member.islnk():
        _link(tree, member, place, archive)
        return
    kind = stat.S_IFREG if member.isreg() else _KINDS.get(member.type)
    if kind is None:
        raise ConfigError(archive, f"{member.name!r} is of an unknown kind")
    mode = 0o777 if kind == stat.S_IFLNK else member.mode & 0o7777
    entry = Entry(mode=kind | mode, uid=member.uid, gid=member.gid,
                  device=(member.devmajor, member.devminor) if member.isdev() else (0, 0))
    if kind == stat.S_IFDIR:
        place.mkdir(exist_ok=True)
    elif kind == stat.S_IFLNK:
        place.symlink_to(member.linkname)
    elif kind == stat.S_IFREG:
        with place.open("wb") as file:
            source = members.extractfile(member)
            assert source is not None, "a regular file has contents"
            shutil.copyfileobj(source, file)
        os.utime(place, (member.mtime, member.mtime))
    tree.entries[name] = entry
    _restore(place, entry)


def _link(tree: Tree, member: tarfile.TarInfo, place: Path, archive: str) -> None:
    """Make the hard link ``member``; ConfigError if what it links to is not there."""
    old = PurePosixPath("/", member.linkname).relative_to("/")
    folder = resolve(tree.root, str(old.parent))
    target = folder / old.name if folder is not None else tree.root
    known = tree.entries.get(str(target.relative_to(tree.root)))
    if ".." in old.parts or known is None or stat.S_ISDIR(known.mode):
        raise ConfigError(archive, f"{member.name!r} is a hard link to {member.linkname!r}, "
                          "which is not there")
    if os.path.lexists(target):
        os.link(target, place, follow_symlinks=False)
    tree.entries[str(place.relative_to(tree.root))] = known


def _make_parents(tree: Tree, parent: Path) -> None:
    """Make the directories that the archive did not name, as root's."""
    missing = []
    while parent != tree.root and not parent.is_dir():
        missing.append(parent)
        parent = parent.parent
    for place in reversed(missing):
        place.mkdir()
        tree.entries[str(place.relative_to(tree.root))] = Entry(mode=stat.S_IFDIR | 0o755)


def _remove(tree: Tree, place: Path) -> None:
    """Remove what an earlier member of the same name left."""
    name = str(place.relative_to(tree.root))
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
        for other in [other for other in tree.entries if other.startswith(f"{name}/")]:
            del tree.entries[other]
    else:
        place.unlink()
    tree.entries.pop(name, None)


def _restore(place: Path, entry: Entry) -> None:
    """Give the file owner and mode of ``entry``, as far as this user may.

    It stays readable by us, or it could not be put into an image.
    """
    with contextlib.suppress(OSError):
        if os.geteuid() == 0:
            if entry.is_device:
                os.mknod(place, entry.mode, os.makedev(*entry.device))
            elif stat.S_ISFIFO(entry.mode):
                os.mkfifo(place)
            os.chown(place, entry.uid, entry.gid, follow_symlinks=False)
        if not stat.S_ISLNK(entry.mode):
            spare = 0
            if os.geteuid():
                spare = 0o700 if stat.S_ISDIR(entry.mode) else 0o600
            place.chmod(stat.S_IMODE(entry.mode) | spare)
