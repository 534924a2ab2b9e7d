"""``pyvmm run`` as a job of a shell: stopped, continued, in the background and in front again."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.terminal_bench import TerminalBench
from tests.support.tiny_guests import echoes, prints, write_guest

pytestmark = pytest.mark.bare


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    """A guest that shows what is typed, for ever."""
    return write_guest(tmp_path / "echo", prints(b"listens"), echoes())


@pytest.fixture
def bench() -> Iterator[TerminalBench]:
    with TerminalBench() as bench:
        yield bench


def hears_keys(bench: TerminalBench, keys: bytes = b"keys\x03\x1a") -> None:
    """Keys reach the guest as they are, which they do on a raw terminal only."""
    bench.type(keys)
    bench.wait_for(keys)


def quits(bench: TerminalBench) -> None:
    bench.type(b"\x01x")
    assert bench.status(20) == 0
    assert bench.has_its_modes_back()
    assert bench.typed_for_the_shell() == b""


@pytest.mark.parametrize("keeps_modes", [False, True])
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGTSTP])
def test_fault_31_stopped_and_in_front_again(
    bench: TerminalBench, echo: Path, number: int, keeps_modes: bool
) -> None:
    bench.run(echo, "--timeout", "60", keeps_modes=keeps_modes)
    bench.wait_for(b"listens")
    for _ in range(2):
        bench.kill(number)
        bench.wait_until_stopped()
        if number == signal.SIGTSTP:
            assert bench.has_its_modes_back()
        bench.fg()
        time.sleep(0.5)
        hears_keys(bench)
    quits(bench)


def test_fault_31_started_in_the_background_and_brought_to_the_front(
    bench: TerminalBench, echo: Path
) -> None:
    """Without a SIGCONT: bash sends none to a job that runs."""
    bench.run(echo, "--timeout", "60", background=True)
    bench.wait_for(b"listens")
    assert bench.has_its_modes_back()
    bench.type(b"ls\n")
    assert bench.typed_for_the_shell(after_s=0.5) == b"ls\n"
    bench.fg()
    time.sleep(1)
    hears_keys(bench)
    quits(bench)


def test_fault_31_stopped_and_on_in_the_background(bench: TerminalBench, echo: Path) -> None:
    bench.run(echo, "--timeout", "60")
    bench.wait_for(b"listens")
    bench.kill(signal.SIGSTOP)
    bench.wait_until_stopped()
    bench.bg()
    assert bench.runs(for_s=0.5)
    assert bench.has_its_modes_back()
    bench.type(b"ls\n")
    assert bench.typed_for_the_shell(after_s=0.5) == b"ls\n"
    bench.fg()
    time.sleep(1)
    hears_keys(bench)
    quits(bench)


@pytest.mark.parametrize("ending", ["timeout", "signal"])
def test_fault_31_an_end_in_the_background_stops_nobody(
    bench: TerminalBench, echo: Path, ending: str
) -> None:
    """Restoring the terminal from there is answered by SIGTTOU."""
    bench.run(echo, "--timeout", "3" if ending == "timeout" else "60")
    bench.wait_for(b"listens")
    bench.take_terminal()
    if ending == "signal":
        bench.kill(signal.SIGTERM)
    assert bench.status(20) == (124 if ending == "timeout" else 143)
    assert bench.has_its_modes_back()


def test_fault_31_an_end_in_the_background_leaves_no_raw_terminal(
    bench: TerminalBench, echo: Path
) -> None:
    """Of a shell that does not mind the modes: those that are still ours are undone."""
    bench.run(echo, "--timeout", "3", keeps_modes=True)
    bench.wait_for(b"listens")
    bench.kill(signal.SIGSTOP)
    bench.wait_until_stopped()
    bench.bg()
    assert bench.status(20) == 124
    assert bench.has_its_modes_back()


def test_fault_31_a_stop_that_the_shell_never_saw(bench: TerminalBench, echo: Path) -> None:
    """STOP and CONT by hand: the modes to restore are those before the run, not ours."""
    pid = bench.run(echo, "--timeout", "60")
    bench.wait_for(b"listens")
    for _ in range(3):
        os.kill(pid, signal.SIGSTOP)
        os.kill(pid, signal.SIGCONT)
    hears_keys(bench)
    quits(bench)


def test_fault_31_who_ignores_sigtstp_goes_on(bench: TerminalBench, echo: Path) -> None:
    bench.run(echo, "--timeout", "60", ignores=[signal.SIGTSTP])
    bench.wait_for(b"listens")
    bench.kill(signal.SIGTSTP)
    assert bench.runs(for_s=0.5)
    hears_keys(bench)
    quits(bench)


def test_fault_31_a_terminal_that_was_stopped_before_the_run_starts_it(
    bench: TerminalBench, echo: Path
) -> None:
    """Ctrl-S at the shell: output waits, and so would who waits for it to be shown."""
    bench.type(b"\x13")
    time.sleep(0.2)
    bench.run(echo, "--timeout", "2")
    assert bench.status(20) == 124
