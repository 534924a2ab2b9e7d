"""Commands in the guest: here the agent's program on this host, behind a real control server."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pyvmm
from pyvmm import Completed
from pyvmm.launcher import command as command_module
from tests.support.patience import patient

BOTH = "head -c {0} /dev/zero; head -c {0} /dev/zero >&2"


def test_status_and_output_apart(vm: pyvmm.Vm) -> None:
    done = vm.run(["sh", "-c", "echo out; echo err >&2; exit 7"])
    assert done == Completed(
        argv=("sh", "-c", "echo out; echo err >&2; exit 7"), status=7, stdout_bytes=b"out\n",
        stderr_bytes=b"err\n",
    )
    assert (done.stdout, done.stderr) == ("out\n", "err\n")
    assert (done.signal, done.timed_out) == (None, False)
    assert not done.is_success
    with pytest.raises(pyvmm.CommandError, match="ended with status 7: err") as error:
        done.check()
    assert error.value.completed is done
    assert vm.run(["true"], check=True).is_success
    with pytest.raises(pyvmm.CommandError, match="status 1"):
        vm.run(["false"], check=True)


def test_arguments_environment_directory_and_input(vm: pyvmm.Vm, tmp_path: Path) -> None:
    done = vm.run(["printf", "%s|", "a  b", b"\xff", Path("/x"), ""])
    assert done.stdout_bytes == b"a  b|\xff|/x||"
    assert done.argv == ("printf", "%s|", "a  b", "\udcff", "/x", "")
    done = vm.run(["sh", "-c", 'pwd; echo "$NAME"'], env={"NAME": "a value"}, cwd=str(tmp_path))
    assert done.stdout == f"{tmp_path}\na value\n"
    assert vm.run(["cat"], input="typed").stdout == "typed"
    assert vm.run(["cat"], input=b"").stdout == ""
    assert vm.run(["cat"]).stdout == ""  # the end of the file at once
    data = os.urandom(5 << 20)
    assert vm.run(["cat"], input=data, timeout_s=patient(60)).stdout_bytes == data
    # An input that nobody reads is no error.
    assert vm.run(["true"], input=data).is_success


def test_input_goes_on_after_a_wait_that_was_too_short(vm: pyvmm.Vm) -> None:
    with vm.begin(["sh", "-c", "read _; wc -c"], input=b"\n" + bytes(8 << 20)) as command:
        for _ in range(2):
            command.kill(signal.SIGSTOP)
            with pytest.raises(TimeoutError):
                command.wait(timeout_s=0.2)
        command.kill(signal.SIGCONT)
        assert command.wait(patient(60)).stdout == f"{8 << 20}\n"


def test_output_that_is_no_utf_8(vm: pyvmm.Vm) -> None:
    done = vm.run(["printf", r"\377a\200"])
    assert done.stdout_bytes == b"\xffa\x80"
    assert done.stdout == "\ufffda\ufffd"
    assert "\\x1b" in vm.run(["sh", "-c", r"printf '\033[31m' >&2; exit 1"]).failure


def test_both_streams_may_be_large(vm: pyvmm.Vm) -> None:
    done = vm.run(["sh", "-c", BOTH.format(8 << 20)], timeout_s=patient(60))
    assert len(done.stdout_bytes) == len(done.stderr_bytes) == 8 << 20


def test_output_into_files(vm: pyvmm.Vm, tmp_path: Path) -> None:
    err = io.BytesIO()
    with (tmp_path / "out").open("wb") as out:
        done = vm.run(
            ["sh", "-c", BOTH.format(3 << 20)], stdout=out, stderr=err, timeout_s=patient(60)
        )
    assert done.stdout_bytes == done.stderr_bytes == b""
    assert (tmp_path / "out").stat().st_size == len(err.getvalue()) == 3 << 20


def test_a_file_that_takes_no_more_ends_the_command(vm: pyvmm.Vm) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full, pytest.raises(OSError, match="space"):
        vm.run(["yes"], stdout=full)
    assert vm.run(["true"]).is_success


def test_more_than_is_kept_is_an_error(
    vm: pyvmm.Vm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_module, "MAX_OUTPUT_BYTES", 1 << 20)
    assert len(vm.run(["head", "-c", str(1 << 20), "/dev/zero"]).stdout) == 1 << 20
    with pytest.raises(pyvmm.OutputLimitError, match="1 MiB"):
        vm.run(["yes", "until more is printed than is kept"], timeout_s=600)
    deadline = time.monotonic() + patient(20)
    while vm.run(["pgrep", "-fx", "yes until more is printed than is kept"]).is_success:
        assert time.monotonic() < deadline


def test_a_time_limit(vm: pyvmm.Vm) -> None:
    done = vm.run(["sh", "-c", "echo first; sleep 600"], timeout_s=0.3)
    assert (done.status, done.signal, done.timed_out) == (None, 9, True)
    assert done.stdout == "first\n"
    with pytest.raises(pyvmm.CommandError, match="time limit"):
        done.check()
    for wrong in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="timeout_s"):
            vm.run(["true"], timeout_s=wrong)


def test_a_program_that_is_not_there(vm: pyvmm.Vm, tmp_path: Path) -> None:
    with pytest.raises(pyvmm.AgentError, match="no-such-program") as error:
        vm.run(["no-such-program"])
    assert error.value.errno == 2
    (tmp_path / "plain").write_text("x")
    with pytest.raises(pyvmm.AgentError) as error:
        vm.run([str(tmp_path / "plain")])
    assert error.value.errno == 13
    with pytest.raises(pyvmm.AgentError, match="nowhere"):
        vm.run(["true"], cwd="/nowhere")


@pytest.mark.parametrize(("argv", "words"), [
    ("echo hello", r'\["sh", "-c", text\]'), (b"true", "list"), ([], "at least a program"),
    ([7], "must be str or bytes"), (None, "list"),
])
def test_a_command_is_a_list(vm: pyvmm.Vm, argv: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        vm.run(argv)


def test_wrong_inputs_and_environments(vm: pyvmm.Vm) -> None:
    cases: list[dict[str, Any]] = [
        {"input": 7}, {"env": {"A": 1}}, {"env": {"A=B": "x"}}, {"env": {"": "x"}},
    ]
    for given in cases:
        with pytest.raises((TypeError, ValueError), match=r"input|env"):
            vm.run(["true"], **given)
    with pytest.raises(ValueError, match="NUL"):
        vm.run(["a\0b"])
    with pytest.raises(pyvmm.PyvmmError, match="bytes"):
        vm.run(["echo", "x" * 100_000])
    assert vm.run(["true"]).is_success


def test_streams_while_it_runs(vm: pyvmm.Vm) -> None:
    with vm.begin(["cat"]) as command:
        for word in (b"one\n", "two\n"):
            command.write(word)
            assert command.stdout.readline() == (word if isinstance(word, bytes) else word.encode())
        assert [command.is_running] == [True]
        with pytest.raises(TimeoutError):
            command.wait(timeout_s=0.05)
        command.write(b"three\n")
        deadline = time.monotonic() + patient(20)
        while not command._out.data:  # the first of two waits takes it
            assert time.monotonic() < deadline
            with contextlib.suppress(TimeoutError):
                command.wait(timeout_s=0.05)
        command.close_input()
        done = command.wait(patient(20))
        assert done.stdout == "three\n"  # what was not read before
        assert command.wait() is done
        assert [command.is_running] == [False]
        with pytest.raises(RuntimeError, match="no input"):
            command.write(b"x")


def test_a_stream_is_read_on_after_a_wait_that_took_too_long(vm: pyvmm.Vm) -> None:
    with vm.begin(["sh", "-c", "read line; sleep 0.3; echo done"]) as command:
        with pytest.raises(TimeoutError):
            command.wait(timeout_s=0.05)
        command.write(b"go\n")
        assert command.stdout.readline() == b"done\n"  # it waits


def test_writing_to_a_command_that_reads_no_more(vm: pyvmm.Vm) -> None:
    """Its bytes are dropped, as by a shell's pipe into a command that ignores SIGPIPE."""
    with vm.begin(["sh", "-c", "exec <&-; echo closed; sleep 600"]) as command:
        assert command.stdout.readline() == b"closed\n"
        command.write(bytes(3 << 20))
        command.kill(signal.SIGTERM)
        deadline = time.monotonic() + patient(20)
        with pytest.raises(BrokenPipeError):  # noqa: PT012 - not by the first ones
            while time.monotonic() < deadline:
                command.write(b"x")
        assert command.wait(patient(20)).signal == signal.SIGTERM


