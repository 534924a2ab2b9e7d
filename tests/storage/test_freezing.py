"""Which disks can be in a snapshot, and the reasons of those that cannot."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, cast

import pytest

from pyvmm.api.disks import DiskWrapper, FaultyDisk, MemoryDisk, Overlay, RawDisk, as_disk
from pyvmm.errors import SnapshotError
from pyvmm.storage.backend import BlockBackend
from pyvmm.storage.freezing import check_freezable, freeze, revert
from pyvmm.storage.frozen import FrozenDisk
from pyvmm.storage.memory import MemoryBackend
from pyvmm.storage.open import DiskSource, open_backend
from tests.support.frozen_disks import SIZE, content, from_source, write
from tests.support.nbd_servers import nbdkit

pytestmark = pytest.mark.usefixtures("scratch")


def from_api(stack: ExitStack, disk: object) -> BlockBackend:
    return stack.enter_context(closing(as_disk(disk).open(
        report=pytest.fail, until_s=None, made=stack
    )))


def own_disk() -> Any:
    """A backend of a class that pyvmm does not know."""
    return DiskWrapper(MemoryBackend(bytes(SIZE)))


Make = Callable[[Path, ExitStack], BlockBackend]
MEMORY, DIRECTORY, REWIND = "memory", "directory", "rewind"
WRITTEN, NBD, FILE, FAULTS, PROCESS = (
    "is written in place", "is on an NBD server", "has overlay=FILE", "has faults=",
    "lives in this process",
)
KINDS: dict[str, tuple[Make, dict[str, str]]] = {
    "raw": (lambda base, stack: from_source(stack, location=str(base)),
            {MEMORY: WRITTEN, DIRECTORY: WRITTEN, REWIND: WRITTEN}),
    "ro": (lambda base, stack: from_source(stack, location=str(base), read_only=True), {}),
    "snapshot": (lambda base, stack: from_source(stack, location=str(base), snapshot=True), {}),
    "overlay": (lambda base, stack: from_source(
        stack, location=str(base), snapshot=True, overlay=f"{base}.o"), {REWIND: FILE}),
    "faults": (lambda base, stack: from_api(stack, FaultyDisk(Overlay(base), "write 9: EIO")),
               {DIRECTORY: FAULTS}),
    "memory": (lambda base, stack: from_api(stack, MemoryDisk(SIZE)),
               {MEMORY: WRITTEN, DIRECTORY: WRITTEN, REWIND: WRITTEN}),
    "memory, ro": (lambda base, stack: from_api(stack, MemoryDisk(SIZE, read_only=True)),
                   {DIRECTORY: PROCESS}),
    "over memory": (lambda base, stack: from_api(stack, Overlay(MemoryDisk(SIZE))),
                    {DIRECTORY: PROCESS}),
    "over memory, in a file": (
        lambda base, stack: from_api(stack, Overlay(MemoryDisk(SIZE), f"{base}.o")),
        {DIRECTORY: PROCESS, REWIND: FILE}),
    "own": (lambda base, stack: from_api(stack, DiskWrapper(MemoryBackend(bytearray(SIZE)))),
            {MEMORY: WRITTEN, DIRECTORY: WRITTEN, REWIND: WRITTEN}),
    "over own": (
        lambda base, stack: from_api(stack, Overlay(own_disk())),
        {DIRECTORY: PROCESS}),
    "over own, in a file": (
        lambda base, stack: from_api(
            stack, Overlay(own_disk(), f"{base}.o")),
        {MEMORY: FILE, DIRECTORY: FILE, REWIND: FILE}),
    "over an overlay": (
        lambda base, stack: from_api(stack, Overlay(Overlay(RawDisk(base)))),
        {DIRECTORY: PROCESS}),
}


@pytest.mark.parametrize("purpose", [MEMORY, DIRECTORY, REWIND])
@pytest.mark.parametrize(("make", "problems"), KINDS.values(), ids=KINDS)
def test_which_disks_can_be_in_a_snapshot(
    base: Path, stack: ExitStack, make: Make, problems: dict[str, str], purpose: str
) -> None:
    disk = make(base, stack)
    into_directory, to_rewind = purpose == DIRECTORY, purpose == REWIND
    if purpose in problems:
        with pytest.raises(SnapshotError) as caught:
            check_freezable(disk, into_directory=into_directory, to_rewind=to_rewind)
        assert caught.value.problem.startswith(problems[purpose])
        assert ";" in caught.value.problem  # the remedy follows
        return
    check_freezable(disk, into_directory=into_directory, to_rewind=to_rewind)
    before = content(disk)
    frozen = stack.enter_context(closing(freeze(disk)))
    clone = stack.enter_context(closing(frozen.open(report=pytest.fail)))
    assert (clone.read_only, clone.size_bytes) == (disk.read_only, disk.size_bytes)
    if not disk.read_only:
        write(disk, b"o" * 512, 0)
        write(clone, b"c" * 512, 512)
        assert content(clone) == before[:512] + b"c" * 512 + before[1024:]
        assert content(disk) == b"o" * 512 + before[512:]
    if to_rewind:
        revert(disk, frozen)
        assert content(disk) == before
    if into_directory:
        saved = FrozenDisk.open_saved(
            frozen.location, None, size_bytes=frozen.size_bytes, stamp_ns=frozen.stamp_ns,
            read_only=frozen.read_only, report=pytest.fail,
        )
        assert content(stack.enter_context(closing(saved.open(report=print)))) == before
        saved.close()


def test_a_disk_on_a_server_is_refused(base: Path, tmp_path: Path, stack: ExitStack) -> None:
    socket = tmp_path / "socket"
    stack.enter_context(nbdkit(socket, "file", str(base)))
    uri = f"nbd+unix:///?socket={socket}"
    for fields in ({}, {"read_only": True}, {"snapshot": True},
                   {"snapshot": True, "overlay": f"{base}.o"}):
        with ExitStack() as one:
            disk = from_source(one, location=uri, **fields)
            with pytest.raises(SnapshotError, match=NBD) as caught:
                freeze(disk)
            assert caught.value.subject == uri


def test_faults_go_on_counting_in_a_clone_and_after_a_revert(base: Path, stack: ExitStack) -> None:
    disk = from_api(stack, FaultyDisk(Overlay(base), "write 3: EIO\nflush 1: EIO"))
    write(disk, b"1" * 512, 0)
    frozen = stack.enter_context(closing(freeze(disk)))
    assert disk.size_bytes == frozen.size_bytes

    def third_write_fails(disk: BlockBackend) -> None:
        write(disk, b"2" * 512, 0)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            write(disk, b"3" * 512, 0)
        write(disk, b"4" * 512, 0)

    third_write_fails(disk)
    for _ in range(2):
        with pytest.raises(OSError, match=r"error|earlier"):
            disk.flush()
    clone = stack.enter_context(closing(frozen.open(report=pytest.fail)))
    third_write_fails(clone)
    revert(disk, frozen)
    assert content(disk)[:512] == b"1" * 512
    third_write_fails(disk)
    with pytest.raises(OSError, match="faulty disk"):  # the first one again, not the latch
        disk.flush()


def test_a_disk_reverts_only_to_one_of_its_size(
    base: Path, tmp_path: Path, stack: ExitStack
) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(bytes(2 * SIZE))
    disk = from_source(stack, location=str(base), snapshot=True)
    frozen = stack.enter_context(closing(freeze(
        from_source(stack, location=str(other), snapshot=True)
    )))
    with pytest.raises(SnapshotError, match=f"has {SIZE} bytes, and {2 * SIZE} in the snapshot"):
        revert(disk, frozen)


def test_the_end_of_one_clone_does_not_hurry_the_others(stack: ExitStack) -> None:
    class Slow(DiskWrapper):
        until_s: float | None = None

        def hurry(self, until_s: float) -> None:
            self.until_s = until_s

    base = Slow(MemoryBackend(bytes(SIZE)))
    disk = from_api(stack, Overlay(cast(Any, base)))
    frozen = freeze(disk)
    clone = stack.enter_context(closing(frozen.open(report=pytest.fail)))
    frozen.close()
    clone.hurry(1.0)
    assert base.until_s is None
    clone.close()
    disk.hurry(2.0)
    assert base.until_s == 2.0


def test_an_odd_base_is_mentioned_once(base: Path, stack: ExitStack) -> None:
    with base.open("ab") as file:
        file.write(b"odd")
    lines: list[str] = []
    source = DiskSource(location=str(base), read_only=True)
    disk = stack.enter_context(closing(open_backend(source, report=lines.append)))
    frozen = stack.enter_context(closing(freeze(disk)))
    assert frozen.size_bytes == SIZE
    assert content(stack.enter_context(closing(frozen.open(report=lines.append)))) == content(disk)
    assert len(lines) == 1


def test_no_room_for_the_copy_of_an_overlay(
    base: Path, scratch: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = from_source(stack, location=str(base), snapshot=True, overlay=f"{base}.o")
    write(disk, b"w" * 512, 0)
    before = sorted(os.listdir("/proc/self/fd"))

    def fail(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for call in ("copy_file_range", "ftruncate"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(SnapshotError, match=f"copied to {scratch}: No space.*TMPDIR"):
                freeze(disk)
        assert sorted(os.listdir("/proc/self/fd")) == before
    stack.enter_context(closing(freeze(disk)))


@pytest.mark.parametrize("overlay", ["", "o"], ids=["read-only", "base of an overlay"])
def test_a_directory_that_was_left_since_is_still_the_base_s(
    base: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch, overlay: str
) -> None:
    monkeypatch.chdir(base.parent)
    disk = from_source(
        stack, location=base.name, read_only=not overlay, snapshot=bool(overlay),
        overlay=overlay and f"{base}.{overlay}",
    )
    monkeypatch.chdir("/")
    assert stack.enter_context(closing(freeze(disk))).location == str(base)
