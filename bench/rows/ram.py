"""Guest RAM as an image, without a guest: what a snapshot, a rewind and a checkpoint cost of it."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import BinaryIO

from bench.figures import Figure, Limit
from bench.host import Host
from bench.peers import Contender
from bench.suite import Reading, Suite
from pyvmm.memory import GuestMemory
from pyvmm.ram.compare import differing_runs
from pyvmm.ram.image import RamImage
from pyvmm.ram.journal import RamJournal
from pyvmm.ram.live import fork_writer
from pyvmm.ram.pages import drop_own, own_runs
from pyvmm.ram.write import image_in_memory, write_ram

MIB, PAGE = 1 << 20, 4096
SIZE, TOUCHED = 1024 * MIB, 256 * MIB
OWN_PAGES = 1000
PAUSE = Figure(
    key="ram.live", name="pause for RAM of a live snapshot, 1 GiB, 256 MiB touched", unit="ms",
    ours=Limit("<= 10"),
)
OWN = Figure(
    key="ram.own", name="finding 1,000 own pages of a clone, 1 GiB, 256 MiB mapped", unit="ms"
)
BACK = Figure(
    key="ram.back", name="going back from them, and reading the 256 MiB again", unit="ms"
)
CHECKPOINT = Figure(
    key="ram.checkpoint", name="checkpoint of RAM, 1 GiB, 256 MiB touched, 1 MiB since", unit="ms"
)
PLAIN = Contender(name="without pagemap and fork")


def sample(host: Host, contender: Contender, wanted: Collection[str]) -> Mapping[str, Reading]:
    """Ours beside the plain way: write in the pause, compare, map anew, copy all."""
    readings: dict[str, Reading] = {}
    with GuestMemory([(0, SIZE)]) as memory:
        memory.write(0, os.urandom(MIB) * (TOUCHED // MIB))
        with tempfile.TemporaryFile(dir=host.scratch, buffering=0) as file:
            if PAUSE.key in wanted:
                readings[PAUSE.key] = _pause(memory, file, contender is PLAIN)
        with image_in_memory(memory) as image, GuestMemory([(0, SIZE)], image=image) as clone:
            if OWN.key in wanted or BACK.key in wanted:
                readings |= _clone(clone, image, contender is PLAIN)
        if CHECKPOINT.key in wanted:
            readings[CHECKPOINT.key] = _checkpoint(memory, contender is PLAIN)
    return {key: reading for key, reading in readings.items() if key in wanted}


def _pause(memory: GuestMemory, file: BinaryIO, is_plain: bool) -> Reading:
    began_s = time.perf_counter()
    if is_plain:
        write_ram(memory, file.fileno())
        return _since(began_s)
    with fork_writer(memory, file.fileno()) as writer:
        reading = _since(began_s)
        writer.wait()
    return Reading(reading.value, f"all written after {_since(began_s).value:.0f} ms")


def _clone(clone: GuestMemory, image: RamImage, is_plain: bool) -> dict[str, Reading]:
    _read(clone)
    for number in range(OWN_PAGES):
        clone.write(number * 37 % (TOUCHED // PAGE) * PAGE, b"own")
    readings: dict[str, Reading] = {}
    with _timed(OWN, readings):
        if is_plain:
            differing_runs(clone, image)
        else:
            own_runs(clone)
    with _timed(BACK, readings):
        if is_plain:
            clone.map_image(image)
        else:
            drop_own(clone)
        _read(clone)
    return readings


def _checkpoint(memory: GuestMemory, is_plain: bool) -> Reading:
    def copy() -> None:
        image_in_memory(memory).close()

    with RamJournal(memory, max_bytes=64 * MIB) as journal:
        take: Callable[[], object] = copy if is_plain else journal.checkpoint
        take()
        for page in range(0, 2 * MIB, 2 * PAGE):
            memory.write(page, b"since")
        began_s = time.perf_counter()
        take()
        return _since(began_s)


def _read(memory: GuestMemory) -> None:
    """Read a byte of each touched page."""
    with memory.view(0, TOUCHED) as view:
        sum(view[::PAGE])


@contextlib.contextmanager
def _timed(figure: Figure, readings: dict[str, Reading]) -> Iterator[None]:
    began_s = time.perf_counter()
    yield
    readings[figure.key] = _since(began_s)


def _since(began_s: float) -> Reading:
    return Reading((time.perf_counter() - began_s) * 1e3)


def suite(pyvmm: Contender) -> Suite:
    """``pyvmm`` beside the plain way."""
    return Suite(
        figures=(PAUSE, OWN, BACK, CHECKPOINT), sample=sample, contenders=(pyvmm, PLAIN),
        boots_linux=False, repeats=3,
    )
