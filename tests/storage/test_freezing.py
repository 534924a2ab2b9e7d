"""Which disks can be in a snapshot, and the reasons of those that cannot."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, cast

import pytest

from pyvmm.api.disks import DiskWrapper, FaultyDisk, MemoryDisk, Overlay, RawDisk, as_disk
from pyvmm.errors import ConfigError, SnapshotError
from pyvmm.storage.backend import BlockBackend
from pyvmm.storage.freezing import check_freezable, freeze, revert
from pyvmm.storage.frozen import FrozenDisk
from pyvmm.storage.memory import MemoryBackend
from pyvmm.storage.open import DiskSource, open_backend
from pyvmm.storage.overlay_format import store_bytes
from pyvmm.storage.raw import RawBackend
from tests.support.nbd_servers import nbdkit
from tests.support.raw_disks import opened

BLOCK = 4096
SIZE = 64 * BLOCK


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "scratch"
    path.mkdir()
    monkeypatch.setenv("TMPDIR", str(path))
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.img"
    path.write_bytes(b"".join(bytes([n]) * BLOCK for n in range(SIZE // BLOCK)))
    return path


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def content(disk: BlockBackend) -> bytes:
    buffer = bytearray(disk.size_bytes)
    disk.readv([memoryview(buffer)], 0)
    return bytes(buffer)


def write(disk: BlockBackend, data: bytes, offset: int) -> None:
    disk.writev([memoryview(data)], offset)


def from_source(stack: ExitStack, **fields: object) -> BlockBackend:
    source = DiskSource(**fields)  # type: ignore[arg-type]
    return stack.enter_context(closing(open_backend(source, report=pytest.fail)))


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


# Saved ones -------------------------------------------------------------------------------------


def saved(frozen: FrozenDisk, overlay: Path | None, **changes: object) -> FrozenDisk:
    facts: dict[str, object] = {
        "size_bytes": frozen.size_bytes, "stamp_ns": frozen.stamp_ns, "read_only": False,
        "report": pytest.fail, **changes,
    }
    location = str(facts.pop("location", frozen.location))
    return FrozenDisk.open_saved(
        location, None if overlay is None else str(overlay), **facts  # type: ignore[arg-type]
    )


@pytest.fixture
def overlay(base: Path, tmp_path: Path) -> tuple[FrozenDisk, Path]:
    """A frozen disk, closed, and the file it was saved to."""
    path = tmp_path / "disk0.overlay"
    with ExitStack() as stack:
        disk = from_source(stack, location=str(base), snapshot=True)
        write(disk, b"w" * 512, 8192)
        frozen = stack.enter_context(closing(freeze(disk)))
        assert frozen.save_overlay(str(path)) == BLOCK
        return frozen, path


def test_a_saved_disks_base_must_be_the_same(
    base: Path, tmp_path: Path, overlay: tuple[FrozenDisk, Path]
) -> None:
    frozen, path = overlay
    copy = tmp_path / "copy.img"
    copy.write_bytes(base.read_bytes())
    with closing(saved(frozen, path, location=str(copy), replaced=True)) as other:
        assert other.location == str(copy)
    with pytest.raises(SnapshotError, match="was changed since the snapshot was taken") as caught:
        saved(frozen, path, location=str(copy))
    assert caught.value.subject == str(copy)
    os.truncate(copy, SIZE // 2)
    with pytest.raises(SnapshotError, match=f"has {SIZE // 2} bytes, and the snapshot's .* {SIZE}"):
        saved(frozen, path, location=str(copy), replaced=True)
    os.utime(base)
    with pytest.raises(SnapshotError, match="was changed since"):
        saved(frozen, path)
    base.unlink()
    with pytest.raises(SnapshotError, match="is missing") as caught:
        saved(frozen, path)
    assert caught.value.subject == str(base)
    with pytest.raises(SnapshotError, match="not a regular file"):
        saved(frozen, path, location=str(tmp_path), replaced=True)
    assert not [fd for fd in os.listdir("/proc/self/fd") if _is_in(fd, tmp_path)]


def _is_in(fd: str, directory: Path) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith(str(directory))
    except OSError:
        return False


def test_a_damaged_overlay_is_refused(
    tmp_path: Path, overlay: tuple[FrozenDisk, Path]
) -> None:
    frozen, path = overlay
    good = path.read_bytes()
    assert len(good) == store_bytes(SIZE)
    bad = tmp_path / "bad.overlay"
    for bytes_of_it, problem in (
        (b"", "has 0 bytes"),
        (good[:-4096], "is cut off"),
        (good[:16] + b"\1" + good[17:], "checksum"),
        (b"QFI\xfb" + good[4:], "no overlay"),
    ):
        bad.write_bytes(bytes_of_it)
        with pytest.raises(SnapshotError, match=problem) as caught:
            saved(frozen, bad)
        assert caught.value.subject == str(bad)
    (tmp_path / "link").symlink_to(path)
    os.mkfifo(tmp_path / "fifo")
    for name in ("missing", "link", "fifo", "."):
        with pytest.raises(SnapshotError):
            saved(frozen, tmp_path / name)
    assert not [fd for fd in os.listdir("/proc/self/fd") if _is_in(fd, tmp_path)]


def test_a_saved_overlay_is_an_ordinary_one(
    base: Path, tmp_path: Path, overlay: tuple[FrozenDisk, Path], stack: ExitStack
) -> None:
    """Not one line of complaint about its base, and it can be written if it is copied."""
    copy = tmp_path / "copy.overlay"
    copy.write_bytes(overlay[1].read_bytes())
    disk = from_source(stack, location=str(base), snapshot=True, overlay=str(copy))
    before = base.read_bytes()
    assert content(disk) == before[:8192] + b"w" * 512 + before[8704:]
    write(disk, b"x" * 512, 0)
    disk.flush()


def test_saving_never_overwrites_and_leaves_nothing_behind(
    base: Path, tmp_path: Path, overlay: tuple[FrozenDisk, Path], stack: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frozen = stack.enter_context(closing(saved(*overlay)))
    with pytest.raises(FileExistsError):
        frozen.save_overlay(str(overlay[1]))

    def fail(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for call in ("copy_file_range", "fsync", "pwritev"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(OSError, match="No space left"):
                frozen.save_overlay(str(tmp_path / "new"))
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("refused", [errno.EXDEV, errno.EOPNOTSUPP, None])
def test_a_host_that_can_neither_copy_nor_tell_holes(
    base: Path, tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch,
    refused: int | None,
) -> None:
    """As 9p is."""
    def fail(*_arguments: object) -> int:
        raise OSError(refused, "no")

    real_seek = os.lseek

    def seek(fd: int, offset: int, how: int) -> int:
        if how in (os.SEEK_DATA, os.SEEK_HOLE):
            if refused is None:
                return offset if how == os.SEEK_DATA else real_seek(fd, 0, os.SEEK_END)
            raise OSError(errno.EINVAL, "no")
        return real_seek(fd, offset, how)

    if refused is not None:
        monkeypatch.setattr(os, "copy_file_range", fail)
    monkeypatch.setattr(os, "lseek", seek)
    disk = from_source(stack, location=str(base), snapshot=True)
    write(disk, os.urandom(3 * BLOCK), 1000)
    disk.write_zeroes(20 * BLOCK, 10 * BLOCK, unmap=True)
    frozen = stack.enter_context(closing(freeze(disk)))
    assert frozen.save_overlay(str(tmp_path / "o")) == 14 * BLOCK
    again = stack.enter_context(closing(saved(frozen, tmp_path / "o")))
    assert content(stack.enter_context(closing(again.open(report=print)))) == content(disk)


def test_zeroed_blocks_take_no_room(base: Path, tmp_path: Path, stack: ExitStack) -> None:
    """A guest's mkfs zeroes the whole disk."""
    disk = from_source(stack, location=str(base), snapshot=True)
    disk.write_zeroes(0, SIZE, unmap=True)
    write(disk, b"d" * BLOCK, 5 * BLOCK)
    frozen = stack.enter_context(closing(freeze(disk)))
    path = tmp_path / "o"
    assert frozen.save_overlay(str(path)) == SIZE
    assert path.stat().st_blocks * 512 <= 8 * BLOCK
    again = stack.enter_context(closing(saved(frozen, path)))
    assert content(stack.enter_context(closing(again.open(report=print)))) == content(disk)


