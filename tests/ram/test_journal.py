"""Checkpoints of RAM: whatever is written, taken and gone back to, RAM is as full copies say."""

from __future__ import annotations

import errno
import mmap
import os
import random
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from pyvmm.errors import HostError, SnapshotError
from pyvmm.memory import GuestMemory
from pyvmm.ram.image import RamImage
from pyvmm.ram.journal import RamJournal
from pyvmm.ram.pages import own_bytes
from pyvmm.ram.write import image_in_memory
from tests.support.ram_images import MIB, PAGE, REGIONS, SIZE, content, in_use, put, scattered

PAGES = SIZE // PAGE
LIMIT = 40 * PAGE


class Checkpoints(RuleBasedStateMachine):
    """A journal beside a dictionary of full copies."""

    def __init__(self) -> None:
        super().__init__()
        self.before = in_use()
        self.memory = GuestMemory(REGIONS)
        self.copies: dict[int, bytes] = {}
        self.image: RamImage | None = None

    @initialize(is_clone=st.booleans())
    def begin(self, is_clone: bool) -> None:
        if is_clone:
            scattered(self.memory)
            with image_in_memory(self.memory) as image:
                self.memory.close()
                self.memory = GuestMemory(REGIONS, image=image)
        self.journal = RamJournal(self.memory, max_bytes=LIMIT)

    @rule(page=st.integers(0, PAGES - 1), count=st.integers(1, 30), seed=st.integers(0, 9))
    def write(self, page: int, count: int, seed: int) -> None:
        for number in range(page, min(page + count, PAGES)):
            put(self.memory, number * PAGE + seed, bytes([seed]) * 99)

    @rule(page=st.integers(0, PAGES - 17))
    def clear(self, page: int) -> None:
        for number in range(page, page + 16):
            put(self.memory, number * PAGE, bytes(PAGE))

    @rule()
    def checkpoint(self) -> None:
        number = self.journal.checkpoint()
        assert number not in self.copies
        self.copies[number] = content(self.memory)
        assert self.journal.numbers[-1] == number
        assert own_bytes(self.memory) == 0

    @precondition(lambda self: bool(self.copies))
    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.journal.numbers))
        self.journal.rewind(number)
        assert content(self.memory) == self.copies[number]
        assert self.journal.numbers[-1] == number

    @precondition(lambda self: bool(set(self.copies) - set(self.journal.numbers)))
    @rule(data=st.data())
    def rewind_to_none(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(sorted(set(self.copies) - set(self.journal.numbers))))
        before = content(self.memory)
        with pytest.raises(SnapshotError, match=f"checkpoint {gone}: is not held"):
            self.journal.rewind(gone)
        assert content(self.memory) == before

    @rule()
    def keep_image(self) -> None:
        if self.image is not None:
            self.image.close()
        self.image = image_in_memory(self.memory)

    @precondition(lambda self: self.image is not None)
    @rule()
    def map_image(self) -> None:
        assert self.image is not None
        self.memory.map_image(self.image)

    @invariant()
    def memory_is_bounded(self) -> None:
        if hasattr(self, "journal"):
            assert self.journal.held_bytes <= LIMIT
            assert list(self.journal.numbers) == sorted(self.journal.numbers)
            assert bool(self.journal.numbers) == bool(self.copies)

    def teardown(self) -> None:
        if hasattr(self, "journal"):
            before = content(self.memory)
            self.journal.close()
            self.journal.close()
            assert content(self.memory) == before
        if self.image is not None:
            self.image.close()
        self.memory.close()
        assert in_use() == self.before


Checkpoints.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
TestCheckpoints = Checkpoints.TestCase


def test_only_the_newest_stays_if_a_step_is_over_the_limit() -> None:
    with GuestMemory(REGIONS) as memory, RamJournal(memory, max_bytes=2 * PAGE) as journal:
        put(memory, 0, bytes([1]) * 64 * PAGE)
        first = journal.checkpoint()
        put(memory, 0, bytes([2]) * PAGE)
        second = journal.checkpoint()
        assert list(journal.numbers) == [first, second]
        put(memory, 0, bytes([3]) * 64 * PAGE)
        third = journal.checkpoint()
        assert list(journal.numbers) == [third]
        assert journal.held_bytes == 0
        put(memory, 0, b"lost")
        journal.rewind(third)
        assert memory.read(0, 64 * PAGE) == bytes([3]) * 64 * PAGE


def test_pages_that_were_zero_cost_no_memory() -> None:
    with GuestMemory(REGIONS) as memory, RamJournal(memory, max_bytes=MIB) as journal:
        empty = journal.checkpoint()
        put(memory, 0, bytes([7]) * 2 * MIB)
        journal.checkpoint()
        assert journal.held_bytes < PAGE
        journal.rewind(empty)
        assert content(memory) == bytes(SIZE)


