"""Open a snapshot's directory: every file is what ``state`` says, and so is every base."""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from pyvmm.errors import SnapshotError, StateError
from pyvmm.ram.image import RamImage
from pyvmm.snapshot.files import layout
from pyvmm.snapshot.files.content import (
    About,
    Base,
    SavedDisk,
    SavedRam,
    read_disks,
    read_files,
)
from pyvmm.snapshot.files.records import MAX_STATE_BYTES, decode

_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_KINDS = {
    stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device", stat.S_IFBLK: "a block device",
    stat.S_IFLNK: "a symbolic link",
}  # fmt: skip


class Saved:
    """A snapshot's directory, checked and open; a context manager.

    ``records`` has all records by name, ``path`` is absolute.  The descriptors are read-only and
    belong to this object.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.records: dict[str, object] = {}
        self.about = About()
        self.ram = SavedRam(regions=())
        self.ram_fd = -1
        self.disks: tuple[SavedDisk, ...] = ()
        self.overlay_fds: dict[int, int] = {}
        """By the disk's index."""
        self.crcs: dict[str, int] = {}
        """CRCs of the overlays, by name (``sparse.sparse_crc``)."""
        self.base: Saved | None = None
        self.base_record: Base | None = None
        self.names: tuple[str, ...] = ()
        """All files in the directory."""

    @property
    def id(self) -> bytes:
        """The 16 bytes of the snapshot's UUID."""
        return self.about.id

    @property
    def chain(self) -> list[Saved]:
        """This snapshot and its bases, the full one first."""
        return [*(self.base.chain if self.base is not None else ()), self]

    @property
    def ram_layers(self) -> list[tuple[int, tuple[tuple[int, int], ...] | None]]:
        """The file ``ram`` of each snapshot of ``chain``, as a descriptor, and its runs."""
        return [(one.ram_fd, one.ram.runs) for one in self.chain]

    def path_of(self, name: str) -> str:
        """Return the path of the file ``name`` in the directory."""
        return os.path.join(self.path, name)

    def overlay_path(self, index: int) -> str | None:
        """Return the path of what disk ``index`` has over its file; None if that is nothing."""
        return self.path_of(layout.overlay_name(index)) if index in self.overlay_fds else None

    def open_ram(self) -> RamImage:
        """Return the image of RAM, of this snapshot over its bases; SnapshotError.

        The caller closes it; it remains when this object is closed.
        """
        first, *diffs = self.chain
        image = RamImage.open_file(first.path_of(layout.RAM), self.ram.size_bytes)
        for diff in diffs:
            with image:
                image = image.over(diff.path_of(layout.RAM), diff.ram.runs or ())
        return image

    def record(self, name: str) -> object:
        """Return a record; SnapshotError if there is none of that name."""
        if name not in self.records:
            raise SnapshotError(self.path_of(layout.STATE), f"has no record {name!r}")
        return self.records[name]

    def close(self) -> None:
        """Close all files, and the bases; idempotent."""
        fds = [*self.overlay_fds.values(), self.ram_fd]
        self.overlay_fds, self.ram_fd = {}, -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)
        base, self.base = self.base, None
        if base is not None:
            base.close()

    def __enter__(self) -> Saved:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def open_saved(path: str | os.PathLike[str]) -> Saved:
    """Return the snapshot in the directory ``path``, with all its bases.

    ``path`` itself may be a symbolic link to the directory: it is followed once, here, so that a
    link that is changed later mixes nothing.  No other link is followed: not those of the files,
    nor that of a base.

    SnapshotError, naming the file and what is wrong with it.  Checked are the CRCs of ``state``
    and kinds and sizes of all files, not the contents of ``ram`` (``check`` reads it).
    """
    place = layout.absolute(path)
    top = saved = _open_one(os.path.realpath(place) if os.path.islink(place) else place)
    try:
        seen = {saved.id}
        while saved.base_record is not None:
            where = saved.base_record.resolve(saved.path)
            if len(seen) == layout.MAX_CHAIN:
                raise SnapshotError(
                    top.path, f"has more than {layout.MAX_CHAIN - 1} bases; pyvmm snapshot merge "
                    "makes one snapshot of a chain",
                )
            try:
                base = _open_one(where)
            except SnapshotError as error:
                raise SnapshotError(
                    saved.path, f"its base cannot be used: {error}"
                ) from error
            saved.base = base
            _check_base(saved, saved.base_record, base, seen)
            seen.add(base.id)
            saved = base
    except BaseException:
        top.close()
        raise
    return top


