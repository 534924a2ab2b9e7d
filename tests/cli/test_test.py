"""``pyvmm test`` at its command line, with a stand-in for the machine."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from pathlib import Path
from typing import BinaryIO
from xml.etree import ElementTree

import pytest

from pyvmm import lab
from pyvmm.cli import test as command
from pyvmm.cli.main import main
from pyvmm.cli.test import boot_test_main
from pyvmm.errors import HostError
from pyvmm.launcher.completed import Completed
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.startup.options import parse_options
from pyvmm.testing import boot_test, usable_kvm
from tests.support.stand_in_vm import StandInVm

STAMP = "[    1.000000] "
K = ["--kernel", "bzImage"]


@pytest.fixture(autouse=True)
def no_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "problem_for", lambda kernel: "")
    monkeypatch.setattr(boot_test, "EXPECT_GRACE_S", 0.1)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    monkeypatch.chdir(tmp_path)


def ends(status: int = 0, out: bytes = b"", err: bytes = b"") -> StandInVm:
    """A guest whose command prints and ends."""
    def act(argv: tuple[str, ...], stdout: BinaryIO, stderr: BinaryIO) -> Completed:
        stdout.write(out)
        stderr.write(err)
        return Completed(argv=argv, status=status)
    return StandInVm(act=act)


def run(vm: StandInVm, *argv: str) -> int:
    return boot_test_main([*K, *argv], launch=vm.launch)


def test_the_commands_output_and_status_are_ours(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert run(ends(7, b"out\xff\x00\n", b"err\n"), "--", "sh", "-c", "exit 7") == 7
    out, err = capfdbinary.readouterr()
    assert out == b"out\xff\x00\n", "every byte, and nothing of ours"
    assert err.startswith(b"err\n")
    assert err.splitlines()[-2].startswith(b"pyvmm: failed: sh -c 'exit 7': exit status 7 (")
    assert err.splitlines()[-1] == b"pyvmm: exit status 7"


def test_a_test_that_passes_says_so_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(ends(), "--", "true") == 0
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("pyvmm: true: passed (start ")
    assert err.count("\n") == 1


def test_a_bad_line_is_shown_with_the_forty_before_it(capfd: pytest.CaptureFixture[str]) -> None:
    def boot(vm: StandInVm) -> None:
        vm.says(*(f"{STAMP}line {n}" for n in range(60)), STAMP + "BUG: x", STAMP + "Call Trace:")
        vm.says(STAMP + "---[ end trace 0 ]---")

    assert run(StandInVm(boot=boot), "--", "true") == 121
    lines = capfd.readouterr().err.splitlines()
    at = lines.index(f"  > {STAMP}BUG: x")
    assert lines[at - 40 : at] == [f"  {STAMP}line {n}" for n in range(20, 60)]
    assert lines[at - 41] == "pyvmm: console, with the line that decided:"
    assert lines[at + 1] == f"  {STAMP}Call Trace:"
    assert lines[-2].startswith(f"pyvmm: oops: {STAMP}BUG: x (start ")


def test_the_console_is_shown_live_on_standard_error_if_asked_for(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run(StandInVm(boot=lambda vm: vm.says("\x1b[2Jhello")), "-v", "--", "true") == 0
    assert capfd.readouterr().err.startswith("console: hello\n")


def test_reports_are_written_whatever_came(capfd: pytest.CaptureFixture[str]) -> None:
    for name, status, tag in (("ok", 0, None), ("bad", 3, "failure")):
        assert run(
            ends(status, b"\x1b[2J<&"), "--junit", "r.xml", "--json", "r.json", "--name", name,
            "--", "true",
        ) == status
        found = json.loads(Path("r.json").read_text())
        assert found["pyvmm_boot_test"] == 1
        assert (found["name"], found["exit_status"], found["status"]) == (name, status, status)
        case = ElementTree.parse("r.xml").getroot()[0].find("testcase")
        assert case is not None
        assert case.get("name") == name
        assert case.findtext("system-out") == "\\x1b[2J<&"
        assert (case.find("failure") is not None) == (tag == "failure")
    capfd.readouterr()


def test_two_reports_do_not_go_into_one_file(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["test", *K, "--junit", "r", "--console-log", "./r", "--", "x"]) == 125
    assert "--console-log ./r: is the file of --junit already" in capfd.readouterr().err
    assert not Path("r").exists()
    assert run(ends(), "--junit", os.devnull, "--json", os.devnull, "--", "x") == 0


def test_a_file_that_cannot_be_written_is_told_before_the_boot(
    capfd: pytest.CaptureFixture[str],
) -> None:
    for option in ("--junit", "--json", "--console-log"):
        assert main(["test", *K, option, "none/x", "--", "true"]) == 125
        assert capfd.readouterr().err == (
            f"pyvmm: {option} none/x: cannot be written: No such file or directory\n"
        )


def test_a_full_disk_costs_the_report_not_the_verdict(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(ends(), "--json", "/dev/full", "--", "true") == 125
    err = capfd.readouterr().err.splitlines()
    assert err[0] == "pyvmm: --json /dev/full: cannot be written: No space left on device"
    assert err[1].startswith("pyvmm: true: passed")


def test_a_console_log_that_is_short_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    def boot(vm: StandInVm) -> None:
        vm.says("first")
        vm.console_log = None  # the disk is full
        vm.says("second")

    assert run(StandInVm(boot=boot), "--console-log", "log", "--", "true") == 125
    err = capfd.readouterr().err
    assert "pyvmm: --console-log log: has 7 of 15 bytes: the disk is full" in err
    assert "pyvmm: true: passed" in err


def test_standard_output_on_a_full_disk_is_told(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = os.dup(1)
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        os.dup2(full, 1)
        assert run(ends(0, b"x"), "--", "true") == 125
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(full)
    assert f"pyvmm: standard output: {os.strerror(errno.ENOSPC)}\n" in capfd.readouterr().err


def test_a_reader_of_the_output_that_goes_away_changes_nothing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    saved = os.dup(1)
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        os.dup2(write_end, 1)
        assert run(ends(3, b"x"), "--", "true") == 3
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(write_end)
    assert "Broken pipe" not in capfd.readouterr().err


def test_a_refused_test_leaves_no_file_behind(capfd: pytest.CaptureFixture[str]) -> None:
    Path("old.json").write_text("old")
    assert main(["test", *K, "--junit", "new.xml", "--console-log", "none/x", "--", "x"]) == 125
    assert not Path("new.xml").exists()
    assert main(["test", *K, "--json", "old.json", "--console-log", "none/x", "--", "x"]) == 125
    assert Path("old.json").read_text() == "old"
    capfd.readouterr()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_test_with_reports(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    def act(argv: tuple[str, ...], stdout: BinaryIO, stderr: BinaryIO) -> Completed:
        os.kill(os.getpid(), number)
        time.sleep(10)
        raise AssertionError("the signal did nothing")

    vm = StandInVm(act=act)
    before = signal.getsignal(number)
    assert run(vm, "--json", "r.json", "--", "true") == 128 + number
    assert json.loads(Path("r.json").read_text())["verdict"] == "interrupted"
    assert signal.getsignal(number) == before
    assert vm.is_closed
    assert f"interrupted by signal {int(number)}" in capfd.readouterr().err


def test_a_machine_that_cannot_be_started_is_a_report_too(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def launch(*_args: object, **_options: object) -> None:
        raise HostError("KVM_CREATE_VM: no memory")

    assert boot_test_main(
        [*K, "--json", "r.json", "--", "true"], launch=launch,  # type: ignore[arg-type]
    ) == 125
    found = json.loads(Path("r.json").read_text())
    assert found["message"] == "not started: KVM_CREATE_VM: no memory"
    assert capfd.readouterr().err.startswith(
        "pyvmm: host-error: not started: KVM_CREATE_VM: no memory"
    )


def test_on_github_a_failure_is_annotated_and_a_guest_annotates_nothing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")

    def act(argv: tuple[str, ...], stdout: BinaryIO, stderr: BinaryIO) -> Completed:
        stdout.write(b"::error::evil\n")
        vm.says("::error::evil", "##[error]evil")
        return Completed(argv=argv, status=0)

    vm = StandInVm(act=act)
    assert run(vm, "--expect", "50%, never", "--", "true") == 124
    out, err = capfd.readouterr()
    assert out == "::error::evil\n", "standard output is the command's alone"
    lines = err.splitlines()
    token = lines[0].removeprefix("::stop-commands::")
    assert lines.index(f"::{token}::") == 1
    assert lines[-1].startswith(
        "::error title=pyvmm test%3A expect::the console did not show '50%25, never'"
    )
    assert [line for line in lines if "evil" in line] == [
        "  \\x3a:error::evil", "  ##\\x5berror]evil"
    ]


def test_what_the_kvm_lacks_is_told_with_the_command_that_works(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "problem_for", lambda kernel: "this host's KVM cannot")
    monkeypatch.delenv("PYVMM_LAB", raising=False)
    assert main(["test", *K, "--", "sh", "-c", "a b"]) == 125
    assert capfd.readouterr().err == (
        "pyvmm: this host's KVM cannot; run it as: "
        "pyvmm lab -- pyvmm test --kernel bzImage -- sh -c 'a b'\n"
    )
    monkeypatch.setenv("PYVMM_LAB", "1")
    assert main(["test", *K, "--", "true"]) == 125
    assert capfd.readouterr().err == "pyvmm: this host's KVM cannot\n"


def test_the_doctor_says_what_the_kvm_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    usable_kvm.kvm_problem.cache_clear()
    problem = usable_kvm.kvm_problem()
    usable_kvm.kvm_problem.cache_clear()
    assert main(["doctor", "--quiet"]) == bool(problem)
    assert "\n" not in problem
    assert not problem or problem.startswith("this host's KVM cannot run a stock Linux kernel: ")


def test_the_labs_mark_is_known_without_the_lab() -> None:
    assert usable_kvm.INSIDE == lab.INSIDE


def test_a_kernel_tree_is_a_kernel(tmp_path: Path) -> None:
    kernel = tmp_path / "linux/arch/x86/boot/bzImage"
    kernel.parent.mkdir(parents=True)
    kernel.write_bytes(b"x")
    args = parse_options(command.COMMAND, ["--kernel", str(tmp_path / "linux"), "--", "true"])
    assert command.boot_test_from(args).machine.kernel == str(kernel)


def test_options_become_a_test() -> None:
    Path("in").write_text("x")
    args = parse_options(command.COMMAND, [
        *K, "--disk", "root.img,ro", "--memory", "1G", "--cpus", "2", "--append", "a", "--append",
        "b", "--expect", "e", "--fail-on", "f", "--no-fail-on", "warning", "--allow", "w",
        "--boot-timeout", "5", "--timeout", "7", "--put", "in:/tmp/", "--get", "/a:b:c", "--env",
        "A=b=c", "--cwd", "/tmp", "--agent", "image", "--", "echo", "--json",
    ])
    test = command.boot_test_from(args)
    machine = test.machine
    assert (machine.memory, machine.cpus, machine.append) == (1 << 30, 2, "a b")
    assert (machine.agent, len(machine.disks)) == ("image", 1)
    assert test.command == ("echo", "--json")
    assert (test.expect, test.fail_on.patterns, test.fail_on.allowed) == (("e",), ("f",), ("w",))
    assert "warning" not in test.fail_on.classes
    assert (test.boot_timeout_s, test.timeout_s) == (5.0, 7.0)
    assert (test.puts, test.gets) == ((("in", "/tmp/"),), (("/a", "b:c"),))
    assert (test.env, test.cwd) == ({"A": "b=c"}, "/tmp")


@pytest.mark.parametrize(("argv", "words"), [
    ([], "test: has nothing to do; write -- CMD..., or --expect RE"),
    (["--expect", "("], "--expect '(': is no regular expression"),
    (["--fail-on", "(", "x"], "--fail-on '(': is no regular expression"),
    (["--no-fail-on", "panic", "x"], "--no-fail-on panic: cannot be"),
    (["--no-fail-on", "bug", "x"], "--no-fail-on bug: is no class; there are"),
    (["--timeout", "0", "x"], "--timeout 0: must be a number of seconds"),
    (["--put", "x", "y"], "--put x: must be SRC:DST"),
    (["--put", "none:/tmp/", "y"], "--put none:/tmp/: there is no none"),
    (["--put", ".:tmp", "y"], "--put .:tmp: DST must be an absolute path"),
    (["--get", "log:.", "y"], "--get log:.: SRC must be an absolute path"),
    (["--get", "/log:none/x", "y"], "--get /log:none/x: there is no directory none"),
    (["--get", "/log:.", "--expect", "x"], "--get: needs a CMD"),
    (["--env", "A", "y"], "--env A: must be NAME=VALUE"),
    (["--agent", "no", "y"], "--agent no: must be one of inject, image, none"),
    (["--agent", "none", "y"], "--agent none: leaves nobody to run CMD"),
])
def test_a_mistake_is_one_line(
    argv: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["test", *K, *argv]) == 125
    err = capfd.readouterr().err
    assert err.startswith(f"pyvmm: {words}")
    assert err.count("\n") == 1


def test_a_guest_that_ends_before_the_command_reports_is_120(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def act(argv: tuple[str, ...], stdout: BinaryIO, stderr: BinaryIO) -> Completed:
        vm.ends(Outcome(Kind.POWER_OFF))
        return Completed(argv=argv, status=0)

    vm = StandInVm(act=act)
    assert run(vm, "--", "poweroff") == 120
    assert "ended: the guest ended without a report: guest powered off" in capfd.readouterr().err
