"""A block driver that keeps to every rule of virtio and uses all the freedom they leave.

``LegalQueue`` offers random requests in random framing, and checks each answer against a model of
the disk once, when it is used.  ``MirroredMemory`` tells whether anything else of RAM was touched.
"""

from __future__ import annotations

import random
import struct
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from pyvmm.memory import GuestMemory, Region
from pyvmm.virtio.spec import Feature
from tests.support.block_model import (
    DISCARD,
    GET_ID,
    IN,
    OUT,
    UNMAP,
    WRITE_ZEROES,
    Ask,
    Model,
    Segment,
    pieces,
)
from tests.support.packed_driver import PackedDriver, pack
from tests.support.virtio_driver import (
    INDIRECT,
    STATUS_POISON,
    BlockDriver,
    Descriptor,
    linked,
    readable,
    writable,
)

ZERO_SECTORS = 1 << 14
"""Sectors of a large write-zeroes: 8 MiB, of which eight are more than a pass serves."""
QUEUE_SECTORS = ZERO_SECTORS + 512
"""Sectors of the disk that are one queue's, so that the order of queues does not matter."""
ROOM_POISON = 0xA5
GAP = 3
"""Bytes between buffers, at the most."""
MAX_PIECES, MANY_PIECES = 7, 60
"""Descriptors of nearly all chains, and of the others."""