def _check_base(saved: Saved, record: Base, base: Saved, seen: set[bytes]) -> None:
    if base.id != record.id:
        raise SnapshotError(
            saved.path, f"its base {base.path} is another snapshot than the one it was made over"
        )
    if base.id in seen:
        raise SnapshotError(saved.path, f"its bases go round in a circle: {base.path} comes twice")
    if base.ram.regions != saved.ram.regions:
        raise SnapshotError(saved.path, f"its base {base.path} has another RAM")


def _open_one(path: str) -> Saved:
    folder = _open_directory(path)
    saved = Saved(path)
    try:
        saved.names = tuple(sorted(os.listdir(folder)))
        name = os.path.join(path, layout.STATE)
        data = _read_state(folder, path)
        saved.records = decode(data, name=name, versions=layout.RECORDS)
        try:
            saved.about = About.read(saved.record("about"))
            saved.ram = SavedRam.read(saved.record("ram"))
            saved.disks = read_disks(saved.record("disks"))
            saved.crcs = read_files(saved.records.get(layout.FILES))
            saved.base_record = Base.read(saved.record("base"))
            if (saved.base_record is None) != (saved.ram.runs is None):
                raise StateError("ram", "runs must be there exactly if there is a base")
        except StateError as error:
            raise SnapshotError(name, f"record {error.part}: {error.problem}") from None
        saved.ram_fd = _open_file(folder, path, layout.RAM, saved.ram.size_bytes)
        for disk in saved.disks:
            if disk.overlay_bytes is not None:
                saved.overlay_fds[disk.index] = _open_file(
                    folder, path, layout.overlay_name(disk.index), disk.overlay_bytes
                )
        wanted = {layout.STATE, layout.RAM, *map(layout.overlay_name, saved.overlay_fds)}
        for extra in saved.names:
            if extra not in wanted and layout.is_file_name(extra):
                raise SnapshotError(f"{path}/{extra}", "does not belong to this snapshot, whose "
                                    f"{layout.STATE} knows of no such file")
    except OSError as error:
        saved.close()
        raise SnapshotError(path, f"cannot be read: {error.strerror}") from error
    except BaseException:
        saved.close()
        raise
    finally:
        os.close(folder)
    return saved


def _open_directory(path: str) -> int:
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise SnapshotError(path, _directory_problem(path, error)) from error
    if path.endswith(layout.TEMPORARY):
        problem = "is an unfinished snapshot; the process that made it has ended: remove it"
        try:
            fcntl.flock(folder, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = "is an unfinished snapshot, which a process still writes"
        except OSError:
            problem = "is an unfinished snapshot"
        finally:
            os.close(folder)
        raise SnapshotError(path, problem)
    return folder


def _directory_problem(path: str, error: OSError) -> str:
    """Return the words for ``error`` of opening the directory ``path``."""
    if error.errno == errno.ENOENT:
        if os.path.lexists(path + layout.TEMPORARY):
            return f"no such directory; {path}{layout.TEMPORARY} is an unfinished snapshot"
        return "no such directory"
    if error.errno in (errno.ENOTDIR, errno.ELOOP):
        if os.path.islink(path):
            return "is a symbolic link; name the directory itself"
        return "is no directory, and a snapshot is one"
    if error.errno == errno.EACCES:
        return "cannot be opened: a snapshot is private to the user who made it, and to root"
    return f"cannot be opened: {error.strerror}"


def _open_file(folder: int, path: str, name: str, size_bytes: int | None) -> int:
    """Return a descriptor of the regular file ``name``, of ``size_bytes``; SnapshotError."""
    subject = os.path.join(path, name)
    try:
        fd = os.open(name, _FILE, dir_fd=folder)
    except FileNotFoundError:
        what = "is missing: the directory is no snapshot" if name == layout.STATE else "is missing"
        raise SnapshotError(subject, what) from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise SnapshotError(
                subject, "is a symbolic link; a snapshot's files are regular files"
            ) from None
        raise SnapshotError(subject, f"cannot be opened: {error.strerror}") from error
    found = os.fstat(fd)
    problem = ""
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something special")
        problem = f"is {kind}, no regular file"
    elif size_bytes is not None and found.st_size != size_bytes:
        problem = f"has {found.st_size} bytes instead of {size_bytes}"
    if problem:
        os.close(fd)
        raise SnapshotError(subject, problem)
    return fd


def _read_state(folder: int, path: str) -> bytes:
    fd = _open_file(folder, path, layout.STATE, None)
    try:
        size = os.fstat(fd).st_size
        if size > MAX_STATE_BYTES:
            raise SnapshotError(
                os.path.join(path, layout.STATE),
                f"has {size} bytes, the limit is {MAX_STATE_BYTES}",
            )
        pieces = []
        left = size
        while left and (piece := os.read(fd, left)):
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)
    finally:
        os.close(fd)
