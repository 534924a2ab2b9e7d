"""What a guest makes the terminal say must not reach the shell: seen from the terminal."""

from __future__ import annotations

import shlex
import signal
import time
from pathlib import Path

import pytest

from tests.support.guest import command
from tests.support.terminal_bench import ANSWERS, TerminalBench
from tests.support.tiny_guests import (
    HALT,
    REBOOT,
    REPORT_0,
    SPIN,
    TRIPLE_FAULT,
    echoes,
    prints,
    prints_for_ever,
    waits,
    write_guest,
)

pytestmark = pytest.mark.bare


@pytest.mark.parametrize(
    ("query", "late_s"), [(b"\x1b[6n", 0.0), *((query, 0.2) for query in ANSWERS)], ids=repr
)
def test_fault_3_an_answer_is_not_left_to_the_shell(
    tmp_path: Path, query: bytes, late_s: float
) -> None:
    kernel = write_guest(tmp_path / "guest", prints(b"asks " + query), REPORT_0)
    with TerminalBench(answer_after_s=late_s) as bench:
        bench.run(kernel, "--timeout", "60")
        assert bench.status() == 0
        assert query in bench.shown()
        assert bench.typed_for_the_shell(after_s=late_s + 0.3) == b""
        assert bench.has_its_modes_back()


@pytest.mark.parametrize("ending", [REBOOT, TRIPLE_FAULT, HALT, SPIN, waits(200) + REPORT_0])
def test_fault_3_however_the_run_ends(tmp_path: Path, ending: bytes) -> None:
    kernel = write_guest(tmp_path / "guest", prints(b"\x1b[6" + b"n\x1b[c" * 50), ending)
    with TerminalBench(answer_after_s=0.15) as bench:
        bench.run(kernel, "--timeout", "2")
        bench.status()
        assert bench.typed_for_the_shell(after_s=0.5) == b""
        assert bench.has_its_modes_back()


def test_fault_3_a_guest_that_asks_until_it_is_stopped(tmp_path: Path) -> None:
    kernel = write_guest(tmp_path / "guest", prints_for_ever(b"\x1b[c."))
    with TerminalBench(answer_after_s=0.1) as bench:
        bench.run(kernel, "--timeout", "60")
        bench.wait_for(b"\x1b[c.")
        bench.type(b"\x01x")
        assert bench.status() == 0
        assert bench.typed_for_the_shell(after_s=0.5) == b""


def test_fault_3_what_is_typed_ahead_is_the_guests_and_gone_with_it(tmp_path: Path) -> None:
    kernel = write_guest(tmp_path / "guest", prints(b"runs"), waits(1 << 20), REPORT_0)
    with TerminalBench() as bench:
        bench.run(kernel, "--timeout", "60")
        bench.wait_for(b"runs")
        bench.type(b"rm -rf /\n")
        assert bench.status() == 0
        assert bench.typed_for_the_shell() == b""


def test_fault_3_input_from_a_file_leaves_the_terminals_answers_too(tmp_path: Path) -> None:
    """Nobody reads the terminal then, and it answers all the same."""
    kernel = write_guest(tmp_path / "guest", prints(b"\x1b[6n"), REPORT_0)
    with TerminalBench(answer_after_s=0.2) as bench:
        bench.run(kernel, "--timeout", "60", files={"<": "/dev/null"})
        assert bench.status() == 0
        assert bench.typed_for_the_shell(after_s=0.5) == b""


def test_fault_3_a_guest_in_the_background_asks_nothing(tmp_path: Path) -> None:
    """The shell reads the terminal then, at once."""
    text = b"\x1b[6n\x1b[?1003h\x05\xc2\x9b6n\x9b6n\x1b[0;1mbold \xc3\xa9\n"
    kernel = write_guest(tmp_path / "guest", prints(text), echoes())
    with TerminalBench() as bench:
        bench.run(kernel, "--timeout", "60", background=True)
        bench.wait_for("bold \u00e9".encode())
        assert b"\x1b" not in bench.shown()
        assert bench.typed_for_the_shell(after_s=0.5) == b""
        bench.fg()
        time.sleep(1)
        bench.type(b"\x1b[0m")
        bench.wait_for(b"\x1b[0m")
        bench.type(b"\x01x")
        assert bench.status() == 0


@pytest.mark.parametrize("mode", [b"1000", b"1003;1006", b"1004"])
def test_fault_3_a_mouse_is_not_reported_to_the_shell(tmp_path: Path, mode: bytes) -> None:
    kernel = write_guest(tmp_path / "guest", prints(b"\x1b[?" + mode + b"hon"), REPORT_0)
    with TerminalBench() as bench:
        bench.run(kernel, "--timeout", "60")
        assert bench.status() == 0
        assert b"\x1b[?" + mode.partition(b";")[0] + b"l" in bench.shown().partition(b"hon")[2]


def test_fault_3_a_run_that_asks_nothing_ends_at_once(tmp_path: Path) -> None:
    """Colours, cursor moves and titles are no queries: they cost the end nothing."""
    text = b"\x1b[0;1;31mred\x1b[0m\x1b[2J\x1b[10;5H\x1b]0;title\x07\x1b[?25l\x1b(B"
    quiet = write_guest(tmp_path / "quiet", prints(text + b"end"), REPORT_0)
    asks = write_guest(tmp_path / "asks", prints(text + b"\x1b[6nend"), REPORT_0)
    took_s = {}
    for kernel in (quiet, asks):
        with TerminalBench(answer_after_s=None) as bench:
            bench.run(kernel, "--timeout", "60")
            bench.wait_for(b"end")
            shown_s = time.monotonic()
            assert bench.status() == 0
            took_s[kernel] = time.monotonic() - shown_s
    assert took_s[asks] > 0.9  # what an answer may take
    assert took_s[quiet] < took_s[asks]


