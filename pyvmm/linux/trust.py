"""Make sure that only this user and root can change a file or directory, or refuse it.

The cache holds kernels that are booted with the host's files as their root, and configurations that
are believed.  So no other user may be able to plant any of it: in a cache below /tmp, in a shared
one, in another user's home.  Everything that reads or writes the cache comes here.  Each refusal is
a HostError that names the path, its owner or mode, and a remedy.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator

from pyvmm.errors import HostError

MAX_LINKS = 40
"""Symbolic links on the way to one path, as many as Linux follows."""
REMEDY = "set PYVMM_CACHE to a directory of your own"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def check_directory(path: str | os.PathLike[str]) -> None:
    """Refuse ``path`` if another user could replace it, or its contents.

    Every directory and symbolic link from ``/`` on must belong to this user or root, and no other
    user may write there.  A sticky directory such as /tmp will do, because there nobody can rename
    another user's file.  The part of ``path`` that is not there yet is not judged.
    """
    here, links = "/", 0
    rest = [part for part in os.path.join(os.getcwd(), path).split("/") if part not in ("", ".")]
    _check_entry("/", os.lstat("/"))
    while rest:
        name = rest.pop(0)
        if name == "..":
            here = os.path.dirname(here)
            continue
        step = os.path.join(here, name)
        try:
            status = os.lstat(step)
        except FileNotFoundError:
            return
        except OSError as error:
            raise HostError(f"{step}: {error.strerror}; {REMEDY}") from error
        _check_entry(step, status, is_last=not rest)
        if not stat.S_ISLNK(status.st_mode):
            here = step
            continue
        links += 1
        if links > MAX_LINKS:
            raise HostError(f"{path}: more than {MAX_LINKS} symbolic links lead there; {REMEDY}")
        target = os.readlink(step)
        here = "/" if target.startswith("/") else here
        rest[:0] = [part for part in target.split("/") if part not in ("", ".")]


def make_directory(path: str | os.PathLike[str]) -> None:
    """Make ``path`` and its missing parents, writable only by this user.

    Refuses what ``check_directory`` refuses; OSError if it cannot be made.
    """
    check_directory(path)
    missing, place = [], os.path.abspath(path)
    while not os.path.lexists(place):
        missing.append(place)
        place = os.path.dirname(place)
    for place in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another run's, or planted: checked below
            os.mkdir(place, 0o755)
    check_directory(path)
    if not os.path.isdir(path):
        raise NotADirectoryError(20, "Not a directory", os.fspath(path))


def check_tree(path: str | os.PathLike[str]) -> None:
    """Refuse the directory ``path`` of the cache unless it, and all in it, is ours or root's."""
    place = os.fspath(path)
    status = os.lstat(place)
    _check_entry(place, status)
    if stat.S_ISLNK(status.st_mode) or not stat.S_ISDIR(status.st_mode):
        raise HostError(f"{place}: is {_kind(status.st_mode)} where a directory of the cache "
                        f"should be; remove it, or {REMEDY}")
    for folder, folders, files in os.walk(place):
        for name in folders + files:
            entry = os.path.join(folder, name)
            _check_entry(entry, os.lstat(entry))


def check_file(path: str | os.PathLike[str]) -> None:
    """Refuse ``path`` of the cache unless it is a regular file of ours or root's."""
    place = os.fspath(path)
    _check_regular(place, os.lstat(place))


def open_lock(path: str | os.PathLike[str]) -> int:
    """Open the lock file ``path``, made if it is missing; return a descriptor for flock(2).

    It is never written, so a link planted in its place could not harm the file behind it.  Such a
    link is refused all the same.  Other users cannot open a new lock file, and so not hold it.
    OSError.
    """
    place = os.fspath(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    with contextlib.suppress(FileNotFoundError):
        # Checked before it is opened too: fs.protected_regular makes open(2) fail without a reason.
        _check_regular(place, os.lstat(place))
    fd = os.open(place, flags, 0o600)
    try:
        _check_regular(place, os.fstat(fd))
    except HostError:
        os.close(fd)
        raise
    return fd


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], mode: int = 0o644) -> Iterator[str]:
    """Yield the name of a new empty file, which replaces ``path`` when the context is left.

    Readers see all of it or nothing.  Its name cannot be guessed, and it is made with O_EXCL, so
    that nothing planted is written to.  If an exception leaves the context, ``path`` stays.
    OSError.
    """
    folder, name = os.path.split(os.fspath(path))
    temporary = os.path.join(folder, f".{name}.{os.urandom(8).hex()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    os.close(os.open(temporary, flags, mode))
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def writable_by_us_alone() -> Iterator[None]:
    """Let no other user write the files that this process and its programs make meanwhile."""
    before = os.umask(0o022)
    try:
        os.umask(before | 0o022)
        yield
    finally:
        os.umask(before)


def _check_regular(path: str, status: os.stat_result) -> None:
    _check_entry(path, status)
    if not stat.S_ISREG(status.st_mode):
        raise HostError(f"{path}: is {_kind(status.st_mode)} where a file of the cache should be; "
                        f"remove it, or {REMEDY}")
    if status.st_nlink > 1:
        raise HostError(f"{path}: is another file too ({status.st_nlink} hard links); remove it, "
                        f"or {REMEDY}")


def _check_entry(path: str, status: os.stat_result, *, is_last: bool = True) -> None:
    """Refuse a file, directory or link that another user owns or may write."""
    trusted = {0, os.geteuid()}
    if not is_last:
        # In a user namespace without a name for root, root has another number, as "/" shows.
        trusted.add(os.lstat("/").st_uid)
    if status.st_uid not in trusted and path != "/":
        hint = ", or sudo -H" if os.geteuid() == 0 else ""
        raise HostError(f"{path}: belongs to {_user(status.st_uid)}, who could change what pyvmm "
                        f"runs from there; {REMEDY}{hint}")
    if stat.S_ISLNK(status.st_mode) or not status.st_mode & _OTHERS_WRITE:
        return
    if stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX:
        return
    if status.st_mode & stat.S_IWOTH or not _is_private_group(path, status):
        mode = stat.S_IMODE(status.st_mode)
        raise HostError(f"{path}: others may write there (mode {mode:04o}), and so change "
                        f"what pyvmm runs; run: chmod go-w {path}, or {REMEDY}")


def _is_private_group(path: str, status: os.stat_result) -> bool:
    """True if only its owner is in the group, as in the group that useradd makes for each user."""
    import grp
    import pwd

    try:
        owner, group = pwd.getpwuid(status.st_uid), grp.getgrgid(status.st_gid)
    except KeyError:
        return False
    try:
        os.getxattr(path, "system.posix_acl_access", follow_symlinks=False)
    except OSError:
        only_member = set(group.gr_mem) <= {owner.pw_name}
        return only_member and owner.pw_gid == group.gr_gid and owner.pw_name == group.gr_name
    return False  # with an access control list these bits are for the users that it names


def _user(uid: int) -> str:
    import pwd

    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def _kind(mode: int) -> str:
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a directory", stat.S_IFLNK: "a symbolic link",
             stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
