"""open_backend: the layers a source asks for, and everything closed when one does not open."""

from __future__ import annotations

import errno
import os
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.storage.faulty import FaultyBackend
from pyvmm.storage.files import KEEP_SIZE, fallocate
from pyvmm.storage.nbd import NbdBackend
from pyvmm.storage.open import DiskSource, open_backend
from pyvmm.storage.overlay import OverlayBackend
from pyvmm.storage.overlay_format import store_bytes
from pyvmm.storage.private import PrivateDisk
from pyvmm.storage.raw import RawBackend
from tests.support.nbd_servers import nbdkit
from tests.support.patience import patient
from tests.support.raw_disks import opened, room


def test_a_file_is_a_raw_backend(image: Path) -> None:
    for read_only in (False, True):
        source = DiskSource(location=str(image), read_only=read_only)
        with closing(open_backend(source, report=print)) as disk:
            assert isinstance(disk, RawBackend)
            assert disk.read_only is read_only


def test_a_snapshot_shares_its_base(image: Path) -> None:
    source = DiskSource(location=str(image), snapshot=True)
    with (
        closing(open_backend(source, report=print)) as first,
        closing(open_backend(source, report=print)) as second,
        opened(image, read_only=True),
    ):
        assert isinstance(first, PrivateDisk)
        first.writev([memoryview(b"1" * 512)], 0)
        buffers = room(512)
        second.readv(buffers, 0)
        assert buffers[0] == bytes(512)
    with opened(image):
        pass


def test_faults_are_above_everything(image: Path, tmp_path: Path) -> None:
    (tmp_path / "faults").write_text("write 1: EIO\n")
    source = DiskSource(location=str(image), snapshot=True, faults=str(tmp_path / "faults"))
    with closing(open_backend(source, report=print)) as disk:
        assert isinstance(disk, FaultyBackend)
        with pytest.raises(OSError, match="Input/output") as caught:
            disk.writev(room(512), 0)
        assert caught.value.errno == errno.EIO
        disk.writev(room(512), 0)


def test_a_snapshot_of_an_nbd_export(image: Path, tmp_path: Path) -> None:
    before = image.read_bytes()
    with nbdkit(tmp_path / "socket", "-r", "file", str(image)):
        uri = f"nbd+unix:///?socket={tmp_path / 'socket'}"
        source = DiskSource(location=uri, snapshot=True, overlay=str(tmp_path / "o"))
        for _ in range(2):
            with closing(open_backend(source, report=pytest.fail)) as disk:
                disk.writev([memoryview(b"w" * 512)], 512)
                buffers = room(1536)
                disk.readv(buffers, 0)
                assert buffers[0] == bytes(512) + b"w" * 512 + b"\2" * 512
        with closing(open_backend(
            DiskSource(location=uri, read_only=True), report=pytest.fail
        )) as disk:
            assert isinstance(disk, NbdBackend)
    assert image.read_bytes() == before


@pytest.mark.parametrize(("script", "problem"), [
    (b"write 1: EIO\nnonsense", "line 2"), (b"\xff\xfe", "line 1"),
    (b"#" * (2 << 20), "longer than a script"),
])
def test_a_bad_script_closes_the_disk(
    image: Path, tmp_path: Path, script: bytes, problem: str
) -> None:
    path = tmp_path / "faults"
    path.write_bytes(script)
    with pytest.raises(ConfigError) as caught:
        open_backend(DiskSource(location=str(image), faults=str(path)), report=print)
    assert caught.value.subject == str(path)
    assert problem in caught.value.problem
    with opened(image):
        pass