def test_a_thousand_checkpoints_stay_bounded() -> None:
    chosen = random.Random(5)
    before = in_use()
    limit = MIB // 4
    with GuestMemory([(0, MIB)]) as memory, RamJournal(memory, max_bytes=limit) as journal:
        copies = {}
        for _ in range(1000):
            memory.write(chosen.randrange(MIB // PAGE) * PAGE, chosen.randbytes(PAGE))
            number = journal.checkpoint()
            copies[number] = content(memory)
            copies = {kept: copies[kept] for kept in journal.numbers}
            assert journal.held_bytes <= limit
            if chosen.random() < 0.02:
                back = chosen.choice(journal.numbers)
                journal.rewind(back)
                assert content(memory) == copies[back]
        assert number == 1000
        assert len(journal.numbers) < 300
    assert in_use() == before


@pytest.mark.parametrize("allowed", [0, 1, 7])
def test_a_host_without_memory_leaves_ram_and_checkpoints_as_they_were(
    allowed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.pwrite, [allowed]

    def full(fd: int, data: memoryview, at: int) -> int:
        calls[0] -= 1
        if calls[0] == -1:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return real(fd, data, at)

    with GuestMemory(REGIONS) as memory, RamJournal(memory, max_bytes=4 * MIB) as journal:
        scattered(memory, seed=1)
        first, first_copy = journal.checkpoint(), content(memory)
        scattered(memory, seed=2)
        now = content(memory)
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", full)
            with pytest.raises(HostError, match="Cannot allocate memory"):
                journal.checkpoint()
        assert content(memory) == now
        assert journal.numbers == (first,)
        second = journal.checkpoint()
        assert content(memory) == now
        journal.rewind(first)
        assert content(memory) == first_copy
        with pytest.raises(SnapshotError, match=f"checkpoint {second}"):
            journal.rewind(second)


def test_an_undo_log_that_finds_no_memory_leaves_all_as_it_was(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with GuestMemory(REGIONS) as memory, RamJournal(memory, max_bytes=4 * MIB) as journal:
        scattered(memory, seed=1)
        first, first_copy = journal.checkpoint(), content(memory)
        scattered(memory, seed=2)
        now = content(memory)
        with monkeypatch.context() as patched:
            patched.setattr(mmap, "mmap", refuse)
            with pytest.raises(HostError, match="Cannot allocate memory"):
                journal.checkpoint()
        assert content(memory) == now
        assert journal.numbers == (first,)
        journal.rewind(first)
        assert content(memory) == first_copy


def test_what_is_undone_may_take_several_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does beyond 2 GiB, of which one call reads no more."""
    real = os.preadv

    def little(fd: int, buffers: list[memoryview], at: int) -> int:
        return real(fd, [buffers[0][: 16 * PAGE]], at)

    monkeypatch.setattr(os, "preadv", little)
    with GuestMemory(REGIONS) as memory, RamJournal(memory, max_bytes=4 * MIB) as journal:
        put(memory, 0, bytes([1]) * (50 * PAGE))
        first, first_copy = journal.checkpoint(), content(memory)
        put(memory, 0, bytes([2]) * (50 * PAGE))
        journal.checkpoint()
        journal.rewind(first)
        assert content(memory) == first_copy


def test_without_checkpoints_there_is_no_way_back() -> None:
    with GuestMemory(REGIONS) as memory, RamJournal(memory, max_bytes=MIB) as journal:
        with pytest.raises(SnapshotError, match="checkpoint 1: is not held; there are none"):
            journal.rewind(1)
        assert memory.image is None


def test_shared_ram_has_no_checkpoints() -> None:
    with (
        GuestMemory(REGIONS, shared=True) as memory,
        RamJournal(memory, max_bytes=MIB) as journal,
        pytest.raises(ValueError, match="shared"),
    ):
        journal.checkpoint()


def test_a_checkpoint_costs_what_was_written_not_what_there_is() -> None:
    with GuestMemory([(0, 256 * MIB)]) as memory, RamJournal(memory, max_bytes=MIB) as journal:
        memory.write(0, os.urandom(MIB) * 200)
        began_s = time.perf_counter()
        journal.checkpoint()
        first_s = time.perf_counter() - began_s
        shortest_s = first_s
        for turn in range(20):
            memory.write(turn * 5 * MIB, b"x")
            began_s = time.perf_counter()
            journal.checkpoint()
            shortest_s = min(shortest_s, time.perf_counter() - began_s)
        assert shortest_s < first_s / 10
