"""Layers under frozen disks: few, whole while others read them, and bounded in all they take."""

from __future__ import annotations

import errno
import os
import random
import threading
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from pyvmm.storage import frozen as frozen_module
from pyvmm.storage import layers
from pyvmm.storage.backend import BlockBackend
from pyvmm.storage.freezing import freeze, revert
from pyvmm.storage.frozen import FrozenDisk
from pyvmm.storage.private import PrivateDisk
from tests.support.frozen_disks import BLOCK, MIB, layers_of, read, snapshot_disk, write
from tests.support.patience import patient

pytestmark = pytest.mark.usefixtures("scratch")


def room_of(disk: PrivateDisk) -> int:
    """Bytes that the files without a name take."""
    stores = {layer.place[0].fileno() for layer in layers_of(disk)}
    return sum(os.fstat(fd).st_blocks * 512 for fd in stores)


def test_checkpoints_for_hours_take_no_more_than_those_that_are_kept(
    tmp_path: Path, stack: ExitStack
) -> None:
    disk = snapshot_disk(stack, tmp_path / "base.img", 64 * MIB)
    kept: list[FrozenDisk] = []
    rng = random.Random(1)
    model = bytearray(2 * MIB)
    states: list[bytes] = []
    for number in range(600):
        offset = rng.randrange(512) * BLOCK
        data = number.to_bytes(4, "little") * (BLOCK // 4)
        write(disk, data, offset)
        model[offset : offset + BLOCK] = data
        kept.append(freeze(disk))
        states.append(bytes(model))
        if len(kept) > 10:
            kept.pop(0).close()
            states.pop(0)
    assert len(layers_of(disk)) <= 10 + 2
    assert room_of(disk) <= 2 * MIB + 12 * BLOCK + 64 * 1024
    for frozen, state in zip(kept, states, strict=True):
        assert read(frozen, 0, len(state)) == state
    for frozen in reversed(kept):
        frozen.close()
    for _ in range(10):
        write(disk, b"x" * 512, 0)
        freeze(disk).close()
    assert len(layers_of(disk)) <= 2


def test_an_empty_top_is_no_layer(tmp_path: Path, stack: ExitStack) -> None:
    disk = snapshot_disk(stack, tmp_path / "base.img", MIB)
    write(disk, b"1" * 512, 0)
    frozen = [stack.enter_context(closing(freeze(disk))) for _ in range(5)]
    assert len(layers_of(disk)) == 1
    for one in frozen:
        write(disk, b"2" * 512, 0)
        revert(disk, one)
        revert(disk, one)
    assert len(layers_of(disk)) == 1
    assert {one.layer_bytes for one in frozen} == {BLOCK}


@pytest.mark.parametrize("sizes", [(1, 2, 4, 8, 16), (16, 8, 4, 2, 1), (1, 3, 2, 9, 1)])
def test_blocks_are_found_after_their_layers_were_merged(
    tmp_path: Path, stack: ExitStack, sizes: tuple[int, ...]
) -> None:
    """Into larger ones or smaller ones, and the result again; the disk is read in between."""
    disk = snapshot_disk(stack, tmp_path / "base.img", MIB)
    model = bytearray(64 * BLOCK)
    for number, blocks in enumerate(sizes):
        data = bytes([number + 1]) * (blocks * BLOCK)
        write(disk, data, number * BLOCK)
        model[number * BLOCK : number * BLOCK + len(data)] = data
        freeze(disk).close()
        assert read(disk, 0, len(model)) == model
        assert len(layers_of(disk)) == 1
    assert len(disk.frozen.tree.layers) == len(sizes)  # a number for each
    with closing(freeze(disk)) as frozen:
        disk.close()
        assert read(frozen, 0, len(model)) == model
        tree = frozen.tree
    assert tree.layers == {}


def test_a_layer_under_two_branches_stays(tmp_path: Path, stack: ExitStack) -> None:
    disk = snapshot_disk(stack, tmp_path / "base.img", MIB)
    write(disk, b"0" * (4 * BLOCK), 0)
    frozen = freeze(disk)
    clones = [stack.enter_context(closing(frozen.open(report=pytest.fail))) for _ in range(2)]
    frozen.close()
    disk.close()
    for _ in range(3):
        for number, clone in enumerate(clones):
            write(clone, bytes([65 + number]) * BLOCK, number * BLOCK)
            freeze(clone).close()
    assert read(clones[0], 0, 4 * BLOCK) == b"A" * BLOCK + b"0" * (3 * BLOCK)
    assert read(clones[1], 0, 4 * BLOCK) == b"0" * BLOCK + b"B" * BLOCK + b"0" * (2 * BLOCK)


def test_a_read_during_a_merge_is_done_again(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer's place is looked up, the layer moves, its old place is freed; only then is it
    read."""
    monkeypatch.setattr(layers, "_CHEAP_BLOCKS", 0)
    disk = snapshot_disk(stack, tmp_path / "base.img", MIB)
    write(disk, b"1" * BLOCK, 0)
    freeze(disk).close()
    write(disk, b"2" * (2 * BLOCK), BLOCK)
    frozen = stack.enter_context(closing(freeze(disk)))
    real_read = layers.LayerTree.read
    merged: list[int] = []

    def late_read(
        self: layers.LayerTree, number: int, buffers: list[memoryview], offset: int
    ) -> None:
        store, data = self.layers[number].place
        if merged:
            real_read(self, number, buffers, offset)
            return
        merged.append(number)
        monkeypatch.setattr(layers, "_CHEAP_BLOCKS", 99)
        frozen.merge_layers()
        store.readv(buffers, data + offset)
        assert bytes(buffers[0]) == bytes(BLOCK), "the old place is empty"

    monkeypatch.setattr(layers.LayerTree, "read", late_read)
    assert read(frozen, 0, BLOCK) == b"1" * BLOCK
    assert len(layers_of(disk)) == 1


def test_a_reader_keeps_its_map_while_the_disk_is_frozen_again(
    tmp_path: Path, stack: ExitStack
) -> None:
    disk = snapshot_disk(stack, tmp_path / "base.img", MIB)
    write(disk, b"1" * BLOCK, 0)
    frozen = stack.enter_context(closing(freeze(disk)))
    page = frozen.page_of_map(0)
    assert page is not None
    before = page[:]
    write(disk, b"2" * (4 * BLOCK), 0)
    freeze(disk).close()
    assert page == before


def test_big_layers_are_left_alone_until_there_are_too_many(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_CHEAP_BLOCKS", 0)
    monkeypatch.setattr(layers, "_MAX_LAYERS", 6)
    disk = snapshot_disk(stack, tmp_path / "base.img", MIB)
    for number in range(20):
        write(disk, bytes([number]) * BLOCK, number * BLOCK)
        freeze(disk).close()
        assert len(layers_of(disk)) == min(number + 1, 6)
    assert read(disk, 0, 20 * BLOCK) == b"".join(bytes([n]) * BLOCK for n in range(20))


def test_layers_that_cannot_be_merged_for_lack_of_room_stay_apart(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = snapshot_disk(stack, tmp_path / "base.img", MIB)
    write(disk, b"1" * BLOCK, 0)
    freeze(disk).close()
    write(disk, b"2" * BLOCK, BLOCK)

    def fail(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "copy_file_range", fail)
        freeze(disk).close()
    assert len(layers_of(disk)) == 2
    assert read(disk, 0, 2 * BLOCK) == b"1" * BLOCK + b"2" * BLOCK


def test_clones_of_clones_of_clones(tmp_path: Path, stack: ExitStack) -> None:
    disk: BlockBackend = snapshot_disk(stack, tmp_path / "base.img", MIB)
    before = len(os.listdir("/proc/self/fd"))
    kept = []
    for number in range(12):
        write(disk, bytes([number + 1]) * BLOCK, number * BLOCK)
        frozen = freeze(disk)
        clone = frozen.open(report=pytest.fail)
        frozen.close()
        expected = b"".join(bytes([n + 1]) * BLOCK for n in range(number + 1))
        assert read(clone, 0, len(expected) + BLOCK) == expected + bytes(BLOCK)
        if number % 3 == 0:
            kept.append((freeze(clone), expected))
        disk = clone
        stack.callback(clone.close)
    for frozen, expected in kept:
        assert read(frozen, 0, len(expected)) == expected
        frozen.close()
    stack.close()
    assert len(os.listdir("/proc/self/fd")) == before - 2  # not the base and the first file either


def test_blocks_in_several_pages_of_the_bitmap(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_module, "_MAX_MAP_PAGES", 2)
    page = 128 * MIB
    disk = snapshot_disk(stack, tmp_path / "base.img", 5 * page + 512)
    expected = {}
    for number in range(1, 5):
        data = bytes([number]) * (3 * BLOCK)
        write(disk, data, number * page - BLOCK - 512 * number)
        expected[number * page - BLOCK - 512 * number] = data
        frozen = stack.enter_context(closing(freeze(disk)))
    write(disk, b"e" * 512, 5 * page)
    frozen = stack.enter_context(closing(freeze(disk)))
    clone = stack.enter_context(closing(frozen.open(report=pytest.fail)))
    for _ in range(2):
        for offset, data in expected.items():
            assert read(clone, offset - BLOCK, 5 * BLOCK) == bytes(BLOCK) + data + bytes(BLOCK)
        assert read(clone, 5 * page, 512) == b"e" * 512
    path = tmp_path / "o"
    held = frozen.save_overlay(str(path))
    assert held == frozen.held_bytes
    saved = stack.enter_context(closing(FrozenDisk.open_saved(
        frozen.location, str(path), size_bytes=frozen.size_bytes, stamp_ns=frozen.stamp_ns,
        read_only=False, report=pytest.fail,
    )))
    for offset, data in expected.items():
        assert read(saved, offset - BLOCK, 5 * BLOCK) == bytes(BLOCK) + data + bytes(BLOCK)


def test_readers_never_see_a_layer_that_moves(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clones read in threads while the original freezes, drops, merges and renumbers."""
    monkeypatch.setattr(layers, "_ENOUGH_NUMBERS", 8)
    disk = snapshot_disk(stack, tmp_path / "base.img", MIB)
    blocks = 64
    for number in range(blocks):
        write(disk, bytes([number + 1]) * BLOCK, number * BLOCK)
    stable = [stack.enter_context(closing(freeze(disk)))]
    contents = [read(stable[0], 0, blocks * BLOCK)]
    wrong: list[str] = []
    is_over = threading.Event()

    def keep_reading() -> None:
        rng = random.Random(threading.get_ident())
        while not is_over.is_set():
            which = rng.randrange(len(contents))
            first = rng.randrange(blocks)
            length = rng.randint(1, blocks - first) * BLOCK
            clone = stable[which].open(report=wrong.append)
            if read(clone, first * BLOCK, length) != contents[which][first * BLOCK :][:length]:
                wrong.append(f"{which} at block {first}")
            clone.close()

    threads = [threading.Thread(target=keep_reading) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        rng = random.Random(2)
        for number in range(400):
            for _ in range(3):
                block = rng.randrange(blocks)
                write(disk, rng.randbytes(4) * (BLOCK // 4), block * BLOCK)
            frozen = freeze(disk)
            if number % 40 == 20:
                stable.append(stack.enter_context(closing(frozen)))
                contents.append(read(frozen, 0, blocks * BLOCK))
            else:
                frozen.close()
    finally:
        is_over.set()
        for thread in threads:
            thread.join(patient(10))
    assert wrong == []
    assert not any(thread.is_alive() for thread in threads)
    assert len(layers_of(disk)) <= len(stable) + 2
