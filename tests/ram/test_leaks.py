"""Many threads, many clones: no descriptor, mapping, thread or child is left."""

from __future__ import annotations

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pyvmm.memory import GuestMemory
from pyvmm.ram.image import RamImage
from pyvmm.ram.journal import RamJournal
from pyvmm.ram.live import fork_writer
from pyvmm.ram.pages import drop_own, own_runs
from pyvmm.ram.write import image_in_memory, write_ram
from tests.support.patience import patient
from tests.support.ram_images import MIB, PAGE, REGIONS, SIZE, content, in_use, put, scattered

THREADS, TURNS = 4, 20


def mappings() -> int:
    return Path("/proc/self/maps").read_text("utf-8", "replace").count("\n")


def children() -> str:
    return "".join(
        path.read_text("ascii") for path in Path("/proc/self/task").glob("*/children")
    )


def life(image: RamImage, expected: bytes, seed: int) -> None:
    """All that can be done with a clone, in an order that ``seed`` chooses."""
    chosen = random.Random(seed)
    own = image.share()
    with own, GuestMemory(REGIONS, image=own) as clone:
        assert content(clone) == expected
        scattered(clone, seed=seed, count=3)
        step = chosen.randrange(4)
        if step == 0:
            with image_in_memory(clone) as more, GuestMemory(REGIONS, image=more) as child:
                assert content(child) == content(clone)
        elif step == 1:
            before = content(clone)
            with RamJournal(clone, max_bytes=MIB) as journal:
                number = journal.checkpoint()
                scattered(clone, seed=seed + 1)
                journal.rewind(number)
                assert content(clone) == before
        elif step == 2:
            fd = os.memfd_create("live")
            try:
                with fork_writer(clone, fd, over=image) as writer:
                    put(clone, 0, b"later")
                    if chosen.random() < 0.5:
                        writer.wait(patient(60))
            finally:
                os.close(fd)
        else:
            drop_own(clone)
            assert own_runs(clone) == []
            assert content(clone) == expected


def test_nothing_is_left_of_a_hundred_clones_in_four_threads(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    with GuestMemory(REGIONS) as memory, path.open("xb") as file:
        scattered(memory)
        write_ram(memory, file.fileno())
        expected = content(memory)
    before, descendants, maps = in_use(), children(), list[int]()
    for _ in range(2):
        with RamImage.open_file(str(path), SIZE) as image, ThreadPoolExecutor(THREADS) as pool:
            lives = [pool.submit(life, image, expected, seed) for seed in range(THREADS * TURNS)]
            for one in lives:
                one.result(patient(120))
        assert in_use() == before
        assert children() == descendants
        maps.append(mappings())
    assert maps[1] <= maps[0] + TURNS // 2  # the allocator's own; a leak is one a life


def test_an_image_is_closed_once_whoever_is_last() -> None:
    before = in_use()
    with GuestMemory([(0, PAGE)]) as memory:
        image = image_in_memory(memory)
    handles = [image.share() for _ in range(64)]
    start = threading.Barrier(8)

    def close(number: int) -> None:
        start.wait()
        for handle in handles[number::8]:
            handle.share().close()
            handle.close()

    threads = [threading.Thread(target=close, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert in_use()[0] == before[0] + 1
    image.close()
    assert in_use() == before