# Locks ------------------------------------------------------------------------------------------


def test_a_base_in_use_by_clones_cannot_be_written(
    base: Path, overlay: tuple[FrozenDisk, Path], stack: ExitStack
) -> None:
    first, second = saved(*overlay), saved(*overlay)
    clone = stack.enter_context(closing(first.open(report=pytest.fail)))
    first.close()
    with pytest.raises(ConfigError, match="is locked"):
        RawBackend(str(base), report=print)
    with opened(base, read_only=True):
        pass
    second.close()
    with pytest.raises(ConfigError, match="is locked"):
        RawBackend(str(base), report=print)
    clone.close()
    with opened(base), pytest.raises(SnapshotError, match="is locked"):
        saved(*overlay)


def test_clones_in_other_processes_share_the_base(
    base: Path, overlay: tuple[FrozenDisk, Path]
) -> None:
    frozen, path = overlay
    code = (
        "import sys; from pyvmm.storage.frozen import FrozenDisk\n"
        f"disk = FrozenDisk.open_saved({str(base)!r}, {str(path)!r}, size_bytes={SIZE}, "
        f"stamp_ns={frozen.stamp_ns}, read_only=False, report=print).open(report=print)\n"
        "disk.writev([memoryview(b'c' * 512)], 0)\n"
        "print('open', flush=True); sys.stdin.read(1)"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "open\n"
        with pytest.raises(ConfigError, match="is locked"):
            RawBackend(str(base), report=print)
        with closing(saved(frozen, path)):
            pass
    finally:
        for child in children:
            child.communicate("x")
    assert [child.returncode for child in children] == [0, 0]
    with opened(base):
        pass
