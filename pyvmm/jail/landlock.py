"""Landlock: no file can be opened by its path, no socket connected, no other process signalled.

Open descriptors stay usable.  Landlock does not keep a process from asking for a file's status, or
from changing its mode or owner, by its path: an empty root (``jail.namespaces``) and the
filter do.
Source: Documentation/userspace-api/landlock.rst and <linux/landlock.h> of Linux 7.2.
"""

from __future__ import annotations

import os
import struct

from pyvmm.jail.calls import system_call

_CREATE_RULESET, _RESTRICT_SELF = 444, 446
_TELL_VERSION = 1

_FILES_BY_ABI = (
    (1, (1 << 13) - 1),  # execute, write, read, list, remove (2 rights), make (7 kinds)
    (2, 1 << 13),  # REFER: rename and link to another directory
    (3, 1 << 14),  # TRUNCATE
    (5, 1 << 15),  # IOCTL_DEV: device files that are opened later
    (9, 1 << 16),  # RESOLVE_UNIX: connect to a Unix socket by its path
)
_NETWORK_BY_ABI = (
    (4, 0b11),  # BIND_TCP, CONNECT_TCP
    (10, 0b1100),  # BIND_UDP, CONNECT_SEND_UDP
)
_SCOPES_BY_ABI = ((6, 0b11),)  # ABSTRACT_UNIX_SOCKET, SIGNAL
_ATTRIBUTES = struct.Struct("=QQQ")
"""struct landlock_ruleset_attr: files, network, scopes.  An older kernel takes more bytes if they
are zero."""


def abi() -> int:
    """Return this kernel's version of Landlock; OSError without one.

    ENOSYS: it is not built in.  EOPNOTSUPP: it was not enabled at boot.  EPERM: a sandbox around
    this process forbids it.
    """
    return system_call(_CREATE_RULESET, 0, 0, _TELL_VERSION)


def forbid_all() -> tuple[str, ...]:
    """Forbid all that this kernel's Landlock can forbid; return the names of it.  OSError.

    The ruleset has no rule, so nothing is an exception.  It is for the calling thread and for those
    that it starts later.  ``no_new_privileges`` must be in force, and one descriptor be free.
    """
    version = abi()
    attributes = _attributes(version)
    ruleset = system_call(_CREATE_RULESET, attributes, len(attributes), 0)
    try:
        system_call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return _names(version)


def _attributes(version: int) -> bytes:
    """Return the ruleset of all rights that Landlock of ``version`` knows."""
    return _ATTRIBUTES.pack(*(
        sum(rights for since, rights in table if version >= since)
        for table in (_FILES_BY_ABI, _NETWORK_BY_ABI, _SCOPES_BY_ABI)
    ))


def _names(version: int) -> tuple[str, ...]:
    """Return the names of all that Landlock of ``version`` forbids here."""
    names = ["files"]
    if version >= 4:
        names.append("TCP" if version < 10 else "TCP and UDP")
    if version >= 9:
        names.append("Unix sockets")
    elif version >= 6:
        names.append("abstract Unix sockets")
    if version >= 6:
        names.append("signals to others")
    return tuple(names)