class MirroredMemory:
    """Guest RAM as a driver uses it: ``wanted`` is what the driver must find there."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self.wanted = [bytearray(region.view) for region in memory.regions]

    @property
    def regions(self) -> Sequence[Region]:
        return self._memory.regions

    def read(self, gpa: int, length: int) -> bytes:
        return self._memory.read(gpa, length)

    def read_int(self, gpa: int, size: int) -> int:
        return self._memory.read_int(gpa, size)

    def write(self, gpa: int, data: bytes) -> None:
        self._memory.write(gpa, data)
        self.expect(gpa, data)

    def write_int(self, gpa: int, size: int, value: int) -> None:
        self.write(gpa, value.to_bytes(size, "little"))

    def expect(self, gpa: int, data: bytes) -> None:
        """The device has to have written ``data`` at ``gpa``."""
        for region, wanted in zip(self.regions, self.wanted, strict=True):
            if region.gpa <= gpa < region.end:
                wanted[gpa - region.gpa : gpa - region.gpa + len(data)] = data

    def check(self) -> None:
        """AssertionError, with the first few places, unless RAM is as the driver expects."""
        for region, wanted in zip(self.regions, self.wanted, strict=True):
            found = bytes(region.view)
            if found != wanted:
                pairs = enumerate(zip(found, wanted, strict=True))
                wrong = [f"{region.gpa + i:#x}: {a:#x} for {b:#x}" for i, (a, b) in pairs if a != b]
                raise AssertionError(f"RAM was touched at {len(wrong)} bytes: {wrong[:8]}")


class Arena:
    """RAM for requests, from ``start`` to ``end``; given back in the order it was taken."""

    def __init__(self, start: int, end: int) -> None:
        self._start, self._end = start, end
        self._taken: deque[tuple[int, int]] = deque()

    def take(self, length: int) -> int | None:
        """The GPA of ``length`` bytes; None if there is no room."""
        gpa, limit = self._start, self._end
        if self._taken:
            oldest, last = self._taken[0][0], self._taken[-1][1]
            if last > oldest and last + length <= limit:
                gpa = last
            elif last > oldest:
                limit = oldest
            else:
                gpa, limit = last, oldest
        if gpa + length > limit or (self._taken and gpa + length == limit):
            return None
        self._taken.append((gpa, gpa + length))
        return gpa

    def give_back(self) -> None:
        """The oldest piece may be used again."""
        self._taken.popleft()

    def undo(self) -> None:
        """The newest piece was not needed."""
        self._taken.pop()

    def clear(self) -> None:
        """All of it may be used again."""
        self._taken.clear()


class Pending(NamedTuple):
    """A request that was offered: what the device may write, and what it occupies."""

    head: int
    ask: Ask
    room: list[tuple[int, int]]
    indices: list[int]
    """Of the descriptor table; of a packed ring only their number counts."""


class Habits(NamedTuple):
    """How a driver goes about it: chances from 0 to 1, and what it asks."""

    far: float
    """A buffer in the second region of RAM."""
    plain: float
    """Framing that every driver uses: header, one buffer, status."""
    indirect: float
    large_zeroes: float
    sequential: float
    """A request of the same kind that goes on where the last one ended."""
    order: str
    """In which order descriptors are taken: "last" (as Linux does), "next" or "any"."""
    kinds: Sequence[int]


class LegalQueue:
    """The driver of one queue and its requests; ``model`` is of the disk, ``first_sector`` that
    of the queue's own part."""

    def __init__(
        self,
        driver: BlockDriver,
        memory: MirroredMemory,
        arenas: tuple[Arena, Arena],
        model: Model,
        features: int,
        *,
        habits: Habits,
        rng: random.Random,
        longest_table: int,
    ) -> None:
        self.driver = driver
        self.habits = habits
        self._memory = memory
        self._arenas = arenas
        self._model = model
        self._first_sector = driver.index * QUEUE_SECTORS
        self._rng = rng
        self._features = features
        # Indirect tables may be longer than the ring, as Linux's are.
        self._longest = longest_table if features & Feature.INDIRECT_DESC else driver.size
        self._is_packed = isinstance(driver, PackedDriver)
        self.waiting: deque[Pending] = deque()
        self._answered: deque[Pending] = deque()
        """Those whose descriptors and RAM the driver has not taken back yet."""
        self._free = list(range(driver.size))
        if habits.order == "any" and not features & Feature.IN_ORDER:
            rng.shuffle(self._free)
        self._interrupts = True  # for each used buffer
        self._event: int | None = None  # of self.used, with EVENT_IDX
        self.used = 0
        """Elements of a split ring, or slots of a packed one, that were used so far."""
        self._end: tuple[int, int] | None = None
        self.answers = 0
        for arena in arenas:
            arena.clear()

    # Offering

    def offer(self) -> bool:
        """Make one more request available; False if there is no room for it."""
        rng, driver = self._rng, self.driver
        ask = self._new_ask()
        readables, writables = self._cut(ask)
        count = len(readables) + len(writables)
        direct = count  # descriptors in the ring itself
        if self._features & Feature.INDIRECT_DESC and (
            rng.random() < self.habits.indirect or count > len(self._free)
        ):
            direct = 0
            if not self._is_packed and count <= driver.size and rng.random() < 0.1:
                direct = rng.randrange(count)  # and the rest in a table: 2.7.5.3.2
        if direct + (direct < count) > len(self._free):
            return False
        blocks = self._take_ram(sum(map(len, readables + writables)) + (16 + GAP) * (count + 1))
        if blocks is None:
            return False

        def place(data: bytes, alignment: int = 1) -> int:
            nonlocal blocks
            assert blocks is not None
            which = rng.random() < self.habits.far
            gpa = -(-(blocks[which] + rng.choice((0, 0, 1, GAP))) // alignment) * alignment
            blocks = (blocks[0], gpa + len(data)) if which else (gpa + len(data), blocks[1])
            self._memory.write(gpa, data)
            return gpa

        chain = [readable(place(piece), len(piece)) for piece in readables]
        room = [(place(piece), len(piece)) for piece in writables]
        chain += [writable(*piece) for piece in room]
        if direct < count:
            table = chain[direct:]
            if self._is_packed:
                raw = b"".join(pack(d.gpa, d.length, rng.getrandbits(16), d.flags) for d in table)
            else:
                raw = b"".join(d.pack() for d in linked(table))
            chain[direct:] = [Descriptor(place(raw, 16), len(raw), INDIRECT)]
        indices = self._take_descriptors(len(chain))
        head = indices[0]
        if isinstance(driver, PackedDriver):
            driver.place(chain, head)
        else:
            driver.place_at(chain, indices)
        self.waiting.append(Pending(head, ask, room, indices))
        return True

    def _take_descriptors(self, count: int) -> list[int]:
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def _take_ram(self, length: int) -> tuple[int, int] | None:
        """Room for ``length`` bytes in either arena, with gaps."""
        gpas: list[int] = []
        for arena in self._arenas:
            gpa = arena.take(length)
            if gpa is None:
                if gpas:
                    self._arenas[0].undo()
                return None
            gpas.append(gpa)
        return gpas[0], gpas[1]

    def _new_ask(self) -> Ask:
        """A request that a driver may make, though the device may have to refuse it."""
        rng = self._rng
        kind = rng.choice(self.habits.kinds)
        sector = self._first_sector + rng.randrange(QUEUE_SECTORS - 32)
        if rng.random() < 0.5:  # close together, so that neighbours are merged and overwritten
            sector = self._first_sector + rng.randrange(32)
        count = rng.choice((1, 1, 2, 8, rng.randrange(1, 17)))
        if self._end and rng.random() < self.habits.sequential:
            kind, sector = self._end
        self._end = (kind, sector + count) if sector % 64 + count < 64 else None
        payload, room, segments = b"", 0, []
        if kind == OUT:
            stamp = rng.randrange(1 << 60)
            payload = b"".join(struct.pack("<QQ", stamp, i) * 32 for i in range(count))
        elif kind == IN:
            room = 512 * count
        elif kind == GET_ID:
            room = 20
        elif kind in (DISCARD, WRITE_ZEROES):
            segments = [Segment(sector, count, rng.choice((0, UNMAP)) if kind != DISCARD else 0)]
            if rng.random() < self.habits.large_zeroes:
                segments = [Segment(self._first_sector + rng.randrange(256), ZERO_SECTORS, 0)]
            elif rng.random() < 0.3:
                segments = [segments[0]._replace(sector=segments[0].sector + i) for i in range(9)]
            payload = b"".join(segment.pack() for segment in segments)
        if rng.random() < 0.03:
            sector = len(self._model.sectors) - (count > 1)  # behind the end, or across it
        return Ask(kind, sector, payload, room, segments, ([], []), False)

    def _cut(self, ask: Ask) -> tuple[list[bytes], list[bytes]]:
        """The readable and the writable bytes of ``ask``, each in the pieces of its chain."""
        rng = self._rng
        request = struct.pack("<IIQ", ask.type, 0, ask.sector) + ask.payload
        room = bytes([ROOM_POISON]) * ask.room + bytes([STATUS_POISON])
        front, back = ([16] if ask.payload else []), ([ask.room] if ask.room else [])
        if rng.random() >= self.habits.plain:
            front = [cut for cut in front if rng.random() < 0.7]
            back = [cut for cut in back if rng.random() < 0.7]
            many = MANY_PIECES if rng.random() < 0.05 else MAX_PIECES
            for _ in range(rng.randrange(many - 3)):
                cuts, end = rng.choice(((front, len(request)), (back, len(room))))
                cuts.append(rng.randrange(1, end) if end > 1 else 0)
        while len(front) + len(back) + 2 > self._longest:
            longest = max(front, back, key=len)
            longest.pop(rng.randrange(len(longest)))
        readables = [piece for piece in pieces(request, front) if piece]
        return readables, [piece for piece in pieces(room, back) if piece]

    # What comes back

    def see(self) -> int:
        """Check what the device has used since the last call: each request once, in order, with
        the data, status and length that the model says.  How many there were."""
        used = self.driver.reap()
        for head, length in used:
            assert self.waiting, f"head {head} was used, and nothing is outstanding"
            pending = self.waiting.popleft()
            assert head == pending.head, f"head {head} was used before {pending.head}"
            answer = self._model.answer(pending.ask)
            assert length == answer.used_length, (
                f"{length} bytes, not {answer.used_length}, used by head {head}: type"
                f" {pending.ask.type} at sector {pending.ask.sector}"
            )
            rest = answer.data
            for gpa, size in pending.room:
                self._memory.expect(gpa, rest[:size])
                rest = rest[size:]
            gpa, size = pending.room[-1]
            self._memory.expect(gpa + size - 1, bytes([answer.status]))
            self._answered.append(pending)
            self.used += len(pending.indices) if self._is_packed else 1
        self.answers += len(used)
        return len(used)

    def ignore_device_areas(self) -> None:
        """What the device wrote into the ring itself is read by ``see``: take it as expected."""
        driver, size = self.driver, self.driver.size
        areas = [(driver.used, 6 + 8 * size)]
        if self._is_packed:
            areas = [(driver.desc, 16 * size), (driver.used, 4)]
        for gpa, length in areas:
            self._memory.expect(gpa, self._memory.read(gpa, length))

    def collect(self, most: int) -> None:
        """Take descriptors and RAM of up to ``most`` answered requests back."""
        for _ in range(min(most, len(self._answered))):
            indices = self._answered.popleft().indices
            if self.habits.order == "last" and not self._features & Feature.IN_ORDER:
                self._free = indices + self._free
            else:
                self._free += indices
            if self.habits.order == "any" and not self._features & Feature.IN_ORDER:
                self._rng.shuffle(self._free)
            for arena in self._arenas:
                arena.give_back()

    def forget(self) -> None:
        """The queue was reset: the requests that were not answered never happened."""
        self.waiting.clear()

    # Interrupts

    def choose_interrupts(self) -> None:
        """Ask for interrupts in another way."""
        rng, driver = self._rng, self.driver
        self._event = None
        if driver.event_idx and rng.random() < 0.7:
            ahead = rng.randrange(1, 4)
            driver.interrupt_after(min(ahead, driver.size))
            self._event = self.used + min(ahead, driver.size) - 1
        elif not driver.event_idx:
            self._interrupts = rng.random() < 0.7
            driver.want_interrupts(self._interrupts)

    def wants_interrupt(self, before: int) -> bool:
        """Whether an interrupt has to come of what was used since ``used`` was ``before``."""
        if self.driver.event_idx:
            return self._event is not None and before <= self._event < self.used
        return self._interrupts and self.used > before
