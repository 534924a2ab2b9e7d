"""Own pages: all that differ from the image are among them, whichever way the kernel tells."""

from __future__ import annotations

import errno
import fcntl
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.memory import GuestMemory
from pyvmm.ram.image import RamImage
from pyvmm.ram.pages import drop_own, held_runs, own_bytes, own_runs
from pyvmm.ram.runs import Run
from pyvmm.ram.write import image_in_memory
from tests.support.ram_images import MIB, PAGE, REGIONS, SIZE, content, put, scattered


@pytest.fixture(params=["scan", "read"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """PAGEMAP_SCAN if this kernel has it, or a kernel without it."""
    if request.param == "read":

        def refuse(fd: int, request: int, argument: object = 0) -> int:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))

        monkeypatch.setattr(fcntl, "ioctl", refuse)
    return str(request.param)


@pytest.fixture
def image() -> Iterator[RamImage]:
    with GuestMemory(REGIONS) as memory:
        scattered(memory)
        image = image_in_memory(memory)
    with image:
        yield image


def pages_of(runs: list[Run]) -> set[int]:
    return {page for o, n in runs for page in range(o // PAGE, (o + n) // PAGE)}


def test_own_pages_are_those_that_were_written(way: str, image: RamImage) -> None:
    chosen = random.Random(3)
    with GuestMemory(REGIONS, image=image) as memory:
        content(memory)  # to read a page does not make it one's own
        assert own_runs(memory) == []
        written = set(chosen.sample(range(SIZE // PAGE), 200)) | {0, SIZE // PAGE - 1}
        for page in written:
            put(memory, page * PAGE + chosen.randrange(PAGE), b"x")
        assert pages_of(own_runs(memory)) == written
        assert own_bytes(memory) == len(written) * PAGE
        drop_own(memory)
        assert own_runs(memory) == []


def test_neighbours_are_one_run(way: str, image: RamImage) -> None:
    with GuestMemory(REGIONS, image=image) as memory:
        put(memory, MIB, bytes(5 * PAGE))
        assert own_runs(memory) == [(MIB, 5 * PAGE)]


def test_a_run_goes_on_in_the_next_region(way: str, image: RamImage) -> None:
    with GuestMemory(REGIONS, image=image) as memory:
        first, second = memory.regions
        memory.write(first.end - PAGE, b"x")
        memory.write(second.gpa, b"x")
        assert own_runs(memory) == [(second.position - PAGE, 2 * PAGE)]


def test_of_memory_without_an_image_the_touched_pages_count(way: str) -> None:
    with GuestMemory(REGIONS) as memory:
        assert own_runs(memory) == []
        put(memory, 5 * PAGE, b"x")
        put(memory, SIZE - 1, b"x")
        assert pages_of(own_runs(memory)) >= {5, SIZE // PAGE - 1}
        assert own_bytes(memory) < SIZE


def test_more_pages_than_are_asked_for_at_once(way: str) -> None:
    size = 600 * MIB
    with GuestMemory([(0, size)]) as empty, image_in_memory(empty) as image:
        memory = GuestMemory([(0, size)], image=image)
    with memory:
        written = set(range(3, size // PAGE, 17))
        assert len(written) > 8192
        for page in written:
            memory.write(page * PAGE, b"x")
        assert pages_of(own_runs(memory)) == written


def test_pages_that_were_swapped_out_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No swap is needed for it: pagemap is a file here, which says what a kernel would."""
    kinds = {
        "absent": 0,
        "mine": 1 << 63,
        "of the file": 1 << 63 | 1 << 61,
        "swapped": 1 << 62,
        "of the file, migrating": 1 << 62 | 1 << 61,
        "mine, soft dirty, one mapping": 1 << 63 | 1 << 55 | 1 << 56,
    }
    with GuestMemory([(0, MIB)]) as memory:
        first = memory.regions[0].host_address // PAGE
        pagemap = tmp_path / "pagemap"
        with pagemap.open("wb") as file:
            os.truncate(file.fileno(), (first + MIB // PAGE) * 8)
            for number, entry in enumerate(kinds.values()):
                os.pwrite(file.fileno(), entry.to_bytes(8, "little"), (first + number) * 8)
        real_open = os.open
        monkeypatch.setattr(os, "open", lambda path, flags: real_open(
            pagemap if path == "/proc/self/pagemap" else path, flags
        ))  # fmt: skip
        assert own_runs(memory) == [(PAGE, PAGE), (3 * PAGE, PAGE), (5 * PAGE, PAGE)]


def test_what_is_held_is_the_image_s_data_and_the_own_pages(way: str, image: RamImage) -> None:
    with GuestMemory(REGIONS, image=image) as memory:
        put(memory, 4 * MIB + 5, b"own")
        held = pages_of(held_runs(memory))
        data = content(memory)
        assert {
            page for page in range(SIZE // PAGE) if any(data[page * PAGE : (page + 1) * PAGE])
        } <= held
        assert len(held) < SIZE // PAGE


def test_shared_memory_has_no_own_pages() -> None:
    with GuestMemory(REGIONS, shared=True) as memory, pytest.raises(ValueError, match="shared"):
        own_runs(memory)


def test_no_descriptor_is_left() -> None:
    with GuestMemory(REGIONS) as memory:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            own_runs(memory)
        assert len(os.listdir("/proc/self/fd")) == before
