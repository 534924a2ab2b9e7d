"""Files without a name: full, not to be made, made in another way, and more than one."""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from pyvmm.storage.freezing import freeze
from tests.support.frozen_disks import BLOCK, MIB, layers_of, read, snapshot_disk, write

pytestmark = pytest.mark.usefixtures("scratch")


def test_no_room_for_a_write_is_an_error_of_this_disk_alone(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch, scratch: Path
) -> None:
    disk = snapshot_disk(stack, tmp_path / "base.img", MIB)
    write(disk, b"1" * BLOCK, 0)
    frozen = stack.enter_context(closing(freeze(disk)))
    lines: list[str] = []
    clone = stack.enter_context(closing(frozen.open(report=lines.append)))
    other = stack.enter_context(closing(frozen.open(report=pytest.fail)))
    write(other, b"o" * BLOCK, 0)

    def fail(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", fail)
        for _ in range(2):
            with pytest.raises(OSError, match="No space left"):
                write(clone, b"c" * 512, 512)
    assert lines == [
        f"{scratch} (a snapshot's writes go there; TMPDIR names another): a write failed: No space "
        "left on device; the guest gets I/O errors (said once)"
    ]
    assert read(clone, 0, BLOCK) == b"1" * BLOCK
    write(clone, b"c" * 512, 512)
    assert read(clone, 0, 1024) == b"1" * 512 + b"c" * 512
    assert read(other, 0, BLOCK) == b"o" * BLOCK


def test_a_clone_whose_file_cannot_be_made_reads(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = snapshot_disk(stack, tmp_path / "base.img", MIB)
    write(disk, b"1" * BLOCK, 0)
    frozen = stack.enter_context(closing(freeze(disk)))
    lines: list[str] = []
    clone = stack.enter_context(closing(frozen.open(report=lines.append)))
    with monkeypatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path / "none"))
        for _ in range(2):
            with pytest.raises(OSError, match="No such file"):
                write(clone, b"c" * 512, 512)
    assert [line.partition(":")[2] for line in lines] == [
        " no file can be made for what the guest writes: No such file or directory (TMPDIR names a "
        "directory for it; said once)"
    ]
    assert read(clone, 0, BLOCK) == b"1" * BLOCK
    write(clone, b"c" * 512, 512)


def test_a_file_system_without_nameless_files(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch, scratch: Path
) -> None:
    real_open = os.open

    def open_named(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no")
        return real_open(path, flags, mode)

    monkeypatch.setattr(os, "open", open_named)
    disk = snapshot_disk(stack, tmp_path / "base.img", MIB)
    write(disk, b"1" * 512, 0)
    assert read(disk, 0, 512) == b"1" * 512
    assert list(scratch.iterdir()) == []


def test_a_file_that_is_full_of_stripes_has_a_successor(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyvmm.storage.scratch.MAX_FILE_BYTES", 3 * MIB)
    disk = snapshot_disk(stack, tmp_path / "base.img", MIB)
    kept = []
    for number in range(8):
        write(disk, bytes([number]) * 512, number * BLOCK)
        kept.append(stack.enter_context(closing(freeze(disk))))
    assert len({layer.place[0] for layer in layers_of(disk)}) == 3
    for number, frozen in enumerate(kept):
        assert read(frozen, number * BLOCK, 512) == bytes([number]) * 512
