"""The report of a failure, and its parts: the kernel's log, the phases, a Vm's judge."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.launcher.vm import Vm
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.testing.fail_on import FAIL_ON
from pyvmm.testing.kernel_log import bad_message, kernel_messages, warnings_of
from pyvmm.testing.report import failure_report, last_lines
from pyvmm.testing.timeline import PHASES, Timeline
from pyvmm.testing.verdicts import KernelOops
from pyvmm.testing.watched import Watch, watch
from tests.support.patience import patient
from tests.support.stand_in_vm import StandInVm

STAMP = "[    1.000000] "
LOG = b"4,2,2000000,-;a warning\n6,3,2100000,-;a fact\n12,4,2200000,-;a program's\n"


@pytest.fixture
def vm() -> StandInVm:
    return StandInVm(log=LOG)


@pytest.fixture
def watched(vm: StandInVm) -> Iterator[Watch]:
    found = watch(vm)
    yield found
    found.close()
    assert not any(thread.name == "pyvmm-trace" for thread in threading.enumerate())


def test_a_bad_line_fails_the_vm_once_its_trace_is_complete(vm: StandInVm, watched: Watch) -> None:
    vm.says(STAMP + "BUG: x", STAMP + "Call Trace:")
    assert watched.error is None
    vm.says(STAMP + "---[ end trace 0 ]---")
    assert isinstance(vm.failure, KernelOops)
    with pytest.raises(KernelOops):
        watched.check()


def test_a_trace_that_does_not_end_is_awaited_for_a_second(vm: StandInVm) -> None:
    judged = threading.Event()
    found = watch(vm)
    vm.on_end(lambda outcome: judged.set())
    vm.says(STAMP + "BUG: x")
    assert judged.wait(patient(10))
    assert isinstance(vm.failure, KernelOops)
    found.close()


def test_a_check_does_not_wait_for_a_trace(vm: StandInVm, watched: Watch) -> None:
    vm.says(STAMP + "BUG: x")
    with pytest.raises(KernelOops):
        watched.check()


def test_an_end_fails_the_vm_unless_it_was_announced(vm: StandInVm, watched: Watch) -> None:
    watched.expect_end()
    vm.ends(Outcome(Kind.POWER_OFF))
    assert vm.failure is None
    watched.check()
    other = StandInVm()
    bad = watch(other)
    other.ends(Outcome(Kind.POWER_OFF))
    assert bad.error is not None
    assert bad.error.name == "ended"
    crashed = StandInVm()
    bad = watch(crashed)
    bad.expect_end()
    crashed.ends(Outcome(Kind.TRIPLE_FAULT))
    assert bad.error is not None
    assert bad.error.name == "triple-fault", "nobody announces that"


def test_a_report_of_a_guest_that_lives_has_its_kernel_log_and_registers(vm: StandInVm) -> None:
    vm.says("hello", "\x1b[31mred\x1b[0m \x1b[2J")
    report = failure_report(cast(Vm, vm), AssertionError("x"))
    assert dict(report.sections()) == {
        "last lines of the console": "hello\nred",
        "kernel log, warn and worse": "[    2.000000] a warning",
        "registers": "vcpu0:\nrax 0x1 r8 0xffffffff81000000 r9 0xffffffff81000000 "
                     "r10 0xffffffff81000000\nr11 0xffffffff81000000 r12 0xffffffff81000000",
    }
    assert not vm.is_paused


def test_a_report_of_a_verdict_has_the_lines_and_no_outcome_of_our_own(
    vm: StandInVm, watched: Watch
) -> None:
    vm.says("before", STAMP + "BUG: x", STAMP + "---[ end trace 0 ]---")
    report = failure_report(cast(Vm, vm), vm.failure)
    sections = dict(report.sections())
    assert "outcome" not in sections
    assert sections["console, with the line that decided"] == (
        f"before\n> {STAMP}BUG: x\n{STAMP}---[ end trace 0 ]---"
    )
    assert report.text().startswith(f"oops: {STAMP}BUG: x\n\n")


def test_a_report_of_a_dead_guest_has_its_outcome(vm: StandInVm) -> None:
    vm.ends(Outcome(Kind.TRIPLE_FAULT, detail="rip 0\nrax 1"))
    sections = dict(failure_report(cast(Vm, vm)).sections())
    assert sections["outcome"] == "triple fault: rip 0\nrax 1"
    assert sections["registers"]


def test_the_last_lines_are_bounded() -> None:
    lines = last_lines("\n".join("x" * 5000 for _ in range(1000)))
    assert len(lines) <= 40
    assert sum(map(len, lines)) <= 41 << 10


def test_the_kernels_log_knows_who_wrote_a_message() -> None:
    messages = kernel_messages(LOG + b" KEY=value\nno record\n3,x,1,-;bad\n")
    assert [(m.level, m.is_kernel, m.text) for m in messages] == [
        (4, True, "a warning"), (6, True, "a fact"), (4, False, "a program's"),
    ]
    assert warnings_of(messages) == ("[    2.000000] a warning",)
    assert bad_message(messages, FAIL_ON) is None


@given(st.binary(max_size=300))
def test_any_log_is_read(data: bytes) -> None:
    for message in kernel_messages(data):
        assert str(message).isprintable()
    bad_message(kernel_messages(data), FAIL_ON)


def test_user_space_begins_by_what_the_console_tells() -> None:
    begun: list[str] = []
    timeline = Timeline(begun.append)
    timeline.begin("kernel")
    timeline.feed(b"")
    assert begun == ["start", "kernel"]
    timeline.feed(b"[    0.0] Linux version\n[    1.0] Run /sb")
    timeline.feed(b"in/init as init process\nRun x as init process\n")
    timeline.begin("agent")
    timeline.feed(b"[    1.0] Run /init as init process\n")
    timeline.begin("command")
    timeline.begin("kernel")
    timeline.end()
    assert begun == list(PHASES)
    phases = timeline.phases
    assert [phase.name for phase in phases] == list(PHASES)
    assert phases[0].begin_s == 0.0
    assert all(phase.end_s >= phase.begin_s for phase in phases)
    assert timeline.phases == phases, "they are over"


def test_a_console_that_is_quiet_tells_of_no_phase() -> None:
    timeline = Timeline()
    timeline.begin("kernel")
    timeline.begin("agent")
    timeline.feed(b"[    1.0] Run /init as init process\n")
    assert [phase.name for phase in timeline.phases] == ["start", "kernel", "agent"]
