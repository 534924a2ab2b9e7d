"""Passes of the fast path: plain reads and writes, many at a time.

Nearly every request of a running guest is a plain chain (``plain.PlainChain``) that reads or
writes whole sectors of the disk from and to RAM.  Those are served here, at a third of the cost
of the general path.  All other chains and requests go through the general path, one at a time and
in their turn.  A request has the same effect and answer either way:
``tests/virtio/block/fast/test_fast_path_equal.py`` compares the two.

Neighbours in the queue that are neighbours on the disk are merged into one transfer where the
backend is a file.  If the transfer fails, each request is served singly and gets its own status.
A driver could find one difference: requests are parsed a few at a time, before the data of the
first arrives.  A request whose header lies in another's data buffer would notice.  No driver can
count on an order of requests that it offers at once.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence

from pyvmm.errors import GuestMemoryError
from pyvmm.memory import GuestMemory
from pyvmm.storage.backend import BlockBackend
from pyvmm.virtio.block.fast.plain import TOKEN_BITS, PlainChain, chain_of, plain_work
from pyvmm.virtio.block.fast.ring import FastRing
from pyvmm.virtio.block.request import HEADER, HEADER_SIZE, STATUS_SIZE
from pyvmm.virtio.device import PASS_BYTES, chain_work
from pyvmm.virtio.ring.queue import Buffer, Chain
from pyvmm.virtio.spec import SECTOR_SIZE, BlockRequestType, BlockStatus

_IN = int(BlockRequestType.IN)
_OUT = int(BlockRequestType.OUT)
_FLUSH = int(BlockRequestType.FLUSH)
_OK = int(BlockStatus.OK)
_IOERR = int(BlockStatus.IOERR)
_IOV_MAX = os.sysconf("SC_IOV_MAX")
_NOWHERE = -1  # no request begins there
_GENERAL = -1  # in place of a type: the general path must serve it

_Run = tuple[int, int, list[memoryview], list[PlainChain]]
"""Type, offset on the disk in bytes, data, and the chains that are served by one transfer."""

_unpack_header = HEADER.unpack_from


class FastPath:
    """Makes passes over ``ring``, of a disk in ``backend`` that takes writes if ``may_write`` and
    flushes if ``may_flush``.

    ``serve`` is the general path: it does what a chain asks and returns the bytes written into
    it; ``extra_work`` is then the work that its descriptors and buffers do not show.
    ``notify(index)`` tells the driver that there are used buffers.  Holds views of ``memory``.
    """

    __slots__ = (
        "_backend",
        "_done",
        "_extra_work",
        "_index",
        "_may_flush",
        "_may_write",
        "_memory",
        "_merges",
        "_notify",
        "_region",
        "_region_gpa",
        "_serve",
        "ring",
    )

    def __init__(
        self,
        ring: FastRing,
        memory: GuestMemory,
        backend: BlockBackend,
        *,
        may_write: bool,
        may_flush: bool,
        serve: Callable[[Chain], int],
        extra_work: Callable[[], int],
        index: int,
        notify: Callable[[int], None],
    ) -> None:
        self.ring = ring
        self._region = ring.region
        self._region_gpa = ring.region_gpa
        self._memory = memory
        self._backend = backend
        self._merges = backend.merges
        self._may_write = may_write
        self._may_flush = may_flush
        self._serve = serve
        self._extra_work = extra_work
        self._index = index
        self._notify = notify
        # token | written << TOKEN_BITS of what has been served, in order
        self._done: list[int] = []

    def process(self, *, durable: bool) -> float | None:
        """Make a pass; see ``VirtioDevice.process_queue``.  Writes are stable when they are
        answered if ``durable``."""
        ring = self.ring
        chain = ring.take_lone()
        if chain is not None:
            answer = self._serve_lone(chain, durable)
            if not self._merges:
                self._extra_work()  # which the next pass need not answer for
            if ring.answer_lone(chain[0], answer):
                self._notify(self._index)
        else:
            try:
                self._serve_waiting(durable)
            finally:
                if ring.publish():
                    self._notify(self._index)
        return 0.0 if ring.enable_notifications() else None

    def _serve_lone(self, chain: PlainChain, durable: bool) -> int:
        """Serve ``chain``; return the bytes written into it.

        ``_runs`` and ``_serve_all`` would do the same, but half of their cost is lists.
        """
        _, header, at, length, writes, status, _ = chain
        region, region_gpa, backend = self._region, self._region_gpa, self._backend
        region_bytes = len(region)
        header -= region_gpa
        at -= region_gpa
        status -= region_gpa
        if (
            not 0 <= header <= region_bytes - HEADER_SIZE
            or not 0 <= status < region_bytes
            or (length and (length % SECTOR_SIZE or not 0 <= at <= region_bytes - length))
        ):
            return self._serve_otherwise(chain)
        request_type, _, sector = _unpack_header(region, header)
        offset = sector * SECTOR_SIZE
        fits = offset + length <= backend.size_bytes
        result, written = _OK, STATUS_SIZE
        try:
            if request_type == _IN and writes and fits:
                backend.readv([region[at : at + length]], offset)
                written += length
            elif request_type == _OUT and length and not writes and fits and self._may_write:
                backend.writev([region[at : at + length]], offset, durable=durable)
            elif request_type == _FLUSH and not length and self._may_flush:
                backend.flush()
            else:
                return self._serve_otherwise(chain)
        except OSError:
            result = _IOERR
        region[status] = result
        return written

    def _serve_otherwise(self, chain: PlainChain) -> int:
        """Serve the only chain of a pass by the general path; return the bytes written into it."""
        written = self._serve(chain_of(chain))
        self._extra_work()  # which the next pass need not answer for
        return written

    def _serve_waiting(self, durable: bool) -> None:
        """Serve and push the waiting chains, within the bounds of a pass that has begun.
        RingError, with all chains before it pushed."""
        ring, done = self.ring, self._done
        left, follows = PASS_BYTES, True
        while follows and left > 0:
            chains, left, follows = ring.take_plain(left)
            if chains:
                try:
                    left = self._serve_all(chains, left, durable)
                finally:
                    ring.push_plain(done)
                    served = len(done)
                    done.clear()
                    if served < len(chains):
                        ring.untake()
            if follows and left > 0:
                chain = ring.take_next()
                if chain is None:
                    return
                ring.push(chain, self._serve(chain))
                left -= chain_work(chain) + self._extra_work()

    def _serve_all(self, chains: list[PlainChain], left: int, durable: bool) -> int:
        """Serve ``chains``, in order, into ``_done``; return the work that is left to the pass.

        ``left`` is the work that was left when they had been taken.  Once none is left, the rest
        of them is not served.
        """
        behind: list[int] = []  # at index n: the work of the last n chains
        backend, done = self._backend, self._done
        region, region_gpa = self._region, self._region_gpa
        hides_work = not self._merges  # a file's transfer is one call
        for request_type, offset, buffers, run in self._runs(chains, durable):
            if behind and left <= 0:  # the pass ends somewhere in the chains that are left
                unserved = len(chains) - len(done)
                allowed = sum(left + behind[unserved - n] > 0 for n in range(len(run)))
                if allowed < len(run):
                    self._serve_singly(run[:allowed])
                    break
            status = _OK
            try:
                if request_type == _IN:
                    backend.readv(buffers, offset)
                elif request_type == _OUT:
                    backend.writev(buffers, offset, durable=durable)
                else:
                    self._serve_singly(run)
                    run = []
            except OSError:
                if len(run) > 1:
                    self._serve_singly(run)
                    run = []
                status = _IOERR
            for token, _, _, length, writes, status_gpa, _ in run:
                region[status_gpa - region_gpa] = status
                written = length + STATUS_SIZE if writes and status == _OK else STATUS_SIZE
                done.append(token | written << TOKEN_BITS)
            if request_type == _GENERAL or hides_work:
                extra_work = self._extra_work()
                if extra_work:
                    left -= extra_work
                    if not behind:
                        behind = [0, *itertools.accumulate(map(plain_work, reversed(chains)))]
        return left

    def _serve_singly(self, run: list[PlainChain]) -> None:
        """Serve each of ``run`` by the general path."""
        for chain in run:
            self._done.append(chain[0] | self._serve(chain_of(chain)) << TOKEN_BITS)

    def _runs(self, chains: list[PlainChain], durable: bool) -> list[_Run]:
        """Return ``chains`` in runs of one transfer each, judged as the general path does.

        A request that it would refuse, or that is not all in RAM, is left to it."""
        region, region_gpa, may_write = self._region, self._region_gpa, self._may_write
        region_bytes, last_header = len(region), len(region) - HEADER_SIZE
        size_bytes = self._backend.size_bytes
        # By type.  A durable write that fails spoils all after it, so it must be its own failure.
        merges = self._merges, self._merges and not durable
        runs: list[_Run] = []
        last_type, end = _GENERAL, _NOWHERE
        for chain in chains:
            _, header, at, length, writes, status, pieces = chain
            header -= region_gpa
            at -= region_gpa
            data: list[memoryview] | None = None
            if 0 <= header <= last_header and 0 <= status - region_gpa < region_bytes:
                request_type, _, sector = _unpack_header(region, header)
                offset = sector * SECTOR_SIZE
                if (
                    not length % SECTOR_SIZE
                    and offset + length <= size_bytes
                    and (request_type == _IN if writes else request_type == _OUT and may_write)
                ):
                    if not pieces and 0 <= at <= region_bytes - length:
                        data = [region[at : at + length]]
                    else:
                        data = self._views(pieces or [(at + region_gpa, length)])
            if data is None:
                runs.append((_GENERAL, 0, [], [chain]))
                end = _NOWHERE
                continue
            if offset == end and request_type == last_type:
                _, _, buffers, run = runs[-1]
                if len(buffers) + len(data) <= _IOV_MAX:
                    buffers += data
                    run.append(chain)
                    end += length
                    continue
            runs.append((request_type, offset, data, [chain]))
            last_type = request_type
            end = offset + length if merges[request_type] else _NOWHERE
        return runs

    def _views(self, pieces: Sequence[Buffer]) -> list[memoryview] | None:
        """Return views of RAM for ``pieces``; None if any of it is not RAM."""
        region, region_gpa = self._region, self._region_gpa
        region_bytes = len(region)
        views = []
        for gpa, length in pieces:
            at = gpa - region_gpa
            if 0 <= at <= region_bytes - length:
                views.append(region[at : at + length])
            else:
                try:
                    views.append(self._memory.view(gpa, length))
                except GuestMemoryError:
                    return None
        return views
