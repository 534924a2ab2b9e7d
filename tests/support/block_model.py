"""A model of a block device that fits on a page, and a disk that shows what became stable.

The model knows two things of every sector: what a read returns, and what may be found in it after
a power cut.
"""

from __future__ import annotations

import errno
import itertools
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pyvmm.virtio.spec import BlockFeature

SECTORS = 12
SERIAL = b"model".ljust(20, b"\0")
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
UNMAP = 1
ZEROES, DISCARDED = bytes(512), b"\xdd" * 512


# The disk under the device


class TwoDisks:
    """A backend that keeps apart what was written and what is stable.  ``bad`` sectors cannot be
    read or written, and a flush fails, at once and ever after, when ``dying``."""

    read_only = False
    extra_calls = 0
    merges = False
    block_size = 512
    can_discard = can_write_zeroes = True
    size_bytes = SECTORS * 512

    def __init__(self) -> None:
        self.volatile = bytearray(self.size_bytes)
        self.stable = bytearray(self.size_bytes)
        self.bad: frozenset[int] = frozenset()
        self.dying = False

    def _range(self, offset: int, length: int) -> slice:
        if offset % 512 or length % 512 or not 0 <= offset < offset + length <= self.size_bytes:
            raise AssertionError(f"the device asks for {length} bytes at {offset}")
        if self.bad.intersection(range(offset // 512, (offset + length) // 512)):
            raise OSError(errno.EIO, "bad sector")
        return slice(offset, offset + length)

    def readv(self, buffers: Sequence[memoryview], offset: int) -> None:
        source = self.volatile[self._range(offset, sum(map(len, buffers)))]
        for buffer in buffers:
            buffer[:] = source[: len(buffer)]
            del source[: len(buffer)]

    def writev(
        self, buffers: Sequence[memoryview], offset: int, *, durable: bool = False
    ) -> None:
        data = b"".join(buffers)
        where = self._range(offset, len(data))
        self.volatile[where] = data
        if durable:
            self._check_alive()
            self.stable[where] = data

    def flush(self) -> None:
        self._check_alive()
        self.stable[:] = self.volatile

    def discard(self, offset: int, length: int) -> None:
        self.volatile[self._range(offset, length)] = DISCARDED * (length // 512)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self.volatile[self._range(offset, length)] = bytes(length)

    def refresh_size(self) -> int:
        return self.size_bytes

    def hurry(self, until_s: float) -> None: ...

    def close(self) -> None: ...

    def _check_alive(self) -> None:
        if self.dying:
            raise OSError(errno.EIO, "dying disk")


# What the driver asks


class Segment(NamedTuple):
    sector: int
    sectors: int
    flags: int

    def pack(self) -> bytes:
        return struct.pack("<QII", *self)


class Ask(NamedTuple):
    """A request; the readable and the writable bytes are cut into descriptors at ``cuts``."""

    type: int
    sector: int
    payload: bytes
    room: int
    segments: list[Segment]
    cuts: tuple[list[int], list[int]]
    indirect: bool


class SetWriteback(NamedTuple):
    value: int


class Restart(NamedTuple):
    """A reset, and the features the driver declines then."""

    declined: int


class Damage(NamedTuple):
    """How the disk is from now on."""

    bad: frozenset[int]
    dying: bool


Step = list[Ask] | SetWriteback | Restart | Damage


class Answer(NamedTuple):
    """``data`` is what is in the first bytes of the room."""

    status: int
    data: bytes = b""

    @property
    def used_length(self) -> int:
        return len(self.data) + 1


# The model


class Model:
    """``sectors[i]`` is what reading sector i returns; ``survivors[i]`` is all that may be in it
    after a power cut."""

    discarded = DISCARDED

    def __init__(self, sector_count: int = SECTORS) -> None:
        self.sectors = [ZEROES] * sector_count
        self.survivors = [{ZEROES} for _ in range(sector_count)]
        self.disk = Damage(frozenset(), False)
        self.restart(0)

    def restart(self, features: int) -> None:
        self.features = features
        self.writeback = bool(features & BlockFeature.FLUSH)

    def set_writeback(self, value: int) -> None:
        if self.features & BlockFeature.CONFIG_WCE and value < 2:
            if self.writeback and not value and not self.disk.dying:
                self._settle(range(len(self.sectors)))
            self.writeback = bool(value)

    def answer(self, ask: Ask) -> Answer:
        has = self.features
        if ask.type == IN:
            return self._read(ask)
        if ask.type == OUT:
            return self._write(ask)
        if ask.type == FLUSH and has & BlockFeature.FLUSH:
            if self.disk.dying:
                return Answer(IOERR)
            self._settle(range(len(self.sectors)))
            return Answer(OK)
        if ask.type == GET_ID:
            return Answer(IOERR) if ask.payload else Answer(OK, SERIAL[: ask.room])
        if ask.type == DISCARD and has & BlockFeature.DISCARD:
            return self._ranges(ask, allowed_flags=0, becomes=self.discarded)
        if ask.type == WRITE_ZEROES and has & BlockFeature.WRITE_ZEROES:
            return self._ranges(ask, allowed_flags=UNMAP, becomes=ZEROES)
        return Answer(UNSUPP)

    def _read(self, ask: Ask) -> Answer:
        where = self._on_disk(ask.sector, ask.room)
        if ask.payload or not where or self.disk.bad.intersection(where):
            return Answer(IOERR)
        return Answer(OK, b"".join(self.sectors[where.start : where.stop]))

    def _write(self, ask: Ask) -> Answer:
        where = self._on_disk(ask.sector, len(ask.payload))
        if ask.room or not where or self.disk.bad.intersection(where):
            return Answer(IOERR)
        for i, sector in enumerate(where):
            self._put(sector, ask.payload[512 * i : 512 * (i + 1)])
        return self._completed(where)

    def _ranges(self, ask: Ask, *, allowed_flags: int, becomes: bytes) -> Answer:
        raw, segments = ask.payload, ask.segments
        if ask.room or raw != b"".join(s.pack() for s in segments) or not 0 < len(segments) <= 32:
            return Answer(IOERR)
        if any(s.flags & ~allowed_flags for s in segments):
            return Answer(UNSUPP)
        ranges = [self._on_disk(s.sector, 512 * s.sectors) for s in segments]
        if not all(ranges):
            return Answer(IOERR)
        for where in ranges:  # one after the other, until one fails
            if self.disk.bad.intersection(where):
                return Answer(IOERR)
            for sector in where:
                self._put(sector, becomes)
        if ask.type == DISCARD:
            return Answer(OK)
        return self._completed(itertools.chain.from_iterable(ranges))

    def _on_disk(self, sector: int, length: int) -> range:
        """The sectors meant; an empty range if they are not whole or not all there."""
        whole = not length % 512 and sector + length // 512 <= len(self.sectors)
        return range(sector, sector + length // 512) if whole else range(0)

    def _put(self, sector: int, content: bytes) -> None:
        self.sectors[sector] = content
        self.survivors[sector].add(content)

    def _completed(self, where: Iterable[int]) -> Answer:
        """A write has been done; without a volatile cache it has to be stable."""
        if not self.writeback:
            if self.disk.dying:
                return Answer(IOERR)
            self._settle(where)
        return Answer(OK)

    def _settle(self, where: Iterable[int]) -> None:
        for sector in where:
            self.survivors[sector] = {self.sectors[sector]}


class LiveModel(Model):
    """Only what reads return, for disks of many sectors; a discarded sector reads as zeroes."""

    discarded = ZEROES

    def __init__(self, sector_count: int) -> None:
        super().__init__(0)
        self.sectors = [ZEROES] * sector_count

    def _put(self, sector: int, content: bytes) -> None:
        self.sectors[sector] = content

    def _settle(self, where: Iterable[int]) -> None:
        """Nothing: no power is cut."""


# Framing (2.7.4 "Message Framing")


def pieces(data: bytes, cut_at: Iterable[int]) -> list[bytes]:
    """``data`` in pieces, some of them perhaps empty."""
    ends = [0, *sorted(min(cut, len(data)) for cut in cut_at), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(ends)]
