"""Build one image: collect the files, choose the size, let the tool of the file system work.

The image appears by one rename, complete; what stood in its place is kept until then.
"""

from __future__ import annotations

import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pyvmm.errors import ConfigError, HostError
from pyvmm.linux.cache import Say
from pyvmm.linux.images import (
    additions,
    archive,
    busybox_tree,
    debootstrap,
    ext,
    initramfs_file,
    other,
)
from pyvmm.linux.images.kinds import check_label, size_of
from pyvmm.linux.images.tool import Details
from pyvmm.linux.images.tree import Tree, scan, with_files

BUSYBOX_UUID = "70797669-6d6d-4000-8000-000000000001"
BUSYBOX_LABEL = "pyvmm-root"
BUSYBOX_TIME_S = 1_700_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """An image to build, from one of four sources: ``directory``, ``tar``, ``is_busybox``,
    ``suite``.

    ``added`` are pairs of a file or directory here and its absolute path in the image;
    ``programs`` are put at the same path, with their libraries.  ``size_bytes`` is None for a size
    chosen from the contents.
    """

    out: Path
    directory: Path | None = None
    tar: str = ""
    is_busybox: bool = False
    suite: str = ""
    include: tuple[str, ...] = ()
    mirror: str = ""
    kind: str = "ext4"
    size_bytes: int | None = None
    label: str = ""
    added: tuple[tuple[Path, str], ...] = ()
    programs: tuple[Path, ...] = ()
    replaces: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """An image that was built: its size, the bytes and number of its files, the path of its init
    (or "")."""

    path: Path
    kind: str
    size_bytes: int
    content_bytes: int
    files: int
    init: str


def build(request: Request, say: Say) -> Made:
    """Build the image of ``request``; ``say`` gets lines for the person who waits.

    ConfigError for a request that cannot be met, HostError for a missing or failing tool.
    """
    check(request)
    out = request.out
    mask = os.umask(0o022)  # that of the caller is for the image, not for what is in it
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
            work = Path(scratch)
            tree = _collect(request, work / "tree", work, say)
            written = work / "image"
            size_bytes = _write(request, tree, written)
            made = Made(
                path=out, kind=request.kind, size_bytes=size_bytes or written.stat().st_size,
                content_bytes=tree.content_bytes(), files=len(tree.entries),
                init=tree.init(request.kind),
            )
            written.chmod(0o666 & ~mask)
            _publish(written, out, replaces=request.replaces)
    except OSError as error:
        raise HostError(f"{error.filename or out}: {error.strerror}") from error
    finally:
        os.umask(mask)
    return made


def check(request: Request) -> None:
    """Raise ConfigError if the image must not or cannot be made, before any work is done."""
    check_label(request.kind, request.label)
    if os.path.lexists(request.out):
        _check_target(request.out, replaces=request.replaces)
    if request.directory is not None:
        if not request.directory.is_dir():
            raise ConfigError(f"--from-dir {request.directory}", "is no directory")
        inside = request.out.resolve().is_relative_to(request.directory.resolve())
        if inside:
            raise ConfigError(str(request.out), f"would be in the image: it is below "
                              f"{request.directory}; write it elsewhere")


def _check_target(out: Path, *, replaces: bool) -> None:
    if not stat.S_ISREG(out.lstat().st_mode):
        raise ConfigError(str(out), "is there, and is no regular file; choose another name")
    if not replaces:
        raise ConfigError(str(out), "is there already; --force replaces it")


def _collect(request: Request, root: Path, work: Path, say: Say) -> Tree:
    """Return the files of the image; all but those of ``directory`` alone are below ``root``."""
    extra = bool(request.added or request.programs)
    if request.directory is not None and not extra:
        return scan(request.directory)
    root.mkdir()
    if request.is_busybox:
        busybox_tree.make_tree(root, say)
        additions.add(root, request.added, request.programs)
        return scan(root)
    changed: list[str] = []
    if request.directory is not None:
        original = scan(request.directory)
        additions.add(root, [(request.directory, "/")])
        tree = Tree(root=root, entries=original.entries)
    else:
        tree, changed = _unpacked(request, root, work, say)
    return with_files(tree, [*changed, *additions.add(root, request.added, request.programs)])


def _unpacked(request: Request, root: Path, work: Path, say: Say) -> tuple[Tree, list[str]]:
    """Return the tree of an archive, and the names that were changed in it."""
    if request.tar:
        return archive.unpack(request.tar, root), []
    say(f"installing {request.suite} by mmdebstrap: a minute or two...")
    packed = work / "tree.tar"
    debootstrap.bootstrap(request.suite, packed, request.include, request.mirror)
    tree = archive.unpack(str(packed), root)
    packed.unlink()
    return tree, debootstrap.configure(root)


def _write(request: Request, tree: Tree, image: Path) -> int:
    """Write the image of ``tree``; return its size, 0 if it is as large as its contents."""
    size_bytes = size_of(request.kind, tree, request.size_bytes)
    details = Details(label=request.label)
    if request.is_busybox:
        # The same files give the same image.
        time_s = int(os.environ.get("SOURCE_DATE_EPOCH") or BUSYBOX_TIME_S)
        details = Details(
            label=request.label or BUSYBOX_LABEL, uuid=BUSYBOX_UUID, time_s=time_s
        )
    if request.kind.startswith("ext"):
        ext.write(request.kind, tree, image, size_bytes, details)
    elif request.kind == "initramfs":
        initramfs_file.write(tree, image, details.time_s)
    else:
        other.write(request.kind, tree, image, size_bytes, details)
    return size_bytes


def _publish(written: Path, out: Path, *, replaces: bool) -> None:
    """Put the finished image in its place; an image that came there meanwhile is not lost."""
    if replaces:
        os.replace(written, out)
        return
    try:
        os.link(written, out)
    except FileExistsError:
        _check_target(out, replaces=False)
    except OSError:  # a file system without links
        os.replace(written, out)
