"""Checkpoints of RAM in memory: the newest one whole, and how to undo it down to the oldest."""

from __future__ import annotations

import array
import contextlib
import mmap
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from pyvmm.errors import HostError, SnapshotError
from pyvmm.memory import PAGE_SIZE, GuestMemory
from pyvmm.ram.compare import differences
from pyvmm.ram.image import JournalImage
from pyvmm.ram.pages import drop_own, held_runs, own_runs
from pyvmm.ram.runs import Run, coarser, joined, parts_in_regions, union
from pyvmm.ram.write import write_all
from pyvmm.storage.files import KEEP_SIZE, PUNCH_HOLE, fallocate


class RamJournal:
    """Checkpoints of ``memory``, which is mapped over the newest one from then on.

    The first checkpoint copies what RAM holds, once; each further one only the pages that were
    written since.  Their former content goes into an undo log, the oldest of which is forgotten
    when all are over ``max_bytes``.  The newest checkpoint needs none: it is always there.

    Nobody may use the RAM during ``checkpoint`` and ``rewind``.  If somebody else maps an image
    over it, the next checkpoint compares all of RAM.
    """

    def __init__(self, memory: GuestMemory, *, max_bytes: int) -> None:
        self._memory = memory
        self._max_bytes = max_bytes
        self._newest = JournalImage.empty(memory.size_bytes)
        self._undo: deque[_Undo] = deque()
        self._numbers: deque[int] = deque()
        self._held = bytearray(-(-memory.size_bytes // PAGE_SIZE))  # 1: data in the newest
        self._taken = 0

    @property
    def numbers(self) -> tuple[int, ...]:
        """The checkpoints that there are, the oldest first; a number is never given twice."""
        return tuple(self._numbers)

    @property
    def held_bytes(self) -> int:
        """The size of the undo log."""
        return sum(undo.held_bytes for undo in self._undo)

    def checkpoint(self) -> int:
        """Keep RAM as it is now; return the number.

        HostError if the host lacks memory.  RAM is then as before, and so are the checkpoints, but
        for some that may be forgotten.
        """
        is_mapped = self._is_mapped
        runs = own_runs(self._memory) if is_mapped else self._differences()
        try:
            undo = self._make_undo(runs) if self._numbers else None
        except OSError as error:  # nothing is written yet
            raise HostError(f"cannot keep a checkpoint of RAM: {error}") from error
        try:
            self._write(runs)
            if is_mapped:
                self._memory.drop_own_pages(coarser(runs, self._memory.size_bytes))
            else:
                self._memory.map_image(self._newest)
        except OSError as error:
            self._withdraw(undo)
            raise HostError(f"cannot keep a checkpoint of RAM: {error}") from error
        if undo is None:
            self._forget_all()
        else:
            self._undo.append(undo)
        self._taken += 1
        self._numbers.append(self._taken)
        return self._taken

    def rewind(self, number: int) -> None:
        """Make RAM what it was at checkpoint ``number``, and forget the later ones.

        SnapshotError if there is no such checkpoint.  HostError: RAM is lost.
        """
        if number not in self._numbers:
            held = f"{self._numbers[0]} to {self._numbers[-1]}" if self._numbers else "none"
            raise SnapshotError(f"checkpoint {number}", f"is not held; there are {held}")
        try:
            while self._numbers[-1] != number:
                self._numbers.pop()
                self._take_back(self._undo.pop())
        except OSError as error:
            raise HostError(f"cannot go back to checkpoint {number}: {error}") from error
        if self._is_mapped:
            drop_own(self._memory)
        else:
            self._memory.map_image(self._newest)

    def close(self) -> None:
        """Forget all checkpoints; RAM stays as it is.  Idempotent."""
        self._forget_all()
        self._newest.close()

    def __enter__(self) -> RamJournal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def _is_mapped(self) -> bool:
        image = self._memory.image
        return isinstance(image, JournalImage) and image.fd == self._newest.fd

    def _differences(self) -> list[Run]:
        """Return the pages in which RAM differs from the newest checkpoint, by reading both."""
        all_ram = [(0, self._newest.size_bytes)]
        held = [(start, end - start) for start, end, is_held in self._pieces(all_ram) if is_held]
        candidates = union(held_runs(self._memory), held)
        return list(joined(differences(self._memory, self._newest, candidates)))

    def _pieces(self, runs: Iterable[Run]) -> Iterator[tuple[int, int, bool]]:
        """Yield start and end of each piece of ``runs``, and if the newest checkpoint holds it."""
        held = self._held
        for offset, length in runs:
            page, end = offset // PAGE_SIZE, (offset + length) // PAGE_SIZE
            while page < end:
                is_held = held[page]
                stop = held.find(not is_held, page, end)
                stop = end if stop < 0 else stop
                yield page * PAGE_SIZE, stop * PAGE_SIZE, bool(is_held)
                page = stop

    def _make_undo(self, runs: Sequence[Run]) -> _Undo | None:
        """Return what ``runs`` hold in the newest checkpoint; None if that is over the limit.

        Forget the oldest checkpoints to make room.
        """
        held, zero = array.array("Q"), array.array("Q")
        data_bytes = 0
        for start, end, is_held in self._pieces(runs):
            (held if is_held else zero).extend((start, end))
            data_bytes += end - start if is_held else 0
        needed = data_bytes + 8 * (len(held) + len(zero))
        while self._undo and self.held_bytes + needed > self._max_bytes:
            self._undo.popleft().close()
            self._numbers.popleft()
        if needed > self._max_bytes:
            return None
        return _Undo(self._newest.fd, held, zero, data_bytes)

    def _write(self, runs: Sequence[Run]) -> None:
        """Copy ``runs`` from RAM into the newest checkpoint; OSError."""
        for offset, length in runs:
            first, count = offset // PAGE_SIZE, length // PAGE_SIZE
            self._held[first : first + count] = b"\1" * count
        fd = self._newest.fd
        for region, start, length in parts_in_regions(self._memory, runs):
            write_all(fd, region.view, start, start + length, region.position)

    def _take_back(self, undo: _Undo) -> None:
        undo.apply()
        for start, end in undo.zero_pieces():
            first, count = start // PAGE_SIZE, (end - start) // PAGE_SIZE
            self._held[first : first + count] = bytes(count)
        undo.close()

    def _withdraw(self, undo: _Undo | None) -> None:
        """Undo a checkpoint that could not be finished; without an undo all are lost."""
        if undo is None:
            self._forget_all()
            return
        with contextlib.suppress(OSError):
            self._take_back(undo)
            return
        self._forget_all()

    def _forget_all(self) -> None:
        for undo in self._undo:
            undo.close()
        self._undo.clear()
        self._numbers.clear()


class _Undo:
    """The content of pieces of ``fd`` before they are overwritten.

    ``held`` has start and end of each with data, ``zero`` of each hole.
    """

    def __init__(
        self, fd: int, held: array.array[int], zero: array.array[int], data_bytes: int
    ) -> None:
        self._fd = fd
        self._held = held
        self._zero = zero
        self.held_bytes = data_bytes + 8 * (len(held) + len(zero))
        self._data: mmap.mmap | None = None
        if data_bytes:
            # Anonymous memory: a page of it costs a tenth of a memfd's.
            self._data = mmap.mmap(-1, data_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._data.madvise(mmap.MADV_DONTFORK)
            with contextlib.suppress(OSError):
                self._data.madvise(mmap.MADV_HUGEPAGE)
            for offset, part in self._parts(self._data):
                _read_all(fd, part, offset)

    def zero_pieces(self) -> Iterator[tuple[int, int]]:
        """Yield start and end of each piece that was a hole."""
        return zip(self._zero[::2], self._zero[1::2], strict=True)

    def apply(self) -> None:
        """Put the content back; OSError."""
        if self._data is not None:
            for offset, part in self._parts(self._data):
                write_all(self._fd, part, 0, len(part), offset)
        for start, end in self.zero_pieces():
            fallocate(self._fd, PUNCH_HOLE | KEEP_SIZE, start, end - start)

    def close(self) -> None:
        """Free the memory; idempotent."""
        if self._data is not None:
            self._data.close()
            self._data = None

    def _parts(self, data: mmap.mmap) -> Iterator[tuple[int, memoryview]]:
        """Yield offset and memory of each piece with data."""
        at = 0
        with memoryview(data) as whole:
            for start, end in zip(self._held[::2], self._held[1::2], strict=True):
                with whole[at : at + end - start] as part:
                    yield start, part
                at += end - start


def _read_all(fd: int, view: memoryview, offset: int) -> None:
    """Fill ``view`` from ``offset`` on: one call reads 2 GiB at most.  OSError, HostError."""
    at = 0
    while at < len(view):
        with view[at:] as rest:
            got = os.preadv(fd, [rest], offset + at)
        if not got:
            raise HostError("the newest checkpoint of RAM is cut off")
        at += got
