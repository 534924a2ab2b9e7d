"""Readers and writers of the console that are slow, late or gone, around ``pyvmm run``."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.guest import command, environment
from tests.support.patience import patient
from tests.support.terminal_bench import TerminalBench, wait_until
from tests.support.tiny_guests import (
    REPORT_0,
    SPIN,
    echoes,
    prints,
    prints_for_ever,
    waits,
    write_guest,
)

pytestmark = pytest.mark.bare

F_SETPIPE_SZ = 1031  # linux/fcntl.h
MUCH_LATER_S = 60
TEXT = b"0123456789abcdef" * 40 + b"\n"


@pytest.fixture
def flood(tmp_path: Path) -> Path:
    """A guest that prints for ever."""
    return write_guest(tmp_path / "flood", prints(b"flood"), prints_for_ever(TEXT))


def at_once_in_one_of_three(attempt: Callable[[], float]) -> bool:
    """Whether ``attempt`` takes less than the 2 s that were once waited, on a busy machine too."""
    return any(attempt() < 1.5 for _ in range(3))


def with_small_pipe(kernel: Path, timeout: str) -> subprocess.Popen[bytes]:
    """A run whose standard output is a pipe of a page: full in a moment."""
    process = subprocess.Popen(
        command("--timeout", timeout, kernel=kernel), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment(),
    )
    assert process.stdout is not None
    fcntl.fcntl(process.stdout.fileno(), F_SETPIPE_SZ, 4096)
    return process


# 32: nobody reads


def test_fault_32_ctrl_a_x_does_not_wait_for_a_terminal_that_takes_nothing(flood: Path) -> None:
    def attempt() -> float:
        with TerminalBench() as bench:
            bench.run(flood, "--timeout", str(MUCH_LATER_S))
            bench.wait_for(b"flood")
            bench.stop_reading()
            time.sleep(2)  # pty, buffer and all are full
            started_s = time.monotonic()
            bench.type(b"\x01x")
            assert bench.status() == 0
            took_s = time.monotonic() - started_s
            bench.go_on_reading()
            assert bench.has_its_modes_back()
            return took_s

    assert at_once_in_one_of_three(attempt)


@pytest.mark.parametrize("ending", ["timeout", "SIGTERM"])
def test_fault_32_an_end_from_outside_does_not_wait_for_a_pipe_that_nobody_reads(
    flood: Path, ending: str
) -> None:
    def attempt() -> float:
        """How long it took from the end that was asked for."""
        process = with_small_pipe(flood, "3" if ending == "timeout" else str(MUCH_LATER_S))
        assert process.stdout is not None
        with process.stdout:
            os.read(process.stdout.fileno(), 5)
            ends_s = time.monotonic() + patient(3)
            if ending == "SIGTERM":
                time.sleep(2)
                ends_s = time.monotonic()
                process.send_signal(signal.SIGTERM)
            assert process.wait(patient(MUCH_LATER_S)) == (124 if ending == "timeout" else 143)
        return time.monotonic() - ends_s

    assert at_once_in_one_of_three(attempt)


def test_fault_32_a_reader_that_is_slow_gets_all_of_an_end_in_order(tmp_path: Path) -> None:
    kernel = write_guest(tmp_path / "guest", prints(TEXT * 150), prints(b"the last"), REPORT_0)
    process = subprocess.Popen(
        command("--timeout", str(MUCH_LATER_S), kernel=kernel), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment(),
    )
    assert process.stdout is not None
    with process.stdout:
        heard = process.stdout.read(5)
        time.sleep(1)
        heard += process.stdout.read()
    assert process.wait(patient(MUCH_LATER_S)) == 0
    assert heard == TEXT * 150 + b"the last"


# 35: more is typed than is read


def test_fault_35_a_pipe_loses_nothing_to_a_guest_that_reads_slowly(tmp_path: Path) -> None:
    kernel = write_guest(tmp_path / "guest", echoes(slowness=50))
    typed = b"".join(b"%06d\n" % number for number in range(1_000)) + b"." * 100_000
    process = subprocess.Popen(
        command("--timeout", str(MUCH_LATER_S), kernel=kernel), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment(),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    os.set_blocking(process.stdin.fileno(), False)
    with process.stdin, process.stdout:
        sent = 0
        heard = b""
        while len(heard) < 7_000:
            with contextlib.suppress(BlockingIOError):
                sent += os.write(process.stdin.fileno(), typed[sent : sent + 4096])
            heard += os.read(process.stdout.fileno(), 4096)
        process.send_signal(signal.SIGTERM)
        process.wait(patient(MUCH_LATER_S))
    assert heard[:7_000] == typed[:7_000]


def test_fault_35_a_pipe_is_not_read_further_than_a_guest_reads(tmp_path: Path) -> None:
    """``yes | pyvmm run``: what waits stays in the pipe."""
    kernel = write_guest(tmp_path / "guest", prints(b"runs"), SPIN)
    process = subprocess.Popen(
        command("--timeout", "4", kernel=kernel), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    size = fcntl.fcntl(process.stdin.fileno(), F_SETPIPE_SZ, 1 << 20)
    os.set_blocking(process.stdin.fileno(), False)
    process.stdout.read(4)
    sent, until_s = 0, time.monotonic() + patient(1)
    while time.monotonic() < until_s:
        with contextlib.suppress(BlockingIOError):
            sent += os.write(process.stdin.fileno(), b"y\n" * 2048)
    assert sent <= size + (64 << 10)
    assert process.stderr is not None
    with process.stdin, process.stdout, process.stderr:
        assert b"dropped" not in process.stderr.read()
    assert process.wait(patient(MUCH_LATER_S)) == 124


def test_fault_35_keys_that_are_too_many_are_dropped_with_a_word(tmp_path: Path) -> None:
    """And Ctrl-A x works behind them all."""
    kernel = write_guest(tmp_path / "guest", prints(b"runs"), SPIN)
    with TerminalBench() as bench:
        bench.run(kernel, "--timeout", str(MUCH_LATER_S))
        bench.wait_for(b"runs")
        for _ in range(3):
            bench.type(b"x" * (700 << 10))
        bench.wait_for(b"typed input is dropped")
        bench.type(b"\x01x")
        assert bench.status() == 0
        assert bench.shown().count(b"typed input is dropped") == 1
        assert b"1048576 bytes" in bench.shown()


# 23: where the console goes


def wait_for_text(path: Path, text: str) -> None:
    wait_until(lambda: text in path.read_text(), what=f"no {text!r} in {path.read_text()!r}")


def test_fault_23_a_fifo_may_find_its_reader_later(tmp_path: Path) -> None:
    fifo, errors = tmp_path / "fifo", tmp_path / "errors"
    os.mkfifo(fifo)
    kernel = write_guest(tmp_path / "guest", prints(b"first words\n" + TEXT * 200), REPORT_0)
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            command("--timeout", str(MUCH_LATER_S), "--console", str(fifo), kernel=kernel),
            stdin=subprocess.DEVNULL, stderr=stderr, env=environment(),
        )
    wait_for_text(errors, f"--console {fifo}: nobody reads this FIFO yet")
    time.sleep(0.5)
    assert process.poll() is None  # the guest waits: its output is more than there is room for
    assert fifo.read_bytes() == b"first words\n" + TEXT * 200
    assert process.wait(patient(MUCH_LATER_S)) == 0


@pytest.mark.parametrize("ending", ["timeout", "SIGINT"])
def test_fault_23_a_fifo_without_a_reader_ends_as_every_run(
    tmp_path: Path, flood: Path, ending: str
) -> None:
    fifo, errors = tmp_path / "fifo", tmp_path / "errors"
    os.mkfifo(fifo)
    timeout = "1" if ending == "timeout" else str(MUCH_LATER_S)
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            command("--timeout", timeout, "--console", str(fifo), kernel=flood),
            stdin=subprocess.DEVNULL, stderr=stderr, env=environment(),
        )
    wait_for_text(errors, "nobody reads this FIFO yet")
    if ending == "SIGINT":
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
    assert process.wait(patient(20)) == (124 if ending == "timeout" else 130)
    assert "nobody has read this FIFO" in errors.read_text()
    assert "Traceback" not in errors.read_text()


def test_fault_23_a_fifo_with_a_reader_needs_no_word(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    kernel = write_guest(tmp_path / "guest", prints(b"words"), REPORT_0)
    with subprocess.Popen(["cat", str(fifo)], stdout=subprocess.PIPE) as reader:
        time.sleep(0.2)
        done = subprocess.run(
            command("--timeout", "60", "--console", str(fifo), kernel=kernel),
            stdin=subprocess.DEVNULL, capture_output=True, env=environment(), check=False,
        )
        assert reader.stdout is not None
        assert reader.stdout.read() == b"words"
    assert (done.returncode, b"FIFO" in done.stderr) == (0, False)


def test_fault_23_a_fifo_whose_reader_leaves_ends_the_run_as_a_pipe_does(
    tmp_path: Path, flood: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen(["head", "-c", "100", str(fifo)], stdout=subprocess.DEVNULL):
        done = subprocess.run(
            command("--timeout", "60", "--console", str(fifo), kernel=flood),
            stdin=subprocess.DEVNULL, capture_output=True, env=environment(), check=False,
            timeout=patient(MUCH_LATER_S),
        )
    assert done.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("sign", [">>", ">"])
@pytest.mark.parametrize(
    "name", ["/dev/stdout", "/proc/self/fd/1", "/dev/fd/1", "/dev/stderr", "/dev/fd/3", "its own"]
)
def test_fault_23_a_console_that_is_our_own_output_goes_on_there(
    tmp_path: Path, name: str, sign: str
) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"before\n")
    kernel = write_guest(tmp_path / "guest", prints(b"words\n"), REPORT_0)
    number = {"/dev/stderr": 2, "/dev/fd/3": 3}.get(name, 1)
    where = str(log) if name == "its own" else name
    words = " ".join(command("--timeout", "60", "--console", where, kernel=kernel))
    script = f"{{ echo started >&{number}; {words}; echo ended >&{number}; }} {number}{sign}{log}"
    subprocess.run(
        ["bash", "-c", script], env=environment(), check=True, capture_output=True,
    )
    lines = [line for line in log.read_text().splitlines() if not line.startswith("pyvmm: ")]
    assert lines == ["before"] * (sign == ">>") + ["started", "words", "ended"]


def test_fault_23_a_console_of_a_file_is_emptied_all_the_same(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"before\n" * 100)
    kernel = write_guest(tmp_path / "guest", waits(10), prints(b"words\n"), REPORT_0)
    done = subprocess.run(
        command("--timeout", "60", "--console", str(log), kernel=kernel),
        stdin=subprocess.DEVNULL, capture_output=True, env=environment(), check=False,
    )
    assert (done.returncode, log.read_bytes()) == (0, b"words\n")
