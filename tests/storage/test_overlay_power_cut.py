"""The overlay's promise: after a power cut at any moment, what a flush acknowledged is there.

Every sector then has the content of the last flush, or one that was written to it since.
"""

from __future__ import annotations

import os
import random
from contextlib import closing
from pathlib import Path

import pytest

from pyvmm.storage.freezing import freeze
from pyvmm.storage.memory import MemoryBackend
from pyvmm.storage.open import DiskSource
from pyvmm.storage.overlay import OverlayBackend
from pyvmm.storage.overlay_format import format_store, store_bytes
from tests.support.power_cut import RecordingBackend, power_cuts

SECTORS = 8 * 40 + 3
BASE = b"".join(bytes([i % 256, 255]) * 256 for i in range(SECTORS))
CUTS = int(os.environ.get("PYVMM_POWER_CUTS", "200"))
"""How many images in all; `make soak` asks for more."""
SEEDS = 4


class Model:
    """What each sector may read as after a cut, kept up by notes of what was asked and done."""

    def __init__(self) -> None:
        self.now = [BASE[i : i + 512] for i in range(0, len(BASE), 512)]
        self.allowed = [{sector} for sector in self.now]

    def apply(self, note: object) -> None:
        if note == "flushed":
            self.allowed = [{sector} for sector in self.now]
            return
        assert isinstance(note, tuple)
        first, data, is_durable = note
        for i in range(len(data) // 512):
            sector = self.now[first + i] = data[i * 512 : (i + 1) * 512]
            if is_durable:
                self.allowed[first + i] = {sector}
            else:
                self.allowed[first + i].add(sector)


def new_store() -> bytearray:
    """The store of an overlay that holds nothing."""
    data = bytearray(store_bytes(len(BASE)))
    format_store(MemoryBackend(data), len(BASE))
    return data


def saved_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytearray:
    """A copy of a snapshot's overlay file, of blocks with the base's bytes."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "base").write_bytes(BASE)
    os.utime(tmp_path / "base", ns=(0, 0))
    source = DiskSource(location=str(tmp_path / "base"), snapshot=True)
    with closing(source.open(report=pytest.fail)) as disk:
        for offset in (0, 5000 // 512 * 512, 100 * 512):
            disk.writev([memoryview(BASE[offset : offset + 9 * 512])], offset)
        with closing(freeze(disk)) as frozen:
            assert frozen.save_overlay(str(tmp_path / "o"))
    return bytearray((tmp_path / "o").read_bytes())


def record(seed: int, file: bytearray) -> RecordingBackend:
    """The store ``file`` of an overlay that was written, zeroed, discarded, flushed, reopened."""
    rng = random.Random(seed)
    store = RecordingBackend(MemoryBackend(file))
    disk = OverlayBackend(MemoryBackend(BASE), store, name="o", report=pytest.fail)
    for number in range(120):
        first = rng.randrange(SECTORS)
        count = rng.randint(1, min(24, SECTORS - first))
        offset, length = first * 512, count * 512
        data = (seed * 1000 + number).to_bytes(4, "little") * (length // 4)
        match rng.randrange(10):
            case 0:
                store.note((first, bytes(length), False))
                disk.write_zeroes(offset, length, unmap=True)
            case 1:
                # Zeroes where the store holds it: noted before, as it may be seen at once.
                before = bytearray(length)
                disk.readv([memoryview(before)], offset)
                store.note((first, bytes(length), False))
                disk.discard(offset, length)
                after = bytearray(length)
                disk.readv([memoryview(after)], offset)
                store.note((first, bytes(after), False))
            case 2 | 3:
                disk.flush()
                store.note("flushed")
            case 4:
                store.note((first, data, False))
                disk.writev([memoryview(data)], offset, durable=True)
                store.note((first, data, True))
            case 6:
                # A snapshot only reads the store.
                before = bytearray(len(BASE))
                disk.readv([memoryview(before)], 0)
                with closing(freeze(disk)) as frozen:
                    after = bytearray(len(BASE))
                    frozen.readv([memoryview(after)], 0)
                assert before == after
            case 5 if number > 60:
                disk.close()  # saves bits, but like any disk promises nothing
                disk = OverlayBackend(MemoryBackend(BASE), store, name="o", report=pytest.fail)
            case _:
                store.note((first, data, False))
                disk.writev([memoryview(data)], offset)
    return store


@pytest.mark.parametrize("seed", range(SEEDS))
def test_what_was_flushed_survives_a_power_cut(seed: int) -> None:
    check_cuts(seed, new_store())


def test_a_snapshots_overlay_survives_power_cuts_in_a_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has a copy of it for its own."""
    check_cuts(0, saved_store(tmp_path, monkeypatch))


def check_cuts(seed: int, file: bytearray) -> None:
    store = record(seed, file)
    for cut in power_cuts(store, random.Random(seed), CUTS // SEEDS):
        model = Model()
        for note in cut.notes:
            model.apply(note)
        disk = OverlayBackend(
            MemoryBackend(BASE), MemoryBackend(cut.image), name="o", report=pytest.fail
        )
        content = bytearray(len(BASE))
        disk.readv([memoryview(content)], 0)
        for number, allowed in enumerate(model.allowed):
            assert bytes(content[number * 512 : number * 512 + 512]) in allowed, number


def test_the_test_notices_a_flush_in_the_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the first of the two flushes a bit may be stable before its block is."""
    real_flush = RecordingBackend.flush
    calls = 0

    def every_second(self: RecordingBackend) -> None:
        nonlocal calls
        calls += 1
        if calls % 2 == 0:
            real_flush(self)

    monkeypatch.setattr(RecordingBackend, "flush", every_second)
    with pytest.raises(AssertionError):
        check_cuts(0, new_store())
