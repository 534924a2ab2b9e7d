"""open_backend: the layers a source asks for, and everything closed when one does not open."""

from __future__ import annotations

import errno
from contextlib import closing
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.storage.faulty import FaultyBackend
from pyvmm.storage.nbd import NbdBackend
from pyvmm.storage.open import DiskSource, open_backend
from pyvmm.storage.overlay import OverlayBackend
from pyvmm.storage.raw import RawBackend
from tests.support.nbd_servers import nbdkit
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
        assert isinstance(first, OverlayBackend)
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
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            open_backend(DiskSource(location=str(image), faults=str(path)), report=print)


def test_no_room_for_a_snapshot(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot be made: No such file"):
        open_backend(DiskSource(location=str(image), snapshot=True), report=print)
    with opened(image):
        pass


def test_contradictions() -> None:
    with pytest.raises(ConfigError, match="either read-only or a snapshot"):
        DiskSource(location="d", read_only=True, snapshot=True)
    with pytest.raises(ConfigError, match="only as a snapshot"):
        DiskSource(location="d", overlay="o")
