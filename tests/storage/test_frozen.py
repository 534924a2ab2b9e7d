"""Frozen disks: they never change, and the disks over them do not see each other's writes."""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from pyvmm.storage.backend import BlockBackend
from pyvmm.storage.freezing import revert
from pyvmm.storage.frozen import FrozenDisk
from pyvmm.storage.open import DiskSource, open_backend
from tests.support.frozen_disks import BLOCK, content, frozen_of, opened_clone, write

pytestmark = pytest.mark.usefixtures("scratch")


def opened_snapshot(base: Path, stack: ExitStack, overlay: str = "") -> BlockBackend:
    source = DiskSource(location=str(base), snapshot=True, overlay=overlay)
    return stack.enter_context(closing(open_backend(source, report=pytest.fail)))


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("overlay", [False, True], ids=["snapshot", "overlay"])
def test_neither_original_nor_clones_see_each_others_writes(
    base: Path, tmp_path: Path, stack: ExitStack, overlay: bool
) -> None:
    before = base.read_bytes()
    disk = opened_snapshot(base, stack, str(tmp_path / "o") if overlay else "")
    write(disk, b"a" * 512, 512)
    frozen = frozen_of(disk, stack)
    at_freeze = content(disk)
    clones = [opened_clone(frozen, stack) for _ in range(3)]
    write(disk, b"o" * BLOCK, 0)
    for number, clone in enumerate(clones[:2]):
        write(clone, bytes([number + 65]) * 1024, 256)
    assert content(disk) == b"o" * BLOCK + at_freeze[BLOCK:]
    for number, clone in enumerate(clones[:2]):
        expected = at_freeze[:256] + bytes([number + 65]) * 1024 + at_freeze[1280:]
        assert content(clone) == expected
    assert content(clones[2]) == at_freeze
    assert content(opened_clone(frozen, stack)) == at_freeze
    assert base.read_bytes() == before


def test_a_reverted_disk_is_what_was_frozen(base: Path, stack: ExitStack) -> None:
    disk = opened_snapshot(base, stack)
    write(disk, b"1" * 5000, 100)
    first, at_first = frozen_of(disk, stack), content(disk)
    write(disk, b"2" * 5000, 3000)
    second, at_second = frozen_of(disk, stack), content(disk)
    write(disk, b"3" * 9000, 0)
    for frozen, expected in (
        (second, at_second), (first, at_first), (second, at_second), (first, at_first)
    ):
        revert(disk, frozen)
        assert content(disk) == expected
        write(disk, os.urandom(512), 4096)


def test_a_saved_disk_is_opened_again(base: Path, tmp_path: Path, stack: ExitStack) -> None:
    disk = opened_snapshot(base, stack)
    write(disk, b"1" * 5000, 100)
    below = frozen_of(disk, stack)
    write(disk, b"2" * 5000, 90000)
    frozen, path = frozen_of(disk, stack), tmp_path / "disk0.overlay"
    assert below.save_overlay(str(path)) == 2 * BLOCK
    path.unlink()
    assert frozen.save_overlay(str(path)) == frozen.held_bytes == 5 * BLOCK
    assert path.stat().st_mode & 0o777 == 0o400
    saved = FrozenDisk.open_saved(
        frozen.location, str(path), size_bytes=frozen.size_bytes, stamp_ns=frozen.stamp_ns,
        read_only=False, report=pytest.fail,
    )
    stack.callback(saved.close)
    clone = opened_clone(saved, stack)
    assert content(clone) == content(disk)
    write(clone, b"3" * 600, 200)
    assert content(opened_clone(frozen_of(clone, stack), stack)) == content(clone)


def test_a_disk_that_nobody_wrote_has_no_overlay(
    base: Path, tmp_path: Path, stack: ExitStack
) -> None:
    frozen = frozen_of(opened_snapshot(base, stack), stack)
    assert frozen.save_overlay(str(tmp_path / "o")) is None
    assert not (tmp_path / "o").exists()


def test_nothing_stays_open(base: Path, tmp_path: Path, scratch: Path) -> None:
    before = open_descriptors()
    with ExitStack() as stack:
        disk = opened_snapshot(base, stack)
        for number in range(50):
            write(disk, bytes([number]) * 512, number * BLOCK)
            frozen_of(disk, stack)
        few = open_descriptors()
        assert few == before + 2  # the base, and one file for fifty layers
        frozen = frozen_of(disk, stack)
        clones = [opened_clone(frozen, stack) for _ in range(10)]
        assert open_descriptors() == few
        for clone in clones:
            write(clone, b"c" * 512, 0)
        assert open_descriptors() == few + 10
    assert open_descriptors() == before
    assert list(scratch.iterdir()) == []
