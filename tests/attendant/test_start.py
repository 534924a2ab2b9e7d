"""An attendant's process: asleep until it is needed, with nothing of the machine's, then gone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pyvmm
from pyvmm.attendant.beginning import Beginning
from pyvmm.attendant.remote import RemoteAttendant
from pyvmm.attendant.start import start
from pyvmm.cli.attended import PROGRAM
from pyvmm.errors import HostError
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.run.verdict import Evidence
from pyvmm.vhost_user.listener import Listener
from tests.support.patience import patient

ROOT = Path(__file__).resolve().parents[2]
BEGINNING = Beginning(
    version=pyvmm.__version__, bundle="run", kernel="/no/kernel", any_snapshot=True,
    most_scratch_files=2,
)
MACHINE = """\
import os, signal, sys
sys.path.insert(0, {root!r})
import pyvmm
from pyvmm.attendant.beginning import Beginning
from pyvmm.attendant.start import start
from pyvmm.jail.privileges import drop_capabilities, hide_memory
from pyvmm.vhost_user.listener import Listener
listener = Listener("socket")
name = listener.give_name_away()
attendant = start(
    Beginning(
        version=pyvmm.__version__, bundle="run", kernel="k", most_scratch_files=1,
        socket_name=name.name, socket_device=name.device, socket_inode=name.inode,
    ), program="pyvmm.cli.attending", directory_fd=name.directory_fd,
)
attendant.jailed()
open("attendant", "w").write(str(attendant.pid))
drop_capabilities()
hide_memory()
"""
JAILED = (
    "pyvmm: the jail ended this machine: a thread made a system call that its filter does not "
    "have; please report this (docs/jail.md)\n"
)


@contextlib.contextmanager
def started(beginning: Beginning = BEGINNING) -> Iterator[RemoteAttendant]:
    """An attendant of this process."""
    attendant = start(beginning, program=PROGRAM)
    try:
        attendant.jailed()
        yield attendant
    finally:
        attendant.close()


def until(done: Callable[[], bool]) -> None:
    """Wait for ``done``."""
    until_s = time.monotonic() + patient(20)
    while not done():
        assert time.monotonic() < until_s
        time.sleep(0.01)


def test_it_sleeps_with_nothing_of_ours() -> None:
    inherited, other_end = os.pipe()
    os.set_inheritable(inherited, True)  # as one that the caller of pyvmm left open
    try:
        with started() as attendant:
            folder = Path(f"/proc/{attendant.pid}")
            until(lambda: b"pyvmm-attendant" in (folder / "cmdline").read_bytes())
            # The shell has others while it redirects.
            until(lambda: sorted(map(int, os.listdir(folder / "fd"))) == [0, 1, 2, 3, 4, 7])
            assert os.getpgid(attendant.pid) == attendant.pid
            blocked = int((folder / "status").read_text().partition("SigBlk:\t")[2].split()[0], 16)
            unblocked = {signal.SIGKILL, signal.SIGSTOP}
            assert {one for one in range(1, 32) if not blocked >> one - 1 & 1} == unblocked
    finally:
        os.close(inherited)
        os.close(other_end)


def test_it_goes_without_having_become_python() -> None:
    with started() as attendant:
        before_s = time.monotonic()
    assert time.monotonic() - before_s < patient(5)
    with pytest.raises(ProcessLookupError):
        os.kill(attendant.pid, 0)


def test_it_serves_once_it_is_awake(tmp_path: Path) -> None:
    with started() as attendant:
        attendant.wake()
        os.close(attendant.scratch_file())
        with attendant.snapshot_writer(tmp_path / "warm") as writer:
            os.close(writer.create("ram"))
            assert os.listdir(tmp_path) == ["warm.tmp"]
        assert os.listdir(tmp_path) == []
        assert Path(f"/proc/{attendant.pid}/comm").read_text() == "pyvmm-attendant\n"


def test_signals_to_a_process_group_are_not_its_own() -> None:
    with started() as attendant:
        for name in ("INT", "TERM", "HUP", "TSTP", "QUIT"):
            os.kill(attendant.pid, signal.Signals[f"SIG{name}"])
        os.close(attendant.scratch_file())
        os.kill(attendant.pid, signal.SIGTERM)
        os.close(attendant.scratch_file())


def test_what_it_explains_is_printed_here(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with started(BEGINNING.replace(kernel=str(tmp_path / "bzImage"))) as attendant:
        attendant.ended(Outcome(Kind.GAVE_UP, detail="bad"), Evidence())
        assert capfd.readouterr().err == (
            f"pyvmm: {tmp_path}/bzImage: the code in front of the kernel gave up, most often "
            "because the file is damaged or cut: copy or build it again\n"
        )


def test_one_that_is_killed_is_missed_when_it_is_asked(tmp_path: Path) -> None:
    with started() as attendant:
        os.kill(attendant.pid, signal.SIGKILL)
        with pytest.raises(BrokenPipeError, match="the process beside the machine"):
            attendant.scratch_file()
        attendant.ended(Outcome(Kind.PANIC), Evidence())


def test_another_version_serves_nobody() -> None:
    with started(BEGINNING.replace(version="0.0.1")) as attendant, pytest.raises(BrokenPipeError):
        attendant.scratch_file()


def test_a_socket_loses_its_name_at_the_end(tmp_path: Path) -> None:
    listener = Listener(str(tmp_path / "socket"))
    name = listener.give_name_away()
    attendant = start(
        BEGINNING.replace(
            socket_name=name.name, socket_device=name.device, socket_inode=name.inode
        ), program=PROGRAM, directory_fd=name.directory_fd,
    )
    name.close()
    assert os.listdir(tmp_path) == ["socket"]
    attendant.close()
    assert os.listdir(tmp_path) == []
    listener.close()


def test_a_start_that_fails_is_one_line_and_leaves_no_descriptor(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object, **_options: object) -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "posix_spawn", refuse)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(HostError, match=r"cannot be started: .*Resource .* \(--jail off does"):
        start(BEGINNING, program=PROGRAM)
    assert os.listdir("/proc/self/fd") == before


def test_without_a_shell_python_begins_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyvmm.attendant.start._SHELL", "/no/sh")
    with started() as attendant:
        os.close(attendant.scratch_file())
    with started():
        pass


# A machine's process that ends without a word ----------------------------------------------------


def machine(folder: Path, *lines: str, most_s: float = 60) -> tuple[int, str]:
    """Run ``lines`` in a process with an attendant and a socket; its end, and what was printed."""
    with tempfile.TemporaryFile("w+") as said:  # a parent that asks at once, as shells do
        done = subprocess.run(
            [sys.executable, "-c", "\n".join((MACHINE.format(root=str(ROOT)), *lines))],
            stdin=subprocess.DEVNULL, stdout=said, stderr=said, cwd=folder,
            timeout=patient(most_s), check=False,
        )
        (attendant,) = map(int, (folder / "attendant").read_text().split())
        (folder / "attendant").unlink()
        until(lambda: not os.path.exists(f"/proc/{attendant}"))
        said.seek(0)
        return done.returncode, said.read()


KILL = "os.kill(os.getpid(), signal.{})"


@pytest.mark.parametrize("line", ["", "attendant.wake()", "os.close(attendant.scratch_file())"])
def test_the_end_by_a_filter_is_told_in_one_line(tmp_path: Path, line: str) -> None:
    assert machine(tmp_path, line, KILL.format("SIGSYS")) == (-signal.SIGSYS, JAILED)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("line", [KILL.format("SIGKILL"), KILL.format("SIGSEGV"), "os._exit(31)"])
def test_any_other_end_is_silent_and_clears_away(tmp_path: Path, line: str) -> None:
    _, said = machine(tmp_path, line)
    assert said == ""
    assert os.listdir(tmp_path) == []


def test_a_word_without_an_end_ends_the_sleeper_and_not_the_host(tmp_path: Path) -> None:
    """A machine that was taken over writes to the pipe that only wakes its attendant."""
    status, said = machine(
        tmp_path, "import time", "os.set_blocking(attendant._wake_fd, False)",
        f"until_s = time.monotonic() + {patient(60)}",
        "while time.monotonic() < until_s:",
        "    try:",
        "        os.write(attendant._wake_fd, b'x' * 65536)",
        "    except BlockingIOError:",
        "        time.sleep(0.001)",
        "    except BrokenPipeError:",
        "        break",
        "    pages = int(open(f'/proc/{attendant.pid}/statm').read().split()[1])",
        "    assert pages < 10000, pages",
        "else:",
        "    sys.exit('it sleeps on')",
        "os._exit(3)", most_s=90,
    )
    assert (status, "it sleeps on" in said) == (3, False)
