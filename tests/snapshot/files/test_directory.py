"""A directory as it is made and opened: whole, private, and every file what ``state`` says."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from pyvmm.errors import SnapshotError
from pyvmm.snapshot.files.saved import open_saved
from pyvmm.snapshot.files.writer import Writer
from tests.support.saved_directories import REGIONS, disk_image, make_saved


def test_a_directory_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "warm"
    made = make_saved(path)
    with open_saved(path) as saved:
        assert saved.path == str(path)
        assert saved.id == made
        assert saved.ram.regions == REGIONS
        assert saved.ram.runs is None
        assert os.fstat(saved.ram_fd).st_size == saved.ram.size_bytes
        assert saved.ram_layers == [(saved.ram_fd, None)]
        assert [disk.location for disk in saved.disks] == [str(disk_image(0)), str(disk_image(1))]
        assert saved.overlay_path(0) == f"{path}/disk0.overlay"
        assert saved.overlay_path(1) is None
        config = saved.record("config")
        assert isinstance(config, dict)
        assert config["memory_bytes"] == saved.ram.size_bytes
        with pytest.raises(SnapshotError, match="has no record 'nothing'"):
            saved.record("nothing")


def test_a_directory_is_private_and_its_files_read_only(tmp_path: Path) -> None:
    make_saved(tmp_path / "warm")
    assert stat.S_IMODE((tmp_path / "warm").stat().st_mode) == 0o700
    for file in (tmp_path / "warm").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o400, file
    assert sorted(os.listdir(tmp_path)) == ["warm"]


def test_a_diff_brings_its_bases(tmp_path: Path) -> None:
    full = make_saved(tmp_path / "full")
    make_saved(tmp_path / "diff", mark=2, base=(tmp_path / "full", full))
    with open_saved(tmp_path / "diff") as saved:
        assert [one.path for one in saved.chain] == [f"{tmp_path}/full", f"{tmp_path}/diff"]
        assert [runs for _, runs in saved.ram_layers] == [None, ((1 << 20, 8192), (2 << 20, 4096))]


def test_an_aborted_writer_leaves_nothing(tmp_path: Path) -> None:
    with Writer(tmp_path / "warm") as writer:
        os.close(writer.create("ram"))
        assert sorted(os.listdir(tmp_path)) == ["warm.tmp"]
    assert os.listdir(tmp_path) == []
