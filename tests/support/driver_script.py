"""Hypothesis-made work for the driver half: how a device is set up, batches of requests on its
queues, and a model of the disk they are played against."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

from hypothesis import strategies as st

from pyvmm.driver.errors import QueueFullError
from pyvmm.driver.queue import DRIVER_FEATURES
from pyvmm.virtio.spec import Feature
from tests.support.driver_client import Client

SECTORS = 256
"""Of the disk."""
MOST_SECTORS = 16
"""Of one request."""
BATCH = 12
_WRITES = frozenset({"write", "discard", "write_zeroes"})


class Setup(NamedTuple):
    """How the device is driven."""

    packed: bool
    queues: int
    size: int
    declined: int

    @property
    def features(self) -> int:
        """What the driver accepts of what is offered."""
        ring = 0 if self.packed else int(Feature.RING_PACKED)
        return DRIVER_FEATURES & ~(ring | self.declined)


class Ask(NamedTuple):
    """A request of queue ``queue`` (modulo how many there are); its data is cut at ``cuts``."""

    kind: str
    queue: int
    sector: int
    sectors: int
    fill: int
    cuts: list[int]
    unmap: bool

    @property
    def offset(self) -> int:
        """The first byte on the disk."""
        return self.sector * 512

    @property
    def length(self) -> int:
        """Bytes; 0 for a request that is about no range."""
        return self.sectors * 512 if self.kind in _WRITES or self.kind == "read" else 0

    def collides(self, other: Ask) -> bool:
        """Whether the order of the two matters: the device may do a batch in any."""
        either_writes = self.kind in _WRITES or other.kind in _WRITES
        overlap = (
            self.offset < other.offset + other.length and other.offset < self.offset + self.length
        )
        return either_writes and overlap


setups = st.builds(
    Setup,
    packed=st.booleans(),
    queues=st.integers(1, 8),
    size=st.sampled_from([8, 16, 64]),
    declined=st.sampled_from(
        [0, 0, *map(int, (Feature.INDIRECT_DESC, Feature.EVENT_IDX)),
         int(Feature.INDIRECT_DESC | Feature.EVENT_IDX)]
    ),
)
asks = st.builds(
    Ask,
    kind=st.sampled_from(["read", "read", "write", "write", "discard", "write_zeroes", "flush"]),
    queue=st.integers(0, 7),
    sector=st.integers(0, SECTORS - MOST_SECTORS),
    sectors=st.integers(1, MOST_SECTORS),
    fill=st.integers(1, 255),
    cuts=st.lists(st.integers(0, MOST_SECTORS * 512), max_size=3),
    unmap=st.booleans(),
)
scripts = st.lists(st.lists(asks, min_size=1, max_size=BATCH), min_size=1, max_size=6)


def play(client: Client, disk: bytearray, script: list[list[Ask]]) -> None:
    """Have every batch done, on ``client`` and on ``disk``, the model; each request has to come
    back once, with success and, if it reads, with what the model has.

    Discarded sectors read as zeroes, as those of a raw file do.
    """
    for batch in script:
        wanted: dict[int, bytes] = {}
        left = [0] * len(client.queues)
        asked: list[Ask] = []
        for number, ask in enumerate(batch):
            if any(ask.collides(other) for other in asked):
                continue
            asked.append(ask)
            queue = ask.queue % len(client.queues)
            try:
                _submit(client, queue, number, ask)
            except QueueFullError:
                _collect(client, queue, left[queue])
                left[queue] = 0
                _submit(client, queue, number, ask)
            left[queue] += 1
            place = slice(ask.offset, ask.offset + ask.length)
            if ask.kind == "read":
                wanted[number] = bytes(disk[place])
            elif ask.kind == "write":
                disk[place] = _data(number, ask)
            else:
                disk[place] = bytes(ask.length)
        for queue, count in enumerate(left):
            client.notify(queue)  # all of them first: they are served at the same time
            assert client.queues[queue].in_flight == count
        for queue, count in enumerate(left):
            _collect(client, queue, count)
        for number, data in wanted.items():
            assert client.buffer(number, len(data)) == data


def _submit(client: Client, queue: int, number: int, ask: Ask) -> None:
    driver = client.queues[queue]
    if ask.kind == "flush":
        driver.flush(number)
    elif ask.kind == "discard":
        driver.discard(ask.offset, ask.length, number)
    elif ask.kind == "write_zeroes":
        driver.write_zeroes(ask.offset, ask.length, number, unmap=ask.unmap)
    else:
        buffer = client.buffer(number, ask.length)
        buffer[:] = _data(number, ask)
        ends = [0, *sorted(min(cut, ask.length) for cut in ask.cuts), ask.length]
        pieces = [buffer[a:b] for a, b in itertools.pairwise(ends)]
        submit: Callable[..., None] = driver.readv if ask.kind == "read" else driver.writev
        try:
            submit(ask.offset, pieces, number)
        finally:
            for piece in pieces:
                piece.release()


def _data(number: int, ask: Ask) -> bytes:
    """What a write writes, and what is in a reader's buffer before."""
    return bytes([ask.fill, number]) * (ask.length // 2)


def _collect(client: Client, queue: int, count: int) -> None:
    rets = client.rets(count, queue)
    assert set(rets.values()) <= {0}, rets
