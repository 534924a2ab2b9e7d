"""One ring of a front end: what it has said about it so far, and the eventfds it gave."""

from __future__ import annotations

import os
from pathlib import Path

from pyvmm.errors import PyvmmError
from pyvmm.virtio.ring.rings import first_base
from pyvmm.virtio.spec import Feature

_EVENTFD = "anon_inode:[eventfd]"
_HALF_BASE = 0xFFFF


class RefusedError(PyvmmError):
    """A well-formed request that cannot be done; the text says why."""


class Vring:
    """Ring ``index``; addresses are user addresses, fds -1 while there are none.

    ``is_running`` is whether the device serves it.  ``enabled`` and the rest outlast that: the
    front end may stop a ring and start it again with a new kick alone.
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
        """As before the front end said anything, but for the eventfds."""
        self.enabled = False
        self.size = 0
        self.descriptor = self.driver = self.device = -1
        self.base: int | None = None

    @property
    def is_set_up(self) -> bool:
        """Whether SET_VRING_NUM and SET_VRING_ADDR have come."""
        return self.size > 0 and self.descriptor >= 0

    def queue_base(self, features: int) -> int:
        """``Queue.base`` as the front end gave it, with ``features`` negotiated.

        Of a packed ring some give the lower half only: what is available next is then also what
        is used next.  That is so for every ring that was stopped with nothing in flight.
        """
        if self.base is None:
            return first_base(features)
        if features & Feature.RING_PACKED and self.base <= _HALF_BASE:
            return self.base | self.base << 16
        return self.base

    def keep_fd(self, name: str, fd: int) -> None:
        """A duplicate of ``fd``, which stays the caller's, is the ring's ``name`` ("kick",
        "call", "err") from now on; -1 for none.  ``check_eventfd`` has been passed."""
        self.close_fd(name)
        if fd >= 0:
            copy = os.dup(fd)
            # So a front end that forgets to read does not stop us.  One that means to do it takes
            # the flag away again: see ``peers/eventfds.py``.
            os.set_blocking(copy, False)
            setattr(self, f"{name}_fd", copy)

    def close_fd(self, name: str) -> None:
        """The ring has no ``name`` any more; idempotent."""
        fd: int = getattr(self, f"{name}_fd")
        if fd >= 0:
            setattr(self, f"{name}_fd", -1)
            os.close(fd)

    def close(self) -> None:
        """Close every eventfd; idempotent."""
        for name in ("kick", "call", "err"):
            self.close_fd(name)


def check_eventfd(fd: int) -> None:
    """RefusedError unless ``fd`` is an eventfd: of nothing else is it sure that to wait for it, or
    to tell it, does not stop us."""
    try:
        kind = str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError as error:
        kind = f"unknown ({error.strerror})"
    if kind != _EVENTFD:
        raise RefusedError(f"the file descriptor is no eventfd: it is {kind}")
