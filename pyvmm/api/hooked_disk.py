"""Hooks on the requests of a disk: a backend between the device and the disk's own."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from pyvmm.api.disks import DiskWrapper
from pyvmm.api.hook_calls import BadAnswerError, Hook, HookCalls, Refusal
from pyvmm.startup.types import Record
from pyvmm.storage.backend import BlockBackend

READ, WRITE, FLUSH = "read", "write", "flush"
DISCARD, WRITE_ZEROES = "discard", "write zeroes"


class DiskRequest(Record):
    """One request of the guest to a disk, which keeps to the disk's limits."""

    operation: str
    """``read``, ``write``, ``flush``, ``discard`` or ``write zeroes``."""
    offset: int = 0
    """Bytes from the disk's start; 0 for a flush."""
    length: int = 0
    """Bytes; 0 for a flush."""
    data: bytes | None = None
    """The bytes that are written; None unless it is a write."""
    is_durable: bool = False
    """True if a write must be on stable storage when it is answered."""


class HookedBackend(DiskWrapper):
    """A BlockBackend before ``inner`` that asks ``hooks`` about each request of the guest.

    ``inner`` stays its owner's to close.
    """

    def __init__(self, inner: BlockBackend, calls: HookCalls) -> None:
        super().__init__(inner)
        self.hooks: tuple[Hook, ...] = ()
        self._calls = calls

    @property
    def merges(self) -> bool:
        """Return False: each request of the guest must come here alone."""
        return False

    def readv(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Fill ``buffers`` with the first hook's answer, or have the disk do it."""
        length = sum(map(len, buffers))
        data = self._ask(DiskRequest(operation=READ, offset=offset, length=length), length)
        if data is None:
            self.inner.readv(buffers, offset)
            return
        start = 0
        for buffer in buffers:
            buffer[:] = data[start : start + len(buffer)]
            start += len(buffer)

    def writev(
        self, buffers: Sequence[memoryview], offset: int, *, durable: bool = False
    ) -> None:
        """Have the disk store the bytes that the hooks saw, or what the first has instead.

        They are a copy, because the guest may change its buffers meanwhile.
        """
        data = b"".join(buffers)
        instead = self._ask(
            DiskRequest(
                operation=WRITE, offset=offset, length=len(data), data=data, is_durable=durable
            ),
            len(data),
        )
        stored = data if instead is None else instead
        self.inner.writev([memoryview(stored)], offset, durable=durable)

    def flush(self) -> None:
        """Have the disk flush, unless a hook refuses."""
        self._ask(DiskRequest(operation=FLUSH), None)
        self.inner.flush()

    def discard(self, offset: int, length: int) -> None:
        """Have the disk discard the bytes, unless a hook refuses."""
        self._ask(DiskRequest(operation=DISCARD, offset=offset, length=length), None)
        self.inner.discard(offset, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Have the disk make the bytes zero, unless a hook refuses."""
        self._ask(DiskRequest(operation=WRITE_ZEROES, offset=offset, length=length), None)
        self.inner.write_zeroes(offset, length, unmap=unmap)

    def close(self) -> None:
        """Do nothing: ``inner`` has an owner."""

    def _ask(self, request: DiskRequest, length: int | None) -> bytes | None:
        """Return the hooks' bytes, None if they have none; OSError if one of them refuses.

        ``length`` is that of the bytes they may answer with; None if they may not.
        """
        answer: bytes | Refusal | None = self._calls.ask(
            "on_request", self.hooks, (request,), lambda given: _judge(given, request, length),
            passes=(OSError,),
        )
        if isinstance(answer, Refusal):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return answer


def _judge(answer: object, request: DiskRequest, length: int | None) -> bytes | Refusal:
    if isinstance(answer, Refusal):
        return answer
    if isinstance(answer, (bytes, bytearray, memoryview)) and length is not None:
        data = bytes(answer)
        if len(data) == length:
            return data
        shown = f"{len(data)} bytes"
    else:
        shown = f"a {type(answer).__name__}"
    wanted = "" if length is None else f" {length} bytes,"
    raise BadAnswerError(
        f"returned {shown}; for this {request.operation} it may return None,{wanted} or REFUSE, "
        "or raise OSError"
    )
