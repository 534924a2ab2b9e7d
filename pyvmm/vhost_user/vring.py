"""One ring of a front end: its settings so far, and its eventfds."""

from __future__ import annotations

import os
from pathlib import Path

from pyvmm.errors import PyvmmError
from pyvmm.virtio.ring.rings import first_base
from pyvmm.virtio.spec import Feature

_EVENTFD = "anon_inode:[eventfd]"
_HALF_BASE = 0xFFFF


class RefusedError(PyvmmError):
    """A well-formed request that cannot be done; the text gives the reason."""


class Vring:
    """Ring ``index``; addresses are user addresses, fds -1 while there are none.

    ``is_running`` is True while the device serves it.  ``enabled`` and the rest outlast that: the
    front end may stop a ring and start it again with only a new kick.
    """

    __slots__ = (
        "base", "call_fd", "descriptor", "device", "driver", "enabled", "err_fd", "index",
        "is_running", "kick_fd", "size",
    )

    def __init__(self, index: int) -> None:
        self.index = index
        self.is_running = False
        self.kick_fd = self.call_fd = self.err_fd = -1
        self.forget()

    def forget(self) -> None:
        """Forget everything that the front end said, but keep the eventfds."""
        self.enabled = False
        self.size = 0
        self.descriptor = self.driver = self.device = -1
        self.base: int | None = None

    @property
    def is_set_up(self) -> bool:
        """True if SET_VRING_NUM and SET_VRING_ADDR have come."""
        return self.size > 0 and self.descriptor >= 0

    def queue_base(self, features: int) -> int:
        """Return ``Queue.base`` as the front end gave it, with ``features`` negotiated.

        For a packed ring some front ends give only the lower half: the next available slot is then
        also the next used one.  That is so for every ring that was stopped with nothing in flight.
        """
        if self.base is None:
            return first_base(features)
        if features & Feature.RING_PACKED and self.base <= _HALF_BASE:
            return self.base | self.base << 16
        return self.base

    def keep_fd(self, name: str, fd: int) -> None:
        """Keep a duplicate of ``fd`` as the ring's ``name`` ("kick", "call", "err"); -1 for none.

        ``fd`` stays the caller's, and has passed ``check_eventfd``.
        """
        self.close_fd(name)
        if fd >= 0:
            copy = os.dup(fd)
            # A front end that forgets to read then does not stop us.  A wicked one can clear the
            # flag again: see ``peers/eventfds.py``.
            os.set_blocking(copy, False)
            setattr(self, f"{name}_fd", copy)

    def close_fd(self, name: str) -> None:
        """Close and forget the ring's ``name``; idempotent."""
        fd: int = getattr(self, f"{name}_fd")
        if fd >= 0:
            setattr(self, f"{name}_fd", -1)
            os.close(fd)

    def close(self) -> None:
        """Close every eventfd; idempotent."""
        for name in ("kick", "call", "err"):
            self.close_fd(name)


def check_eventfd(fd: int) -> None:
    """Raise RefusedError unless ``fd`` is an eventfd.

    Waiting on or writing to any other file could block us.
    """
    try:
        kind = str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError as error:
        kind = f"unknown ({error.strerror})"
    if kind != _EVENTFD:
        raise RefusedError(f"the file descriptor is no eventfd: it is {kind}")