@pytest.mark.parametrize(
    "how", ["| cat", "| tee log", "2>&1 | tee log", "< /dev/null | cat", "< /dev/null 2> log | cat",
            "--console fifo"])
def test_fault_3_a_pipe_may_end_on_the_terminal(tmp_path: Path, how: str) -> None:
    kernel = write_guest(tmp_path / "guest", prints(b"asks \x1b[6n"), REPORT_0)
    line = f"{shlex.join(command('--timeout', '60', kernel=kernel))} {how}"
    with TerminalBench(answer_after_s=0.2) as bench:
        script = f"cd {shlex.quote(str(tmp_path))}; mkfifo fifo; cat fifo & {line}"
        if "fifo" not in how:
            script = f"cd {shlex.quote(str(tmp_path))}; {line}"
        bench.start(["/bin/sh", "-c", script])
        assert bench.status() == 0
        assert b"asks \x1b[6n" in bench.shown()
        assert bench.typed_for_the_shell(after_s=0.6) == b""
        assert bench.has_its_modes_back()


def test_fault_3_a_mouse_behind_a_pipe_is_not_reported_to_the_shell(tmp_path: Path) -> None:
    kernel = write_guest(tmp_path / "guest", prints(b"\x1b[?1003hon"), REPORT_0)
    line = f"{shlex.join(command('--timeout', '60', kernel=kernel))} | cat > {tmp_path}/log"
    with TerminalBench() as bench:
        bench.start(["/bin/sh", "-c", line + f"; cat {tmp_path}/log"])
        assert bench.status() == 0
    log = (tmp_path / "log").read_bytes()
    assert log == b"\x1b[?1003hon"  # what we say to the terminal is not for the pipe
    with TerminalBench() as bench:
        bench.start(["/bin/sh", "-c", line.partition(">")[0]])
        assert bench.status() == 0
        assert b"\x1b[?1003l" in bench.shown().partition(b"hon")[2]


def test_fault_3_a_stopped_run_leaves_no_answer(tmp_path: Path) -> None:
    kernel = write_guest(tmp_path / "guest", prints(b"asks \x1b[6n"), echoes())
    with TerminalBench(answer_after_s=0.4) as bench:
        bench.run(kernel, "--timeout", "60")
        bench.wait_for(b"asks \x1b[6n")
        bench.kill(signal.SIGTSTP)
        bench.wait_until_stopped()
        assert bench.typed_for_the_shell(after_s=0.8) == b""
        assert bench.has_its_modes_back()


def test_fault_3_a_mouse_is_the_guests_only_while_it_has_the_terminal(tmp_path: Path) -> None:
    kernel = write_guest(tmp_path / "guest", prints(b"\x1b[?1003;1004hon"), echoes())
    with TerminalBench() as bench:
        bench.run(kernel, "--timeout", "60")
        bench.wait_for(b"hon")
        for _ in range(2):
            bench.kill(signal.SIGTSTP)
            bench.wait_for(b"\x1b[?1003l\x1b[?1004l")
            bench.wait_until_stopped()
            shown = len(bench.shown())
            bench.bg()
            assert bench.runs(for_s=0.5)
            assert b"h" not in bench.shown()[shown:]
            bench.fg()
            bench.wait_for(b"\x1b[?1003h\x1b[?1004h")
        bench.type(b"\x01x")
        assert bench.status() == 0
        assert bench.shown().rindex(b"\x1b[?1003l") > bench.shown().rindex(b"\x1b[?1003h")


def test_fault_3_a_stop_that_is_taken_back_while_it_waits_for_answers(tmp_path: Path) -> None:
    """The kernel too forgets a stop that is not delivered yet."""
    kernel = write_guest(tmp_path / "guest", prints(b"\x1b[?1003h\x1b[6n"), echoes())
    with TerminalBench() as bench:
        bench.run(kernel, "--timeout", "60")
        bench.wait_for(b"\x1b[6n")
        bench.kill(signal.SIGTSTP)
        bench.wait_for(b"\x1b[?1003l")
        bench.kill(signal.SIGCONT)
        assert bench.runs(for_s=2)
        bench.wait_for(b"\x1b[?1003h")
        bench.type(b"keys")
        bench.wait_for(b"keys")
        bench.type(b"\x01x")
        assert bench.status() == 0


def test_fault_3_a_query_that_the_terminal_has_not_read_is_taken_back(tmp_path: Path) -> None:
    """But for the 4095 bytes that a pseudo terminal's other side has already."""
    code = prints(b"begins"), waits(1 << 20), prints(b"." * 6000 + b"\x1b[6n"), REPORT_0
    kernel = write_guest(tmp_path / "guest", *code)
    with TerminalBench() as bench:
        bench.run(kernel, "--timeout", "60")
        bench.wait_for(b"begins")
        bench.stop_reading()
        assert bench.status() == 0
        bench.go_on_reading()
        assert bench.typed_for_the_shell(after_s=0.6) == b""
        assert b"." * 3000 in bench.shown()
        assert b"\x1b[6n" not in bench.shown()
