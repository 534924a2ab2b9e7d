"""What hypothesis draws for rings: honest requests, and damage done to their descriptors.

Rounds begin as honest requests in honest rings and are then damaged in a few places, because
rings of pure noise seldom get past their first descriptor.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from hypothesis import strategies as st

from tests.support.packed_driver import PackedDriver, pack
from tests.support.rig import DISK_SECTORS
from tests.support.virtio_driver import (
    INDIRECT,
    RAM_BASE,
    BlockDriver,
    Descriptor,
    linked,
    readable,
    writable,
)

SIZE = 16
RAM_BYTES = 1 << 16
RAM_END = RAM_BASE + RAM_BYTES
# The arena, behind the rings: request i has header, status and an indirect table at index i.
HEADERS = RAM_BASE + 0x1000
STATUSES = RAM_BASE + 0x1800
TABLES = RAM_BASE + 0x2000
TABLE_BYTES = 16 * 8
DATA = RAM_BASE + 0x4000


class Ask(NamedTuple):
    """A request; ``pieces`` are the lengths of its data buffers."""

    type: int
    sector: int
    pieces: list[int]
    device_writes: bool
    indirect: bool


class Damage(NamedTuple):
    """``descriptor`` in place of number ``entry`` of the descriptor table (``table`` < 0) or of
    an indirect one."""

    table: int
    entry: int
    descriptor: Descriptor


class Round(NamedTuple):
    """What the driver offers between two notifications."""

    asks: list[Ask]
    damages: list[Damage]
    extra_heads: list[int]


gpas = st.one_of(
    st.integers(0, 7).map(lambda i: HEADERS + 16 * i),
    st.integers(0, 7).map(lambda i: TABLES + TABLE_BYTES * i),
    st.integers(0, 64).map(lambda i: DATA + 256 * i),
    st.sampled_from([0, RAM_BASE - 1, RAM_END - 8, RAM_END, 2**63, 2**64 - 16, 2**64 - 1]),
)
lengths = st.one_of(
    st.sampled_from([0, 1, 8, 16, 32, 48, 128, 511, 512, 513, 1024, 4096]),
    st.integers(0, 2**32 - 1),
)
descriptors = st.builds(
    Descriptor,
    gpas,
    lengths,
    st.one_of(st.integers(0, 7), st.integers(0, 0xFFFF)),
    st.one_of(st.integers(0, SIZE - 1), st.integers(0, 0xFFFF)),
)
asks = st.builds(
    Ask,
    st.sampled_from([0, 0, 0, 1, 1, 4, 8, 11, 13, 77]),
    st.one_of(st.integers(0, DISK_SECTORS), st.integers(0, 2**64 - 1)),
    st.one_of(
        st.sampled_from([[512], [512], [1024, 512], [1, 511], [200, 300, 12], []]),
        st.lists(st.sampled_from([0, 1, 20, 511, 512, 1024]), max_size=4),
    ),
    st.booleans(),
    st.booleans(),
)
damages = st.builds(Damage, st.integers(-4, 7), st.integers(0, SIZE - 1), descriptors)
rounds = st.builds(
    Round,
    st.lists(asks, min_size=1, max_size=8),
    st.one_of(st.just([]), st.lists(damages, max_size=3)),
    st.one_of(st.just([]), st.just([]), st.lists(st.integers(0, SIZE), max_size=SIZE)),
)


def chain_of(driver: BlockDriver, index: int, ask: Ask) -> list[Descriptor]:
    """Write request ``index``'s header into RAM; its chain, not yet linked."""
    driver.memory.write(HEADERS + 16 * index, struct.pack("<IIQ", ask.type, 0, ask.sector))
    buffer = writable if ask.device_writes else readable
    chain = [readable(HEADERS + 16 * index, 16)]
    chain += [buffer(DATA + 0x1000 * j, n) for j, n in enumerate(ask.pieces)]
    return [*chain, writable(STATUSES + index, 1)]


def lay_out(
    driver: BlockDriver, a_round: Round, may_indirect: bool
) -> tuple[list[Descriptor], list[int]]:
    """Write the round's requests into RAM and the descriptor table of a split ring; that table,
    and the heads."""
    table: list[Descriptor] = []
    heads: list[int] = []
    for i, ask in enumerate(a_round.asks):
        chain = chain_of(driver, i, ask)
        if may_indirect and ask.indirect:
            inner = b"".join(d.pack() for d in linked(chain))
            driver.memory.write(TABLES + TABLE_BYTES * i, inner)
            chain = [Descriptor(TABLES + TABLE_BYTES * i, len(inner), INDIRECT)]
        if len(table) + len(chain) > SIZE:
            break
        heads.append(len(table))
        table += linked(chain, len(table))
    table += [Descriptor(0, 0)] * (SIZE - len(table))
    for damage in a_round.damages:
        if damage.table < 0:
            table[damage.entry] = damage.descriptor
        else:
            gpa = TABLES + TABLE_BYTES * damage.table + 16 * (damage.entry % 8)
            driver.memory.write(gpa, damage.descriptor.pack())
    driver.write_table(table)
    return table, heads + a_round.extra_heads


def place_round(driver: PackedDriver, a_round: Round, may_indirect: bool) -> list[int]:
    """Put the round's requests into a packed ring and damage them; their buffer IDs."""
    placed: list[int] = []
    free = SIZE
    for i, ask in enumerate(a_round.asks):
        chain = chain_of(driver, i, ask)
        if may_indirect and ask.indirect:
            inner = b"".join(pack(d.gpa, d.length, 0, d.flags) for d in chain)
            driver.memory.write(TABLES + TABLE_BYTES * i, inner)
            chain = [Descriptor(TABLES + TABLE_BYTES * i, len(inner), INDIRECT)]
        free -= len(chain)
        if free < 0:
            break
        driver.place(chain, 100 + i)
        placed.append(100 + i)
    for damage in a_round.damages:
        gpa, length, flags, buffer_id = damage.descriptor
        if damage.table < 0:
            owner = driver.owner if damage.entry % 2 else 0  # half of them not quite so wild
            driver.write_slot(damage.entry, damage.descriptor, buffer_id, owner)
        else:
            table = TABLES + TABLE_BYTES * damage.table + 16 * (damage.entry % 8)
            driver.memory.write(table, pack(gpa, length, buffer_id, flags))
    return placed


def permit(mask: bytearray, gpa: int, length: int) -> None:
    """Set the bytes of ``mask`` that stand for ``length`` bytes of RAM at ``gpa``, if any."""
    if gpa < RAM_END and gpa + length > RAM_BASE:
        first, end = max(gpa, RAM_BASE), min(gpa + length, RAM_END)
        mask[first - RAM_BASE : end - RAM_BASE] = b"\1" * (end - first)


def forbidden_changes(before: bytes, after: bytes, mask: bytearray) -> list[str]:
    """Where ``after`` differs from ``before`` although ``mask`` does not allow it."""
    found = []
    for page in range(0, len(before), 4096):
        old, new = before[page : page + 4096], after[page : page + 4096]
        if old != new:
            found += [hex(page + i) for i in range(4096) if old[i] != new[i] and not mask[page + i]]
    return found
