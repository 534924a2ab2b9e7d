"""RAM against an image that it is not mapped over: each page that differs, and no other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import HostError
from pyvmm.memory import GuestMemory
from pyvmm.ram.compare import differing_runs
from pyvmm.ram.image import RamImage
from pyvmm.ram.journal import RamJournal
from pyvmm.ram.live import fork_writer
from pyvmm.ram.write import image_in_memory, write_ram
from tests.support.patience import patient
from tests.support.ram_images import MIB, PAGE, REGIONS, SIZE, content, put

PLACES = st.lists(st.tuples(st.integers(0, SIZE // PAGE - 1), st.integers(0, 2)), max_size=9)
"""Pages, and the byte that is put at their end."""


def fill(memory: GuestMemory, places: list[tuple[int, int]]) -> None:
    for page, value in places:
        put(memory, page * PAGE + PAGE - 1, bytes([value]))


@settings(max_examples=40, deadline=None)
@given(first=PLACES, second=PLACES, third=PLACES, other=PLACES)
def test_the_pages_that_differ_are_found_in_a_chain(
    first: list[tuple[int, int]],
    second: list[tuple[int, int]],
    third: list[tuple[int, int]],
    other: list[tuple[int, int]],
) -> None:
    with GuestMemory(REGIONS) as memory:
        for places in (first, second, third):
            fill(memory, places)
            with image_in_memory(memory) as image:
                memory.map_image(image)
        chain = image_in_memory(memory)
        expected = content(memory)
    with chain, GuestMemory(REGIONS) as memory:
        fill(memory, other)
        now = content(memory)
        found = {
            page for offset, length in differing_runs(memory, chain)
            for page in range(offset // PAGE, (offset + length) // PAGE)
        }
        assert found == {
            page for page in range(SIZE // PAGE)
            if now[page * PAGE : (page + 1) * PAGE] != expected[page * PAGE : (page + 1) * PAGE]
        }


@pytest.mark.parametrize("live", [False, True])
def test_a_diff_after_a_checkpoint_is_over_the_image_it_is_told(live: bool) -> None:
    with GuestMemory(REGIONS) as memory:
        put(memory, MIB, b"of the base")
        base = image_in_memory(memory)
    with base, GuestMemory(REGIONS, image=base) as clone:
        put(clone, 2 * MIB, b"before the checkpoint")
        with RamJournal(clone, max_bytes=MIB) as journal:
            journal.checkpoint()
            put(clone, 4 * MIB, b"after it")
            fd = os.memfd_create("diff", os.MFD_ALLOW_SEALING)
            if live:
                with fork_writer(clone, fd, over=base) as writer:
                    written = writer.wait(patient(60))
            else:
                written = write_ram(clone, fd, over=base)
        assert written.runs == ((2 * MIB, PAGE), (4 * MIB, PAGE))
        with base.over_memfd(fd, written.runs) as diff, GuestMemory(REGIONS, image=diff) as again:
            assert content(again) == content(clone)


def test_reading_the_holes_of_an_image_uses_no_memory() -> None:
    with GuestMemory(REGIONS) as memory:
        put(memory, 0, b"x")
        with image_in_memory(memory) as image:
            before = os.fstat(image.layers[0].fd).st_blocks
            put(memory, 0, b"y" * 3 * MIB)
            assert differing_runs(memory, image) == [(0, 3 * MIB)]
            assert os.fstat(image.layers[0].fd).st_blocks == before


def test_an_image_that_is_cut_off_is_told(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    with GuestMemory(REGIONS) as memory:
        put(memory, SIZE - 1, b"x")
        with path.open("xb") as file:
            write_ram(memory, file.fileno())
        with RamImage.open_file(str(path), SIZE) as image:
            os.truncate(path, MIB)  # somebody who cares for no lock
            with pytest.raises(HostError, match="cut off"):
                differing_runs(memory, image)