def test_kill(vm: pyvmm.Vm) -> None:
    with vm.begin(["sh", "-c", "trap 'echo got it; exit 3' USR1; echo ready; while :; do "
                   "sleep 0.05; done"]) as command:
        assert command.stdout.readline() == b"ready\n"
        command.kill(signal.SIGUSR1)
        done = command.wait(patient(20))
        assert (done.status, done.stdout) == (3, "got it\n")
        command.kill()  # it has ended: nothing


def test_leaving_the_block_kills(vm: pyvmm.Vm) -> None:
    with vm.begin(["sleep", "4321"]):
        pass
    deadline = time.monotonic() + patient(20)
    while "4321" in vm.run(["sh", "-c", "ps -o args -C sleep"]).stdout:
        assert time.monotonic() < deadline


def test_a_command_that_leaves_a_daemon_ends(vm: pyvmm.Vm) -> None:
    """The daemon has the pipes open still."""
    began_s = time.monotonic()
    done = vm.run(["sh", "-c", "sleep 543.21 & echo started"])
    assert done.stdout == "started\n"
    assert time.monotonic() - began_s < patient(60)
    vm.run(["pkill", "-f", "sleep 543.21"])


def test_several_at_once(vm: pyvmm.Vm) -> None:
    found: dict[int, str] = {}

    def work(number: int) -> None:
        found[number] = vm.run(
            ["sh", "-c", f"sleep 0.2; echo {number}"], timeout_s=patient(60)
        ).stdout

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: f"{number}\n" for number in range(12)}


