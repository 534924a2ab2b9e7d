"""A disk that goes wrong on purpose, by a script: for testing what is above it."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence

from pyvmm.peers.wait_limit import WaitLimit
from pyvmm.startup.types import Record
from pyvmm.storage.backend import BlockBackend, buffers_slice, check_range
from pyvmm.storage.fault_script import Effect, Fault, Operation


class FaultState(Record):
    """``faults``, how many operations each has counted, and the errno of a latched flush."""

    faults: tuple[Fault, ...]
    counts: tuple[int, ...]
    flush_errno: int


class FaultyBackend:
    """A disk that owns ``backend`` and adds ``faults``.

    Every fault counts the operations that it matches.  Of all that are due, delays come first, then
    the first other effect in the script's order.  After a flush or durable write that failed, all
    later ones fail, as the protocol demands.  ``sleep`` takes seconds; ``hurry`` cuts the default
    one short.
    """

    def __init__(
        self,
        backend: BlockBackend,
        faults: Sequence[Fault],
        *,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self._backend = backend
        self._faults = tuple(faults)
        self._counts = [0] * len(self._faults)
        self._limit = WaitLimit()
        self._sleep = sleep or self._wait
        self.merges = False  # faults count the guest's requests, one by one
        self._flush_errno = 0
        self.read_only = backend.read_only
        self.block_size = backend.block_size
        self.can_discard = backend.can_discard
        self.can_write_zeroes = backend.can_write_zeroes

    @property
    def inner(self) -> BlockBackend:
        """The disk behind the faults."""
        return self._backend

    @classmethod
    def of_state(cls, backend: BlockBackend, state: FaultState) -> FaultyBackend:
        """Return ``backend`` behind the faults of ``state``, which go on counting."""
        disk = cls(backend, state.faults)
        disk.restore(state)
        return disk

    def save(self) -> FaultState:
        """Return the state of the faults."""
        return FaultState(
            faults=self._faults, counts=tuple(self._counts), flush_errno=self._flush_errno
        )

    def restore(self, state: FaultState) -> None:
        """Go back to ``state``, of the same faults."""
        self._counts = list(state.counts)
        self._flush_errno = state.flush_errno

    @property
    def size_bytes(self) -> int:
        """See ``BlockBackend.size_bytes``."""
        return self._backend.size_bytes

    @property
    def extra_calls(self) -> int:
        """See ``BlockBackend.extra_calls``."""
        return self._backend.extra_calls

    def readv(self, buffers: Sequence[memoryview], offset: int) -> None:
        """See ``BlockBackend.readv``; a short read fails after its first bytes."""
        length = self._check(offset, sum(map(len, buffers)))
        fault = self._due(Operation.READ, offset, length)
        if fault is None:
            self._backend.readv(buffers, offset)
            return
        if fault.effect is Effect.SHORT:
            self._backend.readv(buffers_slice(buffers, 0, fault.length), offset)
        raise _error(fault.error)

    def writev(
        self, buffers: Sequence[memoryview], offset: int, *, durable: bool = False
    ) -> None:
        """See ``BlockBackend.writev``; a torn write stores only its first bytes."""
        length = self._check(offset, sum(map(len, buffers)))
        if durable:
            self._check_latch()
        fault = self._due(Operation.WRITE, offset, length)
        if fault is None:
            self._backend.writev(buffers, offset, durable=durable)
            return
        if fault.effect is Effect.TORN:
            self._backend.writev(buffers_slice(buffers, 0, fault.length), offset, durable=durable)
        self._fail(fault, latch=durable)

    def flush(self) -> None:
        """See ``BlockBackend.flush``; a lost flush succeeds and makes nothing stable."""
        self._check_latch()
        fault = self._due(Operation.FLUSH, 0, 0)
        if fault is None:
            self._backend.flush()
        else:
            self._fail(fault, latch=True)

    def discard(self, offset: int, length: int) -> None:
        """See ``BlockBackend.discard``."""
        fault = self._due(Operation.DISCARD, offset, self._check(offset, length))
        if fault is None:
            self._backend.discard(offset, length)
        else:
            self._fail(fault)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """See ``BlockBackend.write_zeroes``."""
        fault = self._due(Operation.ZEROES, offset, self._check(offset, length))
        if fault is None:
            self._backend.write_zeroes(offset, length, unmap=unmap)
        else:
            self._fail(fault)

    def refresh_size(self) -> int:
        """See ``BlockBackend.refresh_size``."""
        return self._backend.refresh_size()

    def hurry(self, until_s: float) -> None:
        """See ``BlockBackend.hurry``."""
        self._limit.set(until_s)
        self._backend.hurry(until_s)

    def close(self) -> None:
        """Close the backend; idempotent."""
        self._backend.close()
        self._limit.close()

    def _wait(self, delay_s: float) -> None:
        self._limit.wait(None, 0, time.monotonic() + delay_s)

    def _check(self, offset: int, length: int) -> int:
        """Return ``length`` if the bytes are on the disk: a refused operation is not counted."""
        check_range("faulty disk", offset, length, self.size_bytes)
        return length

    def _due(self, operation: Operation, offset: int, length: int) -> Fault | None:
        """Count the operation, wait if it is delayed, and return its other fault, if any."""
        due = None
        for index, fault in enumerate(self._faults):
            if not fault.matches(operation, offset, length):
                continue
            self._counts[index] += 1
            if self._counts[index] < fault.first or (
                fault.last is not None and self._counts[index] > fault.last
            ):
                continue
            if fault.effect is Effect.DELAY:
                self._sleep(fault.delay_s)
            elif due is None:
                due = fault
        return due

    def _fail(self, fault: Fault, *, latch: bool = False) -> None:
        """Raise the fault's error, if it has one."""
        if fault.error:
            if latch:
                self._flush_errno = fault.error
            raise _error(fault.error)

    def _check_latch(self) -> None:
        if self._flush_errno:
            raise OSError(self._flush_errno, "an earlier flush failed", "faulty disk")


def _error(number: int) -> OSError:
    return OSError(number or errno.EIO, os.strerror(number or errno.EIO), "faulty disk")
