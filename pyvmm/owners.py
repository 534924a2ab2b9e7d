"""Tell whether another user could have made a file, or could change it: by its owner and mode.

Whoever can change a snapshot, a control socket's process, the cache or a directory of the lab
decides what pyvmm runs or shows.  Root can do so anyway, and is always trusted.  Each room says in
its own words what it refuses, and for which reason.
"""

from __future__ import annotations

import os
import stat
import struct

from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

COPY_IT = "if you trust whoever made it, make a copy of your own (cp -r) and use that"
"""The remedy for files that somebody handed over."""
_SOL_SOCKET, _SO_PEERCRED = 1, 17  # asm-generic/socket.h; socket is no module of the boot path
_UCRED = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_GROUP_OR_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def is_trusted(uid: int) -> bool:
    """True if ``uid`` is this user or root."""
    return uid in (0, os.geteuid())


def foreign_owner(status: os.stat_result, *, on_the_way: bool = False) -> str:
    """Return the name of the file's owner if that is neither this user nor root; else "".

    ``on_the_way`` is for directories that lead to a file.  The owner of ``/`` is trusted then: in a
    user namespace without a name for root, root has another number.
    """
    if is_trusted(status.st_uid) or (on_the_way and status.st_uid == os.lstat("/").st_uid):
        return ""
    return user_name(status.st_uid)


def others_may_write(place: str | int, status: os.stat_result) -> bool:
    """True if the mode lets another user write the file at ``place``, a path or a descriptor.

    A symbolic link has no mode of its own.  In a sticky directory, as /tmp is, nobody can rename
    or remove another user's file.  A group that only its owner is in is no other user.
    """
    mode = status.st_mode
    if stat.S_ISLNK(mode) or not mode & _GROUP_OR_OTHERS_WRITE:
        return False
    if stat.S_ISDIR(mode) and mode & stat.S_ISVTX:
        return False
    return bool(mode & stat.S_IWOTH) or not _is_private_group(place, status)


def problem(place: str | int, status: os.stat_result, *, on_the_way: bool = False) -> str:
    """Return how another user could change the file at ``place``, "" if none could."""
    if owner := foreign_owner(status, on_the_way=on_the_way):
        return f"belongs to {owner}"
    if others_may_write(place, status):
        return f"others may write it (mode {stat.S_IMODE(status.st_mode):04o})"
    return ""


def peer_uid(sock: socket.socket) -> int:
    """Return the user at the other end of the Unix socket ``sock``; OSError.

    The kernel noted who called connect(2), or listen(2): SO_PEERCRED of unix(7).
    """
    credentials = sock.getsockopt(_SOL_SOCKET, _SO_PEERCRED, _UCRED.size)
    uid: int = _UCRED.unpack(credentials)[1]
    return uid


def user_name(uid: int) -> str:
    """Return a user's name and number for people: "bob (uid 1000)"."""
    import pwd

    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def _is_private_group(place: str | int, status: os.stat_result) -> bool:
    """True if only its owner is in the group, as in the group that useradd makes for each user."""
    import grp
    import pwd

    try:
        owner, group = pwd.getpwuid(status.st_uid), grp.getgrgid(status.st_gid)
    except KeyError:
        return False
    try:
        if isinstance(place, int):
            os.getxattr(place, "system.posix_acl_access")
        else:
            os.getxattr(place, "system.posix_acl_access", follow_symlinks=False)
    except OSError:
        only_member = set(group.gr_mem) <= {owner.pw_name}
        return only_member and owner.pw_gid == group.gr_gid and owner.pw_name == group.gr_name
    return False  # with an access control list these bits are for the users that it names