def test_more_than_the_agent_takes_is_an_error(vm: pyvmm.Vm) -> None:
    commands = [vm.begin(["cat"]) for _ in range(16)]
    with pytest.raises(pyvmm.AgentError, match="as many as it takes"):
        vm.run(["true"])
    for command in commands:
        command.close_input()
        assert command.wait(patient(20)).is_success
        command.close()


@pytest.mark.parametrize("end", ["fail", "finish", "kill", "agent"])
def test_whoever_waits_for_a_command_is_told(vm: pyvmm.Vm, end: str) -> None:
    """Of the end of the run, of its process, or of the agent alone."""
    errors: list[Exception] = []

    def wait(call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            errors.append(error)

    calls: list[Callable[[], object]] = [
        lambda: vm.run(["sleep", "600"], timeout_s=None),
        lambda: vm.run(["yes"], timeout_s=None, stdout=io.BytesIO()),
        lambda: vm.run(["cat"], input=bytes(1 << 20), timeout_s=None),
        lambda: vm.read("/dev/zero"),
    ]
    calls[2] = lambda: vm.run(["sleep", "600"], input=bytes(8 << 20), timeout_s=None)
    calls.pop(3)
    threads = [threading.Thread(target=wait, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    assert errors == []
    agent = int(vm.run(["sh", "-c", "ps -o ppid= -p $$"]).stdout)
    mine = pyvmm.PyvmmError("a bad line")
    match end:
        case "fail":
            vm.fail(mine)
        case "finish":
            vm.finish()
        case "kill":
            os.kill(vm.pid, signal.SIGKILL)
        case "agent":
            os.kill(agent, signal.SIGKILL)
    for thread in threads:
        thread.join(patient(30))
    kinds = {type(error) for error in errors}
    assert len(errors) == len(threads)
    if end == "fail":
        assert errors == [mine] * len(threads)
    else:
        assert kinds == {pyvmm.AgentError if end == "agent" else pyvmm.EndedError}
    with pytest.raises(pyvmm.PyvmmError):
        vm.run(["true"])


def test_close_ends_what_runs(vm: pyvmm.Vm) -> None:
    command = vm.begin(["sleep", "600"])
    vm.close()
    assert command.stdout.closed
    with contextlib.suppress(pyvmm.EndedError):
        assert command.wait().signal == signal.SIGKILL


def test_no_descriptor_for_a_command_is_a_clear_error(
    vm: pyvmm.Vm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_pipe() -> tuple[int, int]:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(command_module, "make_pipe", no_pipe)
    with pytest.raises(pyvmm.HostError, match="Too many open files"):
        vm.run(["true"])
