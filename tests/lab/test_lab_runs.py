"""Real labs: the promises of ``pyvmm lab``, each kept by a QEMU that boots Linux."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.cpu_needs import contradictions
from tests.support.patience import patient
from tests.support.terminal_bench import TerminalBench

pytestmark = pytest.mark.lab

LAB = (sys.executable, "-m", "pyvmm", "lab")
ROOT = Path(__file__).parents[2]

AWAIT_INTERRUPT = """
from tests.support.patience import patient
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
print("up", flush=True)
signal.sigwait({signal.SIGINT})
raise SystemExit(5)
"""
"""Ends with 5 on SIGINT; sleep() would not do: an interrupt just before it does not end it."""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with an awkward name, made the working directory and importing our pyvmm."""
    directory = tmp_path / "a, b 'c'"
    (directory / ".git").mkdir(parents=True)
    monkeypatch.chdir(directory)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return directory


def lab(*argv: str, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
    done = subprocess.run([*LAB, *argv], input=stdin, capture_output=True, timeout=patient(200))
    return done.returncode, done.stdout, done.stderr


def test_a_command_runs_as_if_it_were_here(checkout: Path, tmp_path: Path) -> None:
    """Status, separate streams, input to its end, words, directory, files kept and dropped."""
    outside = tmp_path / "outside"
    script = f"""
        cat; pwd; echo "$1" >&2; test "$PYVMM_LAB" = 1
        cat /sys/module/kvm_amd/parameters/npt; test -c /dev/kvm || exit 1
        echo kept >file; echo dropped >'{outside}'; cat '{outside}'; exit 7
    """
    status, out, err = lab("--", "sh", "-c", script, "sh", "a  'b'", stdin=b"typed\n\xff\n")
    assert err == b"a  'b'\n"
    assert out.splitlines() == [
        b"typed", b"\xff", os.fsencode(checkout), b"Y", b"dropped"
    ]  # fmt: skip
    assert status == 7
    assert (checkout / "file").read_text() == "kept\n"
    assert not outside.exists()


def test_fault_29_its_cpu_does_not_contradict_itself(checkout: Path) -> None:
    status, out, err = lab("--", "grep", "-m1", "^flags", "/proc/cpuinfo")
    assert (status, err) == (0, b"")
    flags = out.decode("ascii").partition(": ")[2].split()
    assert {"svm", "sse2", "aes"} <= set(flags)
    assert "xsave" not in flags, "it would change state that the host's KVM does not know of"
    assert contradictions(flags) == []


def test_large_streams_arrive_whole_both_ways(checkout: Path) -> None:
    data = os.urandom(3_000_000)
    assert lab("--", "cat", stdin=data) == (0, data, b"")


def test_timeout_is_124_and_keeps_what_was_said(checkout: Path) -> None:
    status, out, err = lab("--timeout", "1", "--", "sh", "-c", "echo said; exec sleep 1000")
    assert (status, out, err) == (124, b"said\n", b"pyvmm: lab: timeout after 1 s\n")


def test_interrupt_reaches_the_command(checkout: Path) -> None:
    with subprocess.Popen(
        [*LAB, "--", "python3", "-c", AWAIT_INTERRUPT],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(patient(60)) == 5


def test_a_terminal_is_a_terminal_there_too(checkout: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:  # pragma: no cover - the child
        command = 'tty; exec python3 -c "$1"'
        os.execv(LAB[0], [*LAB, "--", "sh", "-c", command, "sh", AWAIT_INTERRUPT])
    seen = b""
    while b"up\r\n" not in seen:
        seen += os.read(terminal, 4096)
    os.write(terminal, b"\x03")
    while True:
        try:
            data = os.read(terminal, 4096)
        except OSError:  # EIO: the other side has closed
            break
        seen += data
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
    assert b"/dev/hvc0\r\n" in seen
    assert seen.endswith(b"up\r\n^C")


def test_a_machine_that_cannot_start_is_125_and_says_why(checkout: Path) -> None:
    status, out, err = lab("--memory", "1024G", "--", "true")
    assert (status, out) == (125, b"")
    lines = err.decode().splitlines()
    assert lines[-1] == "pyvmm: lab: its machine ended without a status"
    assert "lab: | qemu-system-x86_64: " in lines[-2]


@pytest.mark.parametrize("late_s", [0.0, 0.2])
def test_fault_3_an_answer_to_cmd_is_not_left_to_the_shell(checkout: Path, late_s: float) -> None:
    with TerminalBench(answer_after_s=late_s) as bench:
        bench.start([*LAB, "--", "printf", r"\033[6n\033[c"])
        assert bench.status(120) == 0
        assert b"\x1b[6n" in bench.shown()
        assert bench.typed_for_the_shell(after_s=late_s + 0.3) == b""
        assert bench.has_its_modes_back()


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGTSTP])
def test_fault_31_the_lab_is_stopped_and_in_front_again(checkout: Path, number: int) -> None:
    with TerminalBench() as bench:
        bench.start([*LAB, "--", "sh", "-c", "echo listens; read line; echo got $line"])
        bench.wait_for(b"listens\r\n", 120)
        bench.kill(number)
        bench.wait_until_stopped()
        assert bench.has_its_modes_back()
        bench.bg()
        bench.type(b"ls\n")
        assert bench.typed_for_the_shell(after_s=1) == b"ls\n"
        bench.fg()
        time.sleep(2)
        bench.type(b"words\r")
        bench.wait_for(b"got words\r\n")
        assert bench.status(60) == 0
        assert bench.has_its_modes_back()


def test_fault_2_the_labs_own_console_is_shown_as_text(checkout: Path) -> None:
    """With -v, on standard error: whoever writes there is quoted, not obeyed."""
    command = [*LAB, "-v", "--", "sh", "-c", r"printf '\033[2J\033]0;x\007mark\n' >/dev/ttyS0"]
    done = subprocess.run(command, capture_output=True, check=False, timeout=patient(180))
    assert rb"\x1b[2J\x1b]0;x\x07mark" in done.stderr, done.stderr[-2000:]
    assert b"\x1b" not in done.stderr