def test_a_missing_script(image: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, problem in (
        ("none", "cannot be read"), (".", "cannot be read"), ("fifo", "is not a regular file"),
    ):
        path = tmp_path / name
        with pytest.raises(ConfigError, match=problem):
            open_backend(DiskSource(location=str(image), faults=str(path)), report=print)


def test_no_room_for_a_snapshot(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"can be made there .*: No such file.*set TMPDIR, "):
        open_backend(DiskSource(location=str(image), snapshot=True), report=print)
    with opened(image):
        pass


def test_contradictions() -> None:
    with pytest.raises(ConfigError, match="either read-only or a snapshot"):
        DiskSource(location="d", read_only=True, snapshot=True)
    with pytest.raises(ConfigError, match="only as a snapshot"):
        DiskSource(location="d", overlay="o")


def make_file_with_blocks(path: str, flags: int, mode: int = 0o777) -> int:
    """open(2) on a file system that gives a new file blocks, as ZFS and ext4 with ACLs do.

    Blocks behind the end: they hold nothing of the file.
    """
    is_new = flags & os.O_CREAT and not os.path.lexists(path)
    fd = OPEN(path, flags, mode)
    if is_new:
        fallocate(fd, KEEP_SIZE, 0, 4096)
        assert os.fstat(fd).st_blocks
        assert os.fstat(fd).st_size == 0
    return fd


OPEN = os.open


@pytest.mark.parametrize("name", ["", "new.overlay"])
def test_fault_21_a_new_file_may_have_blocks(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(os, "open", make_file_with_blocks)
    overlay = str(tmp_path / name) if name else ""
    source = DiskSource(location=str(image), snapshot=True, overlay=overlay)
    with closing(open_backend(source, report=print)) as disk:
        disk.writev([memoryview(b"n" * 512)], 512)
        read = room(512)
        disk.readv(read, 512)
        assert bytes(read[0]) == b"n" * 512


@pytest.mark.parametrize("length", ["none", "all"])
def test_fault_21_an_overlay_that_was_only_begun_is_taken(
    image: Path, tmp_path: Path, length: str
) -> None:
    path = tmp_path / "begun.overlay"
    path.touch()
    if length == "all":
        os.truncate(path, store_bytes(image.stat().st_size))
    source = DiskSource(location=str(image), snapshot=True, overlay=str(path))
    with closing(open_backend(source, report=print)) as disk:
        assert isinstance(disk, OverlayBackend)


def test_fault_21_a_file_with_data_is_no_new_overlay(image: Path, tmp_path: Path) -> None:
    """Not even one of the very size, whose first sectors are zero."""
    path = tmp_path / "other"
    content = bytes(store_bytes(image.stat().st_size) - 1) + b"x"
    path.write_bytes(content)
    source = DiskSource(location=str(image), snapshot=True, overlay=str(path))
    with pytest.raises(ConfigError, match=r"is no overlay of pyvmm's"):
        open_backend(source, report=print)
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["", "new.overlay"])
def test_fault_21_what_was_made_is_gone_when_opening_fails(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(*_args: object, **_named: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    overlay = str(tmp_path / name) if name else ""
    source = DiskSource(location=str(image), snapshot=True, overlay=overlay)
    for place in ("pyvmm.storage.overlay_format.format_store", "os.ftruncate")[not name :]:
        with monkeypatch.context() as patch:
            patch.setattr(place, fail)
            with pytest.raises(ConfigError, match="No space left") as caught:
                open_backend(source, report=print)
        assert ("TMPDIR" in str(caught.value)) == (not name)
        assert [path.name for path in tmp_path.iterdir()] == [image.name]


def test_fault_21_another_ones_file_stays_when_opening_fails(
    image: Path, tmp_path: Path
) -> None:
    path = tmp_path / "other"
    path.write_bytes(b"not an overlay")
    source = DiskSource(location=str(image), snapshot=True, overlay=str(path))
    with pytest.raises(ConfigError):
        open_backend(source, report=print)
    assert path.read_bytes() == b"not an overlay"


@pytest.mark.parametrize("uri", ["NBD://h/e", "Nbd+Unix:///?socket=/none", "nBDs://h"])
def test_fault_25_the_scheme_of_a_uri_has_no_case(uri: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_backend(DiskSource(location=uri), report=print, until_s=time.monotonic() + patient(1))
    assert caught.value.subject == uri
    assert "such file; an empty disk" not in caught.value.problem


@pytest.mark.parametrize("is_begun", [False, True])
def test_fault_21_what_was_made_lasts_once_its_caller_says_so(
    image: Path, tmp_path: Path, is_begun: bool
) -> None:
    path = tmp_path / "new.overlay"
    if is_begun:
        path.touch()
    source = DiskSource(location=str(image), snapshot=True, overlay=str(path))
    made = ExitStack()
    with closing(open_backend(source, report=print, made=made)):
        assert path.stat().st_size
        made.close()
    assert path.exists() == is_begun, "a file that was there before is not removed"
    assert not is_begun or path.stat().st_size == 0
    with closing(open_backend(source, report=print, made=made)):
        made.pop_all()
    with made:
        assert path.stat().st_size == store_bytes(image.stat().st_size)


def test_fault_21_an_overlay_with_contents_is_never_removed(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "old.overlay"
    source = DiskSource(location=str(image), snapshot=True, overlay=str(path))
    with closing(open_backend(source, report=print)) as disk:
        disk.writev([memoryview(b"n" * 512)], 0)
    before = path.read_bytes()
    made = ExitStack()
    with closing(open_backend(source, report=print, made=made)):
        made.close()
    assert path.read_bytes() == before


def test_fault_21_a_file_that_took_the_name_stays(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "new.overlay"
    source = DiskSource(location=str(image), snapshot=True, overlay=str(path))
    made = ExitStack()
    with closing(open_backend(source, report=print, made=made)):
        path.rename(tmp_path / "moved")
        path.write_bytes(b"of another process")
        made.close()
    assert path.read_bytes() == b"of another process"


def test_fault_21_a_bad_script_leaves_no_overlay(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "new.overlay"
    source = DiskSource(
        location=str(image), snapshot=True, overlay=str(path), faults=str(tmp_path / "missing")
    )
    with pytest.raises(ConfigError, match="missing"):
        open_backend(source, report=print)
    assert not path.exists()
