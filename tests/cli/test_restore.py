"""``pyvmm restore`` and ``run --snapshot`` refuse what cannot work: one line, status 125."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import pyvmm.cli.run
import pyvmm.cli.warm  # noqa: F401 - a module that came from the bundle would keep that open
from pyvmm.cli.main import main
from pyvmm.cli.parse import parse_moved_disks
from pyvmm.errors import ConfigError
from tests.support.tiny_guests import REPORT_0, write_guest


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    return write_guest(tmp_path / "guest.elf", REPORT_0)


def refusal(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The one line with which ``pyvmm`` refuses ``words``."""
    open_before = sorted(os.listdir("/proc/self/fd"))
    assert main([*map(str, words)]) == 125
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pyvmm: ")
    assert captured.err.count("\n") == 1, captured.err
    assert sorted(os.listdir("/proc/self/fd")) == open_before, "a descriptor was left open"
    return captured.err


@pytest.mark.parametrize(("options", "words"), [
    (["--snapshot-at", "x"], "--snapshot-at: goes with --snapshot DIR"),
    (["--snapshot-exit"], "--snapshot-exit: goes with --snapshot DIR"),
    (["--snapshot-live"], "--snapshot-live: goes with --snapshot DIR"),
    (["--snapshot", ""], "--snapshot: names no directory"),
    (["--snapshot", "/nonexistent/warm"], "there is no directory /nonexistent"),
    (["--snapshot", "/tmp/warm.tmp/"], "ends in .tmp, as unfinished snapshots do"),
    (["--snapshot", "w", "--snapshot-at", "("], "is no regular expression"),
    (["--snapshot", "w", "--snapshot-at", ""], "matches every line"),
    (["--snapshot", "w", "--snapshot-exit", "--snapshot-live"], "leave out one of them"),
    (["--snapshot", "a", "--snapshot", "b"], "--snapshot"),
])
def test_a_snapshot_that_cannot_be_asked_for(
    capsys: pytest.CaptureFixture[str], kernel: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, options: list[str], words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in refusal(capsys, "run", "--kernel", kernel, *options)
    assert sorted(os.listdir()) == ["guest.elf"]


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_nothing_is_overwritten(
    capsys: pytest.CaptureFixture[str], kernel: Path, tmp_path: Path, kind: str
) -> None:
    there = tmp_path / "warm"
    if kind == "directory":
        there.mkdir()
    elif kind == "file":
        there.touch()
    else:
        there.symlink_to("nowhere")
    line = refusal(capsys, "run", "--kernel", kernel, "--snapshot", there)
    assert f"--snapshot {there}: exists" in line


def test_a_directory_that_may_not_be_written(
    capsys: pytest.CaptureFixture[str], kernel: Path, tmp_path: Path
) -> None:
    if os.geteuid() == 0:
        pytest.skip("root writes anywhere")
    tmp_path.chmod(0o500)
    line = refusal(capsys, "run", "--kernel", kernel, "--snapshot", tmp_path / "warm")
    assert "cannot be written" in line


@pytest.mark.parametrize(("options", "words"), [
    ([], "DIR"), (["a", "b"], "b"),
    (["d", "--clock", "later"], "--clock later: is none of keep, now"),
    (["d", "--disk", "root.img"], "is not N=FILE"), (["d", "--disk", "0="], "is not N=FILE"),
    (["d", "--disk=-1=x"], "is not N=FILE"), (["d", "--disk", "1e1=x"], "is not N=FILE"),
    (["d", "--disk", "0=a", "--disk", "0=b"], "disk 0 has a file already"),
    (["d", "--timeout", "0"], "--timeout"), (["d", "--console", "sdtio"], "did you mean stdio"),
    (["d", "--control-fd", "x"], "--control-fd x"), (["d", "--memory", "1G"], "--memory"),
])
def test_a_restore_that_cannot_be_asked_for(
    capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert words in refusal(capsys, "restore", *options)


def test_a_disk_is_named_by_its_number() -> None:
    assert parse_moved_disks(["1=a=b", "0=/x"]) == {1: "a=b", 0: "/x"}
    with pytest.raises(ConfigError, match="--disk 0x1=a"):
        parse_moved_disks(["0x1=a"])
