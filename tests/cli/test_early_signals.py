"""Signals while a command starts and ends: a notice kills nobody, and SIGINT needs no traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.guest import environment
from tests.support.patience import patient
from tests.support.tiny_guests import REPORT_7, SPIN, prints, waits, write_guest

NOTICES = (signal.SIGUSR1, signal.SIGWINCH)
PROGRAM = (
    "import sys; from pyvmm.__main__ import main; sys.stdout.write('+'); sys.stdout.flush(); "
    "sys.exit(main())"
)
"""As the script does that pip makes, but for a sign of life once Python has started."""
COMMANDS = {
    "run": ["run", "--kernel", "guest", "--disk", "disk", "--console", "none", "--timeout", "60"],
    "doctor": ["doctor", "--device", "/nowhere"],
    "inspect": ["kernel", "inspect", "guest"],
    "refused": ["run", "--kernel", "/nowhere"],
    "argparse": ["run"],
    "help": ["--help"],
    "lab": ["lab", "--memory", "1K", "--", "true"],
}


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """A command whose Python has started, and nothing more."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], cwd=folder,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**environment(), "PYVMM_CACHE": str(folder / "cache")},
    )
    assert process.stdout is not None
    assert process.stdout.read(1) == b"+"
    return process


def ready(folder: Path) -> None:
    write_guest(folder / "guest", prints(b"x"), REPORT_7)
    (folder / "disk").write_bytes(bytes(4096))


def send_all_along(process: subprocess.Popen[bytes], *numbers: int) -> tuple[int, bytes]:
    """Send them from now to the end, every millisecond; status and errors."""
    while process.poll() is None:
        for number in numbers:
            process.send_signal(number)
        time.sleep(0.001)
    _, errors = process.communicate()
    return process.returncode, errors


@pytest.mark.bare
@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_fault_24_notices_from_start_to_end_change_nothing(
    tmp_path: Path, arguments: list[str]
) -> None:
    ready(tmp_path)
    expected = start(tmp_path, *arguments)
    _, errors = expected.communicate(timeout=patient(60))
    for _ in range(3):
        seen = send_all_along(start(tmp_path, *arguments), *NOTICES)
        assert seen == (expected.returncode, errors)


@pytest.mark.bare
@pytest.mark.parametrize("late_ms", [0, 10, 25, 50, 80, 120, 250])
@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_fault_24_an_interrupt_is_130_without_a_traceback(
    tmp_path: Path, arguments: list[str], late_ms: int
) -> None:
    ready(tmp_path)
    process = start(tmp_path, *arguments)
    time.sleep(late_ms / 1000)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=patient(60))
    assert b"Traceback" not in errors
    assert b"KeyboardInterrupt" not in errors
    # Or it had ended before; -2 when Python itself was ending.
    assert process.returncode in (130, -2, 0, 1, 7, 125)


@pytest.mark.parametrize("serves", [False, True])
def test_fault_24_an_interrupted_export_ends_as_its_help_says(
    tmp_path: Path, serves: bool
) -> None:
    ready(tmp_path)
    process = start(tmp_path, "export", "--disk", "disk", "--socket", "s")
    if serves:
        assert process.stderr is not None
        assert b"is served at" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=patient(60))
    assert (process.returncode, errors) == ((0 if serves else 130), b"")
    said = start(tmp_path, "export", "--help").communicate()[0].decode()
    assert "end it, with status 0 once it serves; before, 128+n" in said


@pytest.mark.bare
def test_fault_24_an_export_takes_a_notice_that_came_too_early(tmp_path: Path) -> None:
    ready(tmp_path)
    process = start(tmp_path, "export", "--disk", "disk", "--socket", "s")
    for _ in range(50):
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.005)
    until(lambda: (tmp_path / "s").exists())
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=patient(60))
    assert (process.returncode, errors.count(b"\n")) == (0, 1)


@pytest.mark.bare
def test_fault_24_a_run_ends_by_a_signal_after_all_those_notices(tmp_path: Path) -> None:
    write_guest(tmp_path / "guest", prints(b"x"), waits(1000), SPIN)
    process = start(tmp_path, "run", "--kernel", "guest", "--timeout", "60")
    assert process.stdout is not None
    for _ in range(20):
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.005)
    assert process.stdout.read(1) == b"x"
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=patient(60))
    assert process.returncode == 130
    assert errors.endswith(b"stopped by a signal (2): SIGINT\n")


def test_fault_24_who_has_sigint_ignored_keeps_it_so(tmp_path: Path) -> None:
    """nohup, or a script's background job."""
    ready(tmp_path)
    code = f"import signal; signal.signal(2, signal.SIG_IGN); {PROGRAM}"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "doctor", "--device", "/nowhere"], cwd=tmp_path,
        stdout=subprocess.PIPE, env=environment(),
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.read(1) == b"+"
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            time.sleep(0.001)
    assert process.returncode == 1


def until(holds: Callable[[], bool]) -> None:
    until_s = time.monotonic() + patient(60)
    while not holds():
        assert time.monotonic() < until_s
        time.sleep(0.01)
