"""One boot test on a stand-in for the machine: each way it can end."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from pyvmm.api.config import MachineConfig
from pyvmm.errors import AgentError, ConfigError, PyvmmError
from pyvmm.launcher.completed import Completed
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.testing import boot_test
from pyvmm.testing.boot_result import BootResult
from pyvmm.testing.boot_test import BootTest, run_boot_test
from pyvmm.testing.fail_on import FAIL_ON
from tests.support.stand_in_vm import StandInVm

MACHINE = MachineConfig(kernel="bzImage")
STAMP = "[    1.000000] "


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boot_test, "EXPECT_GRACE_S", 0.1)


def run(vm: StandInVm, **options: Any) -> BootResult:
    options.setdefault("command", ["uname", "-r"])
    observers = {name: options.pop(name) for name in tuple(options) if name.startswith("on_")}
    result = run_boot_test(
        BootTest(machine=MACHINE, **options), launch=vm.launch, **observers
    )
    assert vm.is_closed
    assert pickle.loads(pickle.dumps(result)) == result
    assert json.loads(json.dumps(result.as_dict()))["pyvmm_boot_test"] == 1
    return result


def prints_and_ends(**how: Any) -> Any:
    def act(argv: tuple[str, ...], stdout: BinaryIO, stderr: BinaryIO) -> Completed:
        stdout.write(b"6.1.0\n")
        stderr.write(b"warn\xff\n")
        return Completed(argv=argv, **how)
    return act


def test_a_command_that_succeeds_passes_and_its_output_is_passed_on() -> None:
    out: list[bytes] = []
    err: list[bytes] = []
    console: list[bytes] = []
    phases: list[str] = []
    vm = StandInVm(
        boot=lambda vm: vm.says(STAMP + "Linux version 6.1", STAMP + "Run /init as init process"),
        act=prints_and_ends(status=0),
    )
    result = run(
        vm, on_stdout=out.append, on_stderr=err.append, on_console=console.append,
        on_phase=phases.append,
    )
    assert (result.verdict, result.exit_status, result.status) == ("passed", 0, 0)
    assert result.is_passed
    assert result.error is None
    assert (out, err) == ([b"6.1.0\n"], [b"warn\xff\n"])
    assert b"".join(console) == vm.console.data
    assert (result.stdout_tail, result.stderr_tail) == ("6.1.0\n", "warn\\xff\n")
    assert phases == ["start", "kernel", "user space", "agent", "command"]
    assert [phase.name for phase in result.phases] == phases
    assert all(p.end_s == n.begin_s for p, n in zip(result.phases, result.phases[1:], strict=False))
    assert vm.config.agent == "inject"


@pytest.mark.parametrize(("how", "status", "words"), [
    ({"status": 3}, 3, "uname -r: exit status 3"),
    ({"status": 119}, 119, "exit status 119"),
    ({"status": 255}, 119, "exit status 255; 119 stands for all above it"),
    ({"status": 120}, 119, "exit status 120; 119 stands"),
    ({"signal": 9}, 119, "killed by signal 9 (SIGKILL); exit status 119 stands for it"),
    ({"signal": 63}, 119, "killed by signal 63 ("),
])
def test_a_command_that_fails_has_its_own_status(
    how: dict[str, int], status: int, words: str
) -> None:
    result = run(StandInVm(act=prints_and_ends(**how)))
    assert (result.verdict, result.exit_status) == ("failed", status)
    assert words in result.message
    assert result.as_case().failure is not None


def test_a_command_over_its_time_is_a_verdict_of_its_own() -> None:
    result = run(StandInVm(act=prints_and_ends(signal=9, timed_out=True)), timeout_s=2.5)
    assert (result.verdict, result.exit_status) == ("command-timeout", 124)
    assert result.message == "uname -r: killed after 2.5 s (--timeout)"


@pytest.mark.parametrize(("line", "verdict", "status"), [
    ("Kernel panic - not syncing: x", "panic", 121),
    ("BUG: kernel NULL pointer dereference, address: 0", "oops", 121),
    ("WARNING: CPU: 0 PID: 1 at x", "warning", 121),
    ("watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [x:1]", "lockup", 121),
    ('VFS: Cannot open root device "vda" or unknown-block(0,0): error -6', "root", 121),
    ("my driver: broken", "fail-on", 121),
])
@pytest.mark.parametrize("while_booting", [True, False])
def test_a_bad_line_ends_the_test_with_the_lines_around_it(
    line: str, verdict: str, status: int, while_booting: bool
) -> None:
    def bad(vm: StandInVm) -> None:
        vm.says(*(f"{STAMP}line {n}" for n in range(60)), STAMP + line, STAMP + "Call Trace:")
        vm.says(STAMP + "---[ end trace 0 ]---")

    def act(argv: tuple[str, ...], stdout: BinaryIO, stderr: BinaryIO) -> Completed:
        bad(vm)
        return Completed(argv=argv, status=0)

    vm = StandInVm(boot=bad) if while_booting else StandInVm(act=act)
    result = run(vm, fail_on=FAIL_ON.also("my driver"))
    assert (result.verdict, result.exit_status) == (verdict, status)
    assert result.line == STAMP + line
    assert result.before == tuple(f"{STAMP}line {n}" for n in range(20, 60))
    assert result.trace[0] == STAMP + "Call Trace:"
    assert "line 59" in result.text()
    assert result.registers
    assert result.error is not None
    assert result.error.line == result.line  # type: ignore[attr-defined]


def test_a_bad_line_without_the_end_of_its_trace_still_counts() -> None:
    def act(argv: tuple[str, ...], stdout: BinaryIO, stderr: BinaryIO) -> Completed:
        vm.says(STAMP + "BUG: x")
        return Completed(argv=argv, status=0)

    vm = StandInVm(act=act)
    assert run(vm).verdict == "oops"


@pytest.mark.parametrize(("outcome", "verdict", "status"), [
    (Outcome(Kind.RESET), "ended", 120),
    (Outcome(Kind.POWER_OFF), "ended", 120),
    (Outcome(Kind.GUEST_STATUS, 0), "ended", 120),
    (Outcome(Kind.TRIPLE_FAULT, detail="rip 0"), "triple-fault", 122),
    (Outcome(Kind.INTERNAL_ERROR), "internal-error", 123),
    (Outcome(Kind.PANIC, detail="x"), "panic", 121),
    (Outcome(Kind.STOPPED), "interrupted", 130),
    (Outcome(Kind.HOST_ERROR), "host-error", 125),
])
def test_a_guest_that_ends_without_a_report_never_passes(
    outcome: Outcome, verdict: str, status: int
) -> None:
    def act(argv: tuple[str, ...], stdout: BinaryIO, stderr: BinaryIO) -> Completed:
        vm.ends(outcome)
        return Completed(argv=argv, status=0)

    for vm in (StandInVm(boot=lambda vm: vm.ends(outcome)), StandInVm(act=act)):
        result = run(vm)
        assert (result.verdict, result.exit_status) == (verdict, status)
        assert result.outcome == outcome


def test_lines_about_work_under_way_are_no_problems() -> None:
    assert run(StandInVm(reports=("unpacking it...", "the disk grew"))).problems == (
        "the disk grew",
    )


def test_no_agent_in_time_is_a_timeout_and_one_that_lies_is_lost() -> None:
    def slow(vm: StandInVm) -> None:
        time.sleep(0.15)
        raise AgentError("no agent came forward within 0.12 s: it has no driver")

    result = run(StandInVm(boot=slow), boot_timeout_s=0.1)
    assert (result.verdict, result.exit_status) == ("boot-timeout", 124)
    assert result.message == "no agent after 0.1 s: it has no driver"

    def lies(vm: StandInVm) -> None:
        raise AgentError("a frame of 4294967295 bytes")

    result = run(StandInVm(boot=lies))
    assert (result.verdict, result.exit_status) == ("agent-lost", 125)

    def stops(argv: tuple[str, ...], stdout: BinaryIO, stderr: BinaryIO) -> Completed:
        raise AgentError("the agent has not told its end")

    result = run(StandInVm(act=stops))
    assert (result.verdict, result.exit_status) == ("agent-lost", 125)


@pytest.mark.parametrize(("code", "status"), [(2, 127), (13, 126), (8, 126)])
def test_a_command_that_cannot_be_run_has_a_shells_status(code: int, status: int) -> None:
    def act(argv: tuple[str, ...], stdout: BinaryIO, stderr: BinaryIO) -> Completed:
        error = AgentError("command x: No such file")
        error.errno = code
        raise error

    result = run(StandInVm(act=act))
    assert (result.verdict, result.exit_status) == ("not-run", status)


def test_expectations_come_in_any_order_also_without_a_line_end() -> None:
    def boot(vm: StandInVm) -> None:
        vm.says("second", "first")
        vm.prints(b"login: ")

    result = run(StandInVm(boot=boot), expect=["first", "^second$", "login: $"])
    assert result.is_passed
    assert [one.line for one in result.expected] == ["first", "second", "login: "]


def test_an_expectation_that_is_not_met_fails_a_command_that_passed() -> None:
    result = run(StandInVm(boot=lambda vm: vm.says("first")), expect=["first", "third"])
    assert (result.verdict, result.exit_status, result.status) == ("expect", 124, 0)
    assert result.message == "the console did not show 'third' 0.1 s after the command"


def test_without_a_command_expectations_decide() -> None:
    vm = StandInVm(boot=lambda vm: vm.says("ready"), has_agent=False)
    result = run(vm, command=(), expect=["ready"], on_console=lambda data: None)
    assert result.is_passed
    assert vm.config.agent == "none"
    vm = StandInVm(has_agent=False)
    result = run(
        vm, command=(), expect=["ready"], boot_timeout_s=0.1, on_console=lambda data: None
    )
    assert (result.verdict, result.exit_status) == ("expect", 124)
    vm = StandInVm(boot=lambda vm: vm.ends(Outcome(Kind.RESET)), has_agent=False)
    result = run(vm, command=(), expect=["ready"], on_console=lambda data: None)
    assert (result.verdict, result.exit_status) == ("ended", 120)


def test_files_are_put_before_and_fetched_after_a_command_that_failed(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(b"content")

    def act(argv: tuple[str, ...], stdout: BinaryIO, stderr: BinaryIO) -> Completed:
        vm.files["/log"] = vm.files["/tmp/in"]
        return Completed(argv=argv, status=1)

    vm = StandInVm(act=act)
    result = run(vm, puts=[(str(source), "/tmp/in")], gets=[("/log", str(target))])
    assert result.exit_status == 1
    assert target.read_bytes() == b"content"


def test_a_file_that_cannot_be_copied_is_a_verdict_unless_the_command_failed() -> None:
    result = run(StandInVm(), gets=[("/none", "x")])
    assert (result.verdict, result.exit_status) == ("copy", 125)
    assert result.message == "get /none: /none: No such file or directory"
    result = run(StandInVm(act=prints_and_ends(status=4)), gets=[("/none", "x")])
    assert (result.verdict, result.exit_status) == ("failed", 4)
    assert result.problems == ("get /none: /none: No such file or directory",)
    result = run(StandInVm(), puts=[("/no/such/file", "/tmp/x")])
    assert (result.verdict, result.exit_status) == ("copy", 125)


LOG = (
    b"6,1,1000000,-;Linux version 6.1\n"
    b"4,2,2000000,-;a warning \\x1b[2J\n"
    b"12,3,2500000,-;BUG: a program wrote this\n"
    b" SUBSYSTEM=x\n"
)


def test_the_kernels_log_is_judged_where_quiet_hid_it_from_the_console() -> None:
    result = run(StandInVm(log=LOG))
    assert result.is_passed
    assert result.warnings == ("[    2.000000] a warning \\x1b[2J",)
    bad = LOG + b"4,4,3000000,-;WARNING: CPU: 0 PID: 1 at x\n4,5,3000001,-;Call Trace:\n"
    result = run(StandInVm(log=bad))
    assert (result.verdict, result.exit_status) == ("warning", 121)
    assert result.line == "[    3.000000] WARNING: CPU: 0 PID: 1 at x"
    assert result.trace == ("[    3.000001] Call Trace:",)
    assert run(StandInVm(log=bad), fail_on=FAIL_ON.without("warning")).is_passed


def test_an_interrupt_ends_the_test_and_is_a_result() -> None:
    def act(argv: tuple[str, ...], stdout: BinaryIO, stderr: BinaryIO) -> Completed:
        raise KeyboardInterrupt

    result = run(StandInVm(act=act))
    assert (result.verdict, result.exit_status) == ("interrupted", 130)


def test_other_errors_of_the_host_are_a_result() -> None:
    def act(argv: tuple[str, ...], stdout: BinaryIO, stderr: BinaryIO) -> Completed:
        raise PyvmmError("the connection broke")

    result = run(StandInVm(act=act))
    assert (result.verdict, result.exit_status) == ("host-error", 125)
    assert result.as_case().error is not None


def test_a_gigabyte_of_output_costs_no_memory() -> None:
    piece, taken = b"x" * (1 << 20), []

    def act(argv: tuple[str, ...], stdout: BinaryIO, stderr: BinaryIO) -> Completed:
        for _ in range(1024):
            stdout.write(piece)
        return Completed(argv=argv, status=0)

    result = run(StandInVm(act=act), on_stdout=lambda data: taken.append(len(data)))
    assert result.stdout_bytes == sum(taken) == 1 << 30
    assert len(result.stdout_tail) <= 64 << 10


@pytest.mark.parametrize(("options", "words"), [
    ({}, "a boot test: has nothing to do"),
    ({"puts": [("a", "b")], "expect": ["x"]}, "a boot test: copies files only for a command"),
    ({"command": ["x"], "timeout_s": 0}, "timeout_s 0: must be seconds above 0"),
    ({"command": ["x"], "boot_timeout_s": float("nan")}, "boot_timeout_s nan: must be"),
    ({"expect": ["("]}, "expect '(': is no regular expression"),
])
def test_a_test_that_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        BootTest(machine=MACHINE, **options)
    assert str(caught.value).startswith(words)


def test_a_text_is_no_list() -> None:
    with pytest.raises(TypeError, match="command is a list"):
        BootTest(machine=MACHINE, command="uname -r")
