"""Frozen disks in files: saved, opened again, refused if the base has changed, and locked."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError, SnapshotError
from pyvmm.storage.freezing import freeze
from pyvmm.storage.frozen import FrozenDisk
from pyvmm.storage.overlay_format import store_bytes
from pyvmm.storage.raw import RawBackend
from tests.support.frozen_disks import BLOCK, SIZE, content, from_source, write
from tests.support.raw_disks import opened

pytestmark = pytest.mark.usefixtures("scratch")


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
