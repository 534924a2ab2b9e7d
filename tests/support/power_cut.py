"""What a disk may look like after a power cut: a recording backend, and images made from it.

Until a flush, a disk may have stored any of the writes since the last one, in any order, and any of
their sectors; a sector itself is stored whole or not at all.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pyvmm.storage.backend import BlockBackend

SECTOR = 512


@dataclass(frozen=True, slots=True)
class Write:
    """``data`` (whole sectors) stored at ``offset``; zeroes for a discard."""

    offset: int
    data: bytes
    durable: bool = False


@dataclass(frozen=True, slots=True)
class Flush:
    """A flush that succeeded."""


@dataclass(frozen=True, slots=True)
class Note:
    """Something the test wants to know about at a power cut."""

    value: object


class RecordingBackend:
    """``backend`` with a log of every write and flush, and of what the test notes."""

    can_discard = True
    extra_calls = 0
    merges = False
    can_write_zeroes = True

    def __init__(self, backend: BlockBackend) -> None:
        self._backend = backend
        self.read_only = backend.read_only
        self.block_size = backend.block_size
        self.initial = bytearray(backend.size_bytes)
        backend.readv([memoryview(self.initial)], 0)
        self.log: list[Write | Flush | Note] = []

    @property
    def size_bytes(self) -> int:
        return self._backend.size_bytes

    def note(self, value: object) -> None:
        """Log ``value``: what was done before it was asked for earlier."""
        self.log.append(Note(value))

    def readv(self, buffers: Sequence[memoryview], offset: int) -> None:
        self._backend.readv(buffers, offset)

    def writev(
        self, buffers: Sequence[memoryview], offset: int, *, durable: bool = False
    ) -> None:
        data = b"".join(buffers)
        self._backend.writev([memoryview(data)], offset, durable=durable)
        self.log.append(Write(offset, data, durable))

    def flush(self) -> None:
        self._backend.flush()
        self.log.append(Flush())

    def discard(self, offset: int, length: int) -> None:
        # Zeroed in earnest, so that what is read now is one of the things a cut may leave.
        self.write_zeroes(offset, length, unmap=True)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self._backend.write_zeroes(offset, length, unmap=unmap)
        self.log.append(Write(offset, bytes(length)))

    def refresh_size(self) -> int:
        return self._backend.refresh_size()

    def hurry(self, until_s: float) -> None:
        self._backend.hurry(until_s)

    def close(self) -> None:
        self._backend.close()


@dataclass(frozen=True, slots=True)
class PowerCut:
    """A disk's ``image`` after a cut, and the notes made before it."""

    image: bytearray
    notes: list[object] = field(repr=False)


def power_cuts(recorder: RecordingBackend, rng: random.Random, count: int) -> Iterator[PowerCut]:
    """``count`` cuts, spread over the moments just before each flush and the end of the log."""
    log = recorder.log
    points = [i for i, event in enumerate(log) if isinstance(event, Flush)] + [len(log)]
    shares = {point: count // len(points) for point in points}
    for point in rng.sample(points, count % len(points)):
        shares[point] += 1
    stable = bytearray(recorder.initial)
    notes: list[object] = []
    start = 0
    for point in points:
        volatile = [event for event in log[start:point] if isinstance(event, Write)]
        notes.extend(event.value for event in log[start:point] if isinstance(event, Note))
        for _ in range(shares[point]):
            image = bytearray(stable)
            _store_some(image, volatile, rng)
            yield PowerCut(image, list(notes))
        for write in volatile:
            stable[write.offset : write.offset + len(write.data)] = write.data
        start = point


def _store_some(image: bytearray, writes: Sequence[Write], rng: random.Random) -> None:
    """Store a random subset of ``writes``, and of some only some sectors.

    In the order they were made: a sector written twice may have either content because the later
    write may be missing.
    """
    stored = rng.choice((0.0, 0.1, 0.5, 0.9, 1.0))
    torn = rng.choice((0.0, 0.25, 1.0))
    for write in writes:
        if not write.durable and rng.random() >= stored:
            continue
        sectors = range(0, len(write.data), SECTOR)
        if not write.durable and rng.random() < torn:
            sectors_kept = _some_sectors(sectors, rng)
        else:
            sectors_kept = list(sectors)
        for sector in sectors_kept:
            place = write.offset + sector
            image[place : place + SECTOR] = write.data[sector : sector + SECTOR]


def _some_sectors(sectors: range, rng: random.Random) -> list[int]:
    """A beginning, an end or any of ``sectors``."""
    cut = rng.randrange(len(sectors) + 1)
    return rng.choice((
        list(sectors[:cut]),
        list(sectors[cut:]),
        [sector for sector in sectors if rng.random() < 0.5],
    ))
