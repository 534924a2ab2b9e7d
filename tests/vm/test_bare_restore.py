"""Whole command lines: a run that leaves a snapshot, and clones that go on from it."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pyvmm.snapshot.files.layout import RECORDS
from pyvmm.snapshot.files.records import decode, encode
from tests.support.guest import environment
from tests.support.patience import patient
from tests.support.terminal import Terminal
from tests.support.tiny_guests import (
    HALT,
    REBOOT,
    REPORT_0,
    REPORT_7,
    SPIN,
    TRIPLE_FAULT,
    echoes,
    prints,
    prints_for_ever,
    waits,
    write_guest,
)
from tests.support.warm_runs import WARM, Warmed, finished, pyvmm

pytestmark = pytest.mark.bare


@pytest.fixture
def warmed(tmp_path: Path) -> Warmed:
    return Warmed(tmp_path)


def test_a_guest_that_says_when(warmed: Warmed) -> None:
    status, shown, said = warmed.run(prints(b"before\n"), WARM, prints(b"behind\n"), REPORT_7)
    assert (status, shown) == (7, "before\nbehind\n")
    where = re.escape(str(warmed.directory))
    assert re.fullmatch(
        rf"pyvmm: snapshot {where}: \d+ [KM]iB in \d+ ms; pyvmm restore {where} goes on from "
        r"there\n", said,
    )
    for _ in range(2):
        assert warmed.restore() == (7, "behind\n", "")


@pytest.mark.parametrize("live", [False, True])
def test_a_line_of_the_console_says_when(warmed: Warmed, live: bool) -> None:
    options = ["--snapshot-at", "login: $", *(["--snapshot-live"] if live else [])]
    code = (prints(b"vm login: "), waits(200_000), prints(b"root\n"), REPORT_7)
    status, shown, said = warmed.run(*code, options=options)
    assert (status, shown) == (7, "vm login: root\n")
    assert "goes on from there" in said
    assert warmed.restore() == (7, "root\n", "")


def test_the_run_may_end_there(warmed: Warmed) -> None:
    warmed.warm(prints(b"clone\n"), REPORT_7)
    assert warmed.restore() == (7, "clone\n", "")


def test_a_clone_of_no_warm_guest(warmed: Warmed) -> None:
    status, _, said = warmed.run(REPORT_0, options=["--snapshot-exit"])
    assert status == 125
    assert "none was taken" in said
    assert said.count("\n") == 1
    assert not warmed.directory.exists()


def test_a_disk_that_is_written_in_place_is_refused_at_once(warmed: Warmed) -> None:
    kernel = write_guest(warmed.folder / "guest.elf", prints(b"never"), REPORT_0)
    status, shown, said = finished(pyvmm(
        "run", "--kernel", kernel, "--disk", warmed.disk, "--snapshot", warmed.directory
    ))
    assert (status, shown) == (125, "")
    assert said.count("\n") == 1
    assert str(warmed.disk) in said
    assert ",snapshot" in said


def test_a_snapshot_that_fails_is_a_line(warmed: Warmed) -> None:
    """The directory above it is gone when the guest is warm."""
    warmed.directory = warmed.folder / "gone" / "warm"
    warmed.directory.parent.mkdir()
    code = (prints(b"up\n"), echoes())
    process = subprocess.Popen(
        warmed.run_words(*code, options=["--snapshot-at", "^go$"]), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        assert process.stdout.readline() == b"up\n"
        warmed.directory.parent.rmdir()
        process.stdin.write(b"go\n")
        process.stdin.flush()
        line = process.stderr.readline().decode()
        assert line.startswith(f"pyvmm: snapshot {warmed.directory}: was not taken: ")
        assert line.endswith("; the guest goes on\n")
        process.stdin.write(b"x\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"go\n"
        assert process.stdout.readline() == b"x\n"
        process.terminate()
        assert process.wait(patient(20)) == 128 + signal.SIGTERM


# Keys


def test_ctrl_a_s_takes_it_and_the_clone_has_the_same_keys(warmed: Warmed) -> None:
    kernel = write_guest(warmed.folder / "guest.elf", prints_for_ever(b"."))
    terminal = Terminal(
        "--timeout", "60", "--memory", "32M", "--snapshot", str(warmed.directory), kernel=kernel
    )
    terminal.wait_for("...")
    terminal.type("\x01?")
    terminal.wait_for("Ctrl-A s  take the snapshot")
    terminal.type("\x01s")
    terminal.wait_for("goes on from there")
    terminal.wait_for("...")
    terminal.type("\x01s")
    terminal.wait_for("is taken already")
    terminal.type("\x01x")
    assert terminal.status() == 0
    terminal.close()
    clone = Terminal(words=warmed.restore_words())
    clone.wait_for("...")
    clone.type("\x01?")
    clone.wait_for("Ctrl-A p  pause")
    clone.type("\x01p")
    clone.wait_for("paused; Ctrl-A p resumes")
    clone.type("\x01p")
    clone.wait_for("resumed")
    clone.wait_for("...")
    clone.type("\x01x")
    assert clone.status() == 0
    clone.close()


def test_on_a_terminal_the_line_about_it_begins_a_line(warmed: Warmed) -> None:
    words = warmed.run_words(
        prints(b"login: "), SPIN, options=["--snapshot-at", "login: $", "--snapshot-exit"]
    )
    terminal = Terminal(words=words)
    terminal.wait_for("login: \r\npyvmm: snapshot ")
    assert terminal.status() == 0
    shown = terminal.seen
    assert shown.endswith(b"goes on from there\r\n"), "and no empty line"
    terminal.close()


# What restore shares with run


def test_the_clone_hears_what_is_typed(warmed: Warmed) -> None:
    warmed.warm(prints(b"?"), echoes())
    words = pyvmm("restore", warmed.directory, "--timeout", str(patient(3)))
    status, shown, _ = finished(words, b"hello")
    assert (status, shown) == (124, "?hello")


@pytest.mark.parametrize(("code", "status", "words"), [
    (TRIPLE_FAULT, 122, "triple fault"), (HALT, 0, ""), (REBOOT, 0, ""),
], ids=["triple fault", "halt", "reboot"])
def test_a_clone_ends_like_any_run(
    warmed: Warmed, code: bytes, status: int, words: str
) -> None:
    warmed.warm(prints(b"x\n"), code)
    ended, shown, said = warmed.restore()
    assert (ended, shown) == (status, "x\n")
    assert words in said


def test_a_console_file_and_verbose(warmed: Warmed) -> None:
    warmed.warm(prints(b"to the file\n"), REPORT_0)
    log = warmed.folder / "log"
    status, shown, said = warmed.restore("--console", log, "-v")
    assert (status, shown, log.read_text()) == (0, "", "to the file\n")
    assert f"{warmed.directory}: a clone of ELF vmlinux" in said
    assert "exits: " in said
    assert "exit status 0" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_a_clone_and_harms_nothing(warmed: Warmed, number: int) -> None:
    warmed.warm(prints(b"up\n"), SPIN)
    before = contents(warmed.directory)
    process = subprocess.Popen(
        warmed.restore_words(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=environment(),
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(number)
        status = process.wait(patient(20))
    assert status == (-number if number == signal.SIGKILL else 128 + number)
    assert contents(warmed.directory) == before


def test_a_kill_at_any_moment_of_a_restore_harms_nothing(warmed: Warmed) -> None:
    warmed.warm(prints(b"up\n"), REPORT_7)
    before = contents(warmed.directory)
    for step in range(8):
        process = subprocess.Popen(
            warmed.restore_words("--console", "none"), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(),
        )
        time.sleep(0.03 * step)
        process.kill()
        process.wait()
    assert contents(warmed.directory) == before
    assert sorted(os.listdir(warmed.folder)) == ["disk.img", "guest.elf", "warm"]
    assert warmed.restore() == (7, "up\n", "")


def test_many_clones_at_once(warmed: Warmed) -> None:
    warmed.warm(prints(b"up\n"), REPORT_7)
    clones = [
        subprocess.Popen(
            warmed.restore_words(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=environment(),
        ) for _ in range(4)
    ]
    for clone in clones:
        shown, said = clone.communicate(timeout=patient(60))
        assert (clone.returncode, shown, said) == (7, b"up\n", b"")


def test_the_kernel_file_is_not_needed_any_more(warmed: Warmed) -> None:
    warmed.warm(prints(b"up\n"), REPORT_7)
    (warmed.folder / "guest.elf").unlink()
    assert warmed.restore() == (7, "up\n", "")


# What is refused


def refusal(warmed: Warmed, *options: str | Path) -> str:
    """The one line with which a restore refuses."""
    status, shown, said = warmed.restore(*options)
    assert (status, shown) == (125, ""), said
    assert said.startswith("pyvmm: ")
    assert said.count("\n") == 1, said
    return said


def test_no_snapshot(warmed: Warmed) -> None:
    assert f"{warmed.directory}: no such directory" in refusal(warmed)
    warmed.directory.touch()
    assert "is no directory" in refusal(warmed)
    warmed.directory.unlink()
    warmed.directory.mkdir()
    assert "state: is missing: the directory is no snapshot" in refusal(warmed)


def test_a_snapshot_that_is_damaged(warmed: Warmed) -> None:
    warmed.warm(REPORT_7)
    for path in warmed.directory.iterdir():
        path.chmod(0o600)
    state = warmed.directory / "state"
    whole = state.read_bytes()
    state.write_bytes(whole[:-1])
    refusal(warmed)
    state.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    refusal(warmed)
    state.write_bytes(whole)
    os.truncate(warmed.directory / "ram", 1 << 20)
    assert "ram: has 1048576 bytes instead of 33554432" in refusal(warmed)
    (warmed.directory / "ram").unlink()
    assert "ram: is missing" in refusal(warmed)


def rewritten(directory: Path, versions: dict[str, int], **changes: object) -> None:
    """Give the snapshot's ``state`` other ``versions`` of records, and ``changes`` of their values.
    """
    state = directory / "state"
    known = dict(RECORDS)
    values = decode(state.read_bytes(), name="state", versions=known)
    for name, change in changes.items():
        value = values[name]
        assert isinstance(value, dict)
        assert isinstance(change, dict)
        value.update(change)
    state.chmod(0o600)
    state.write_bytes(encode(values, name="state", versions=known | versions))


def test_a_snapshot_of_a_later_version(warmed: Warmed) -> None:
    warmed.warm(REPORT_7)
    rewritten(warmed.directory, {})
    assert warmed.restore()[0] == 7
    rewritten(warmed.directory, {"machine": RECORDS["machine"] + 1})
    assert "was made by a later pyvmm" in refusal(warmed)


def test_a_snapshot_of_another_cpu(warmed: Warmed) -> None:
    warmed.warm(REPORT_7)
    rewritten(warmed.directory, {}, host={"vendor": "HygonGenuine"})
    line = refusal(warmed)
    assert "HygonGenuine" in line
    assert "cannot move between vendors" in line


def test_a_snapshot_that_is_being_made(warmed: Warmed) -> None:
    unfinished = warmed.folder / "warm.tmp"
    unfinished.mkdir()
    assert f"{unfinished} is an unfinished snapshot" in refusal(warmed)
    warmed.directory = unfinished
    assert "the process that made it has ended: remove it" in refusal(warmed)
    maker = os.open(unfinished, os.O_RDONLY)
    try:
        fcntl.flock(maker, fcntl.LOCK_EX)
        assert "which a process still writes" in refusal(warmed)
    finally:
        os.close(maker)


def test_a_disk_that_has_changed_or_is_gone(warmed: Warmed) -> None:
    warmed.warm(REPORT_7)
    assert warmed.restore()[0] == 7
    status = warmed.disk.stat()
    os.utime(warmed.disk, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert str(warmed.disk) in refusal(warmed)
    os.utime(warmed.disk, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert warmed.restore()[0] == 7
    moved = warmed.folder / "moved.img"
    shutil.move(warmed.disk, moved)
    assert str(warmed.disk) in refusal(warmed)
    assert warmed.restore("--disk", f"0={moved}")[0] == 7
    os.truncate(moved, 8192)
    assert str(moved) in refusal(warmed, "--disk", f"0={moved}")
    assert "disk" in refusal(warmed, "--disk", f"1={moved}")


def test_a_clone_needs_no_room_of_its_own_for_a_directory(warmed: Warmed) -> None:
    """Nothing is ever made beside the snapshot, nor in it."""
    warmed.warm(prints(b"up\n"), REPORT_7)
    warmed.directory.chmod(0o500)
    assert warmed.restore()[0] == 7
    assert sorted(os.listdir(warmed.folder)) == ["disk.img", "guest.elf", "warm"]


def contents(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    """All that may be harmed in ``directory``."""
    return {
        path.name: (path.stat().st_mode, path.stat().st_mtime_ns, path.read_bytes())
        for path in directory.iterdir()
    }
