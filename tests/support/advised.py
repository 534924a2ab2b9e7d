"""What a block device advises in its configuration space, and requests that take it at its word.

Every segment lies apart: in a page of its own, where no neighbour begins or ends.
"""

from __future__ import annotations

import itertools
import random
import struct
from typing import NamedTuple

from pyvmm.virtio.spec import BlockRequestType
from tests.support.virtio_driver import BlockDriver, Descriptor, Used, readable, writable

PAGE = 4096
IN, OUT = int(BlockRequestType.IN), int(BlockRequestType.OUT)
DISCARD, WRITE_ZEROES = int(BlockRequestType.DISCARD), int(BlockRequestType.WRITE_ZEROES)
_LENGTHS = (511, 513, 1024, 1, 511)  # of segments, again and again; together whole sectors
_SPACE = struct.Struct("<QII20xIIIIIB")


class Advice(NamedTuple):
    """5.2.4 "Device configuration layout", as far as it bounds a request."""

    capacity: int
    size_max: int
    seg_max: int
    discard_sectors: int
    discard_ranges: int
    discard_alignment: int
    zero_sectors: int
    zero_ranges: int
    may_unmap: int

    @classmethod
    def of(cls, space: bytes) -> Advice:
        """What the configuration space says."""
        return cls(*_SPACE.unpack_from(space))


class Asker:
    """Requests through ``driver``, whose ring has any size from 2, in tables of their own if
    ``indirect``, as Linux makes them: however long the ring is."""

    def __init__(self, driver: BlockDriver, *, indirect: bool) -> None:
        self.driver = driver
        self.indirect = indirect

    def segments(self, most: int) -> int:
        """How many segments a request can have of the ``most`` that the device takes.

        "A driver MUST NOT create a descriptor chain longer than the Queue Size of the device"
        (2.7.5.3.1), which in a ring without tables it cannot even try.
        """
        return most if self.indirect else min(most, max(1, self.driver.size - 2))

    def apart(self, lengths: list[int]) -> list[tuple[int, int]]:
        """Buffers of ``lengths``, each in pages of its own and none where a page begins."""
        return [
            (self.driver.alloc(length + 512, PAGE) + 1 + 7 * index % 500, length)
            for index, length in enumerate(lengths)
        ]

    def write(self, sector: int, data: bytes, lengths: list[int]) -> int:
        """Write ``data``, cut into ``lengths``; the status."""
        driver, at, chain = self.driver, 0, []
        for gpa, length in self.apart(lengths):
            driver.memory.write(gpa, data[at : at + length])
            chain.append(readable(gpa, length))
            at += length
        return self.ask(OUT, sector, chain, written=1)

    def read(self, sector: int, lengths: list[int]) -> tuple[int, bytes]:
        """The status, and what is read into segments of ``lengths``."""
        driver, places = self.driver, self.apart(lengths)
        chain = [writable(gpa, length) for gpa, length in places]
        status = self.ask(IN, sector, chain, written=1 + sum(lengths))
        return status, b"".join(driver.memory.read(gpa, length) for gpa, length in places)

    def ranges(self, request_type: int, ranges: list[tuple[int, int, int]], pieces: int) -> int:
        """Discard or zero ``ranges`` of (sector, sectors, flags), described by ``pieces``
        segments apart; the status."""
        data = b"".join(struct.pack("<QII", *one) for one in ranges)
        cuts = [len(data) * n // pieces for n in range(pieces + 1)]
        chain, driver = [], self.driver
        lengths = [end - begin for begin, end in itertools.pairwise(cuts)]
        for begin, (gpa, length) in zip(cuts, self.apart(lengths), strict=False):
            driver.memory.write(gpa, data[begin : begin + length])
            chain.append(readable(gpa, length))
        return self.ask(request_type, 0, chain, written=1)

    def ask(self, request_type: int, sector: int, data: list[Descriptor], *, written: int) -> int:
        """The status of a request with the descriptors ``data``."""
        driver = self.driver
        header, status = driver.header(request_type, sector), driver.status_byte()
        chain = [readable(header, 16), *data, writable(status, 1)]
        if self.indirect:
            chain = [driver.indirect(chain)]
        elif driver.size == 2:  # the header with what is written, or the status with what is read
            chain, status = self._in_two(request_type, sector, data)
        driver.submit(chain)
        done = driver.reap()
        assert done == [Used(0, written)], (driver.size, done)
        if not self.indirect and driver.size == 2 and request_type == IN:
            ((gpa, length, *_),) = data
            driver.memory.write(gpa, driver.memory.read(chain[1].gpa, length))
        return driver.memory.read_int(status, 1)

    def _in_two(
        self, request_type: int, sector: int, data: list[Descriptor]
    ) -> tuple[list[Descriptor], int]:
        """A chain of two descriptors, and where its status is."""
        driver = self.driver
        ((gpa, length, *_),) = data
        header = struct.pack("<IIQ", request_type, 0, sector)
        if request_type == IN:
            room = driver.alloc(length + 1)
            return [readable(driver.put(header), 16), writable(room, length + 1)], room + length
        first, status = driver.put(header + driver.memory.read(gpa, length)), driver.status_byte()
        return [readable(first, 16 + length), writable(status, 1)], status


def check_transfers(asker: Asker, advice: Advice) -> None:
    """Write and read as many segments as the device advises."""
    count = asker.segments(advice.seg_max)
    lengths = list(itertools.islice(itertools.cycle(_LENGTHS), count))
    lengths[-1] += -sum(lengths) % 512
    data = random.Random(count).randbytes(sum(lengths))
    sector = advice.capacity - len(data) // 512
    with asker.driver.scratch():
        assert asker.write(sector, data, lengths) == 0
    for cut in (lengths, [len(data)], lengths[::-1]):
        with asker.driver.scratch():
            assert asker.read(sector, cut) == (0, data)


def check_ranges(asker: Asker, advice: Advice) -> None:
    """Discard and zero as many ranges as the device advises, in one segment and in as many as
    there may be."""
    for request_type, most in (
        (DISCARD, advice.discard_ranges), (WRITE_ZEROES, advice.zero_ranges)
    ):  # fmt: skip
        assert most > 1
        pieces = asker.segments(min(advice.seg_max, 5 * most))
        for count in (1, pieces):
            with asker.driver.scratch():
                _check_ranges(asker, request_type, [(3 * n, 1, 0) for n in range(most)], count)


def _check_ranges(
    asker: Asker, request_type: int, ranges: list[tuple[int, int, int]], pieces: int
) -> None:
    sectors = 3 * len(ranges)
    filler = b"\xa5" * (512 * sectors)
    assert asker.write(0, filler, [len(filler)]) == 0
    assert asker.ranges(request_type, ranges, pieces) == 0
    status, left = asker.read(0, [len(filler)])
    assert status == 0
    zeroes = [n for n in range(sectors) if left[512 * n : 512 * (n + 1)] == bytes(512)]
    named = [sector for sector, _, _ in ranges]
    assert set(zeroes) <= set(named), "what nobody named was zeroed"
    if request_type == WRITE_ZEROES:  # what is discarded may read as anything
        assert zeroes == named
