"""pyvmm snapshot: what is in one, whether it is whole, and one of a chain."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from pyvmm.cli.main import main
from pyvmm.snapshot.files.saved import open_saved
from tests.support.guest import environment
from tests.support.patience import patient
from tests.support.saved_directories import MIB, disk_image, make_saved, make_writable


@pytest.fixture
def warm(tmp_path: Path) -> Path:
    make_saved(tmp_path / "warm")
    return tmp_path / "warm"


def refusal(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """The one line with which ``pyvmm snapshot ARGV`` is refused, less its prefix."""
    assert main(["snapshot", *map(str, argv)]) == 125
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err.removeprefix("pyvmm: ").rstrip("\n")


def test_info_is_a_table(warm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["snapshot", "info", str(warm)]) == 0
    lines = capsys.readouterr().out.splitlines()
    with open_saved(warm) as saved:
        ident = uuid.UUID(bytes=saved.id)
    assert lines[0] == f"snapshot  {warm}"
    assert lines[1] == f"id        {ident}"
    assert lines[3:] == [
        "kernel    /boot/bzImage",
        "version   6.1.0-47-amd64 (debian)",
        "cpus      2, made for a host of GenuineIntel, TSC 2000.0 MHz",
        "memory    3712K, of which this snapshot holds 0.5 MiB",
        f"disk 0    {disk_image(0)} (1M), 0.0 MiB written",
        f"disk 1    {disk_image(1)} (1M), nothing written",
        lines[-1],
    ]
    assert lines[-1].startswith("stored    0.")
    assert all(line[10] != " " and line[9] == " " for line in lines)


def test_info_for_programs(warm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_saved(warm) as saved:
        base = saved.id
    make_saved(warm.parent / "diff", base=(warm, base))
    assert main(["snapshot", "info", "--json", str(warm.parent / "diff")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory_bytes"] == 3 * MIB + (640 << 10)
    assert found["bases"] == [{"path": str(warm), "id": str(uuid.UUID(bytes=base))}]
    assert found["live"] is False
    assert abs(time.time() - time.mktime(time.strptime(found["made"][:19], "%Y-%m-%dT%H:%M:%S"))
               + time.timezone) < patient(600)
    assert found["disks"][1] == {
        "file": str(disk_image(1)), "size_bytes": MIB, "read_only": False,
        "overlay_bytes": None,
    }


def test_check_says_that_all_is_well(warm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["snapshot", "check", str(warm)]) == 0
    assert capsys.readouterr().out == (
        f"{warm}: whole: state, 0.5 MiB of RAM, 2 disks\n"
    )


def test_check_has_a_line_for_each_problem(
    warm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_writable(warm)
    with (warm / "disk0.overlay").open("r+b") as file:
        file.seek(9000)
        file.write(b"changed")
    with (warm / "ram").open("r+b") as file:
        file.write(b"\x55")
    assert main(["snapshot", "check", str(warm)]) == 125
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        f"pyvmm: {warm}/ram: is damaged: the CRCs of 1 of 4 chunks of 1 MiB are wrong, the first "
        "at 0x0",
        f"pyvmm: {warm}/disk0.overlay: is damaged: its CRC is wrong",
    ]


def test_check_looks_for_a_disk_where_it_is_told(
    warm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = warm.parent / "copy.img"
    shutil.copy(disk_image(1), copy)
    assert main(["snapshot", "check", str(warm), "--disk", f"1={copy}"]) == 0
    assert main(["snapshot", "check", str(warm), "--disk", f"1={warm.parent}/nowhere"]) == 125
    assert "nowhere: is missing" in capsys.readouterr().err
    assert refusal(capsys, "check", warm, "--disk", "x").startswith("--disk x: is not N=FILE")


def test_merge_makes_a_full_snapshot(warm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_saved(warm) as saved:
        base = saved.id
    make_saved(warm.parent / "diff", base=(warm, base))
    out = warm.parent / "out"
    assert main(["snapshot", "merge", str(warm.parent / "diff"), str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 0.5 MiB of RAM, merged of 2 snapshots\n"
    assert main(["snapshot", "check", str(out)]) == 0


@pytest.mark.parametrize("verb", ["info", "check", "merge"])
def test_what_cannot_be_used_is_one_line(
    warm: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [warm.parent / "out"] if verb == "merge" else []
    assert refusal(capsys, verb, "nowhere", *out).endswith("nowhere: no such directory")
    assert refusal(capsys, verb, "", *out) == "the snapshot's directory: has no name"
    assert refusal(capsys, verb, "/dev/null", *out).startswith("/dev/null: is no directory")
    make_writable(warm)
    (warm / "state").write_bytes(b"")
    assert refusal(capsys, verb, warm, *out) == f"{warm}/state: is no state of a snapshot"
    assert not (warm.parent / "out").exists()


def test_merge_refuses_what_is_there(warm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is there already" in refusal(capsys, "merge", warm, warm)
    assert "cannot be written: No such file" in refusal(capsys, "merge", warm, "/nowhere/out")


def test_names_do_not_drive_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x\x1b[2J\npyvmm: forged"
    make_saved(path)
    make_saved(tmp_path / "diff", base=(path, b"\0" * 16))
    assert main(["snapshot", "info", str(path)]) == 0
    assert main(["snapshot", "check", str(path)]) == 0
    assert main(["snapshot", "info", str(tmp_path / "diff")]) == 125
    captured = capsys.readouterr()
    for line in (captured.out + captured.err).splitlines():
        assert line.isprintable()
        assert not line.startswith("pyvmm: forged")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_merge_that_is_stopped_leaves_nothing(warm: Path, number: signal.Signals) -> None:
    make_saved(warm.parent / "big", regions=((0, 256 * MIB),), overlays={})
    child = subprocess.Popen(
        [sys.executable, "-m", "pyvmm", "snapshot", "merge", str(warm.parent / "big"),
         str(warm.parent / "out")],
        env=environment(), stderr=subprocess.PIPE,
    )
    end = time.monotonic() + patient(60)
    while not (warm.parent / "out.tmp" / "ram").exists() and time.monotonic() < end:
        time.sleep(0.01)
    child.send_signal(number)
    _, errors = child.communicate(timeout=patient(60))
    assert child.returncode == 128 + number
    assert b"Traceback" not in errors
    assert sorted(os.listdir(warm.parent)) == ["big", "warm"]
