"""Verdict: what the evidence makes of a run's end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.console.watch import ConsoleWatch, Finding, Sign
from pyvmm.errors import StateError
from pyvmm.kvm import abi
from pyvmm.kvm.exits import HltExit, InternalErrorExit, ShutdownExit, SystemEventExit, UnknownExit
from pyvmm.run.io_loop import Deadline
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.run.verdict import SILENCE_S, Verdict, outcome_of_exit, outcome_of_halt
from tests.support.states import is_plain, spoilt

PANIC = Finding(Sign.PANIC, "VFS: Unable to mount root fs")
HALT = outcome_of_halt()


class FakeRun:
    """Stands in for the Runner: remembers what was asked of it."""

    def __init__(self) -> None:
        self.finished: list[Outcome] = []
        self.later: list[Outcome] = []
        self.calls: list[tuple[float, Callable[[], None]]] = []
        self.halt_watches = 0

    def finish(self, outcome: Outcome) -> None:
        self.finished.append(outcome)

    def finish_after(self, delay_s: float, outcome: Outcome) -> Deadline:
        assert delay_s > 0
        self.later.append(outcome)
        return Deadline(lambda: None, lambda _: None)

    def call_after(self, delay_s: float, callback: Callable[[], None]) -> None:
        self.calls.append((delay_s, callback))

    def watch_for_halt(self) -> None:
        self.halt_watches += 1


@pytest.fixture
def run() -> FakeRun:
    return FakeRun()


@pytest.fixture
def verdict(run: FakeRun) -> Verdict:
    """Of a Linux that has printed something."""
    found = Verdict(run, is_linux=True)
    found.hear(Finding(Sign.FIRST_OUTPUT))
    return found


def test_a_panic_explains_the_reboot_that_follows(verdict: Verdict) -> None:
    verdict.hear(PANIC)
    assert verdict.judge(Outcome(Kind.RESET)) == Outcome(Kind.PANIC, detail=PANIC.text)


def test_a_panic_without_reboot_ends_the_run_in_a_while(run: FakeRun, verdict: Verdict) -> None:
    verdict.hear(PANIC)
    verdict.hear(PANIC)
    assert [outcome.kind for outcome in run.later] == [Kind.PANIC], "once"
    assert run.finished == []
    verdict.hear(Finding(Sign.PANIC_ENDS, "VFS"))
    assert run.finished == [Outcome(Kind.PANIC, detail=PANIC.text)]


def test_a_torn_panic_is_told_by_its_last_line(run: FakeRun, verdict: Verdict) -> None:
    verdict.hear(Finding(Sign.PANIC_ENDS, "torn"))
    assert run.finished == [Outcome(Kind.PANIC, detail="torn")]


def test_the_status_a_guest_reports_stands_whatever_it_printed(verdict: Verdict) -> None:
    verdict.hear(PANIC)
    assert verdict.judge(Outcome(Kind.GUEST_STATUS, 3)) == Outcome(Kind.GUEST_STATUS, 3)


def test_a_panic_that_pvpanic_reports_is_one_without_any_console(run: FakeRun) -> None:
    verdict = Verdict(run, is_linux=True)
    verdict.panic_reported()
    said = Outcome(Kind.PANIC, detail="reported through pvpanic")
    assert run.later == [said], "the guest has a while to reboot"
    assert verdict.judge(Outcome(Kind.RESET)) == said
    assert not verdict.evidence.has_printed


def test_the_console_says_why_pvpanic_was_told(verdict: Verdict) -> None:
    verdict.panic_reported()
    verdict.hear(PANIC)
    assert verdict.judge(Outcome(Kind.RESET)).detail == PANIC.text


@pytest.mark.parametrize("kind", [Kind.GUEST_STATUS, Kind.POWER_OFF, Kind.SIGNAL, Kind.QUIT])
def test_an_end_that_no_panic_brings_about_stays(verdict: Verdict, kind: Kind) -> None:
    verdict.panic_reported()
    assert verdict.judge(Outcome(kind)).kind is kind


def test_our_initramfs_has_the_reason_of_its_panic(verdict: Verdict) -> None:
    verdict.hear(Finding(Sign.NO_ROOT, "cannot mount the root: no /dev/vdz after 10 s"))
    assert verdict.judge(Outcome(Kind.POWER_OFF)).kind is Kind.POWER_OFF, "no panic, no end"
    verdict.hear(Finding(Sign.PANIC, "Attempted to kill init!"))
    assert verdict.judge(Outcome(Kind.RESET)).detail == (
        "Attempted to kill init! (cannot mount the root: no /dev/vdz after 10 s)"
    )


@pytest.mark.parametrize("sign", [Sign.HALTS, Sign.GAVE_UP])
def test_a_halt_that_is_announced_is_watched_for(
    run: FakeRun, verdict: Verdict, sign: Sign
) -> None:
    verdict.hear(Finding(sign))
    assert run.halt_watches == 1


def test_user_space_is_timed_once(verdict: Verdict) -> None:
    before_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    verdict.hear(Finding(Sign.USER_SPACE))
    first_s = verdict.evidence.user_space_seen_s
    assert first_s is not None
    assert first_s >= before_s
    verdict.hear(Finding(Sign.USER_SPACE))
    assert verdict.evidence.user_space_seen_s == first_s


def test_an_internal_error_points_to_the_doctor_and_the_lab(verdict: Verdict) -> None:
    detail = verdict.judge(Outcome(Kind.INTERNAL_ERROR, detail="suberror 17")).detail
    assert "suberror 17" in detail
    assert "pyvmm doctor" in detail
    assert "behind `pyvmm lab --` runs where it is" in detail


EARLY = [
    (HALT, Outcome(Kind.EARLY_HALT, detail=HALT.detail)),
    (Outcome(Kind.RESET), Outcome(Kind.EARLY_RESET)),
]


@pytest.mark.parametrize(("outcome", "judged"), EARLY)
def test_fault_36_a_linux_that_ends_before_an_init_has_not_succeeded(
    verdict: Verdict, outcome: Outcome, judged: Outcome
) -> None:
    verdict.hear(Finding(Sign.WAITS_FOR_ROOT))
    assert verdict.judge(outcome) == judged
    assert judged.exit_status == 121


def test_fault_36_nor_has_one_that_prints_nothing(run: FakeRun) -> None:
    verdict = Verdict(run, is_linux=True)
    assert verdict.judge(Outcome(Kind.RESET)) == Outcome(Kind.EARLY_RESET)
    assert verdict.judge(HALT) == Outcome(Kind.SILENT_HALT, detail=HALT.detail)
    assert verdict.judge(HALT).exit_status == 121


@pytest.mark.parametrize("outcome", [HALT, Outcome(Kind.RESET)])
@pytest.mark.parametrize("sign", [
    Sign.INIT_STARTS, Sign.USER_SPACE,
    Sign.HALTS, Sign.RESTARTS,  # all there is with "quiet"
])
def test_fault_36_a_linux_that_came_as_far_as_an_init_may_end_as_it_likes(
    verdict: Verdict, sign: Sign, outcome: Outcome
) -> None:
    verdict.hear(Finding(Sign.GAVE_UP, "quoted by a program"))
    verdict.hear(Finding(sign))
    assert verdict.evidence.reached_init
    assert verdict.judge(outcome, pytest.fail) == outcome


@pytest.mark.parametrize("outcome", [HALT, Outcome(Kind.RESET), Outcome(Kind.TIMEOUT)])
@pytest.mark.parametrize("has_printed", [False, True])
def test_fault_36_a_program_that_runs_is_evidence_where_the_console_has_none(
    run: FakeRun, outcome: Outcome, has_printed: bool
) -> None:
    """``console=tty1`` or ``loglevel=0``, and an init that halts or restarts on purpose."""
    verdict = Verdict(run, is_linux=True)
    if has_printed:
        verdict.hear(Finding(Sign.FIRST_OUTPUT))
        verdict.hear(Finding(Sign.GAVE_UP, "quoted by a program"))
    assert verdict.judge(outcome, lambda: True) == outcome
    assert verdict.judge(outcome, lambda: True).exit_status in (0, 124)


@pytest.mark.parametrize("outcome", [HALT, Outcome(Kind.RESET), Outcome(Kind.POWER_OFF)])
def test_fault_36_what_is_not_linux_owes_no_init(run: FakeRun, outcome: Outcome) -> None:
    verdict = Verdict(run, is_linux=False)
    assert Verdict(run, is_linux=False).judge(Outcome(Kind.RESET)).exit_status == 0
    verdict.hear(Finding(Sign.FIRST_OUTPUT))
    assert verdict.judge(outcome, pytest.fail) == outcome


def test_fault_36_a_power_off_is_on_purpose(verdict: Verdict) -> None:
    assert verdict.judge(Outcome(Kind.POWER_OFF)).exit_status == 0


@pytest.mark.parametrize("is_linux", [False, True])
@pytest.mark.parametrize("end", [HALT, Outcome(Kind.TIMEOUT), Outcome(Kind.RESET)])
def test_fault_36_a_stage_that_gave_up_is_named(
    run: FakeRun, is_linux: bool, end: Outcome
) -> None:
    verdict = Verdict(run, is_linux=is_linux)
    watch = ConsoleWatch(verdict.hear)
    watch.feed(b"\r\n\r\nDecoding failed\r\n\r\n -- System halted")
    watch.end()
    outcome = verdict.judge(end)
    assert outcome == Outcome(Kind.GAVE_UP, detail="Decoding failed")
    assert outcome.exit_status == 121
    assert str(outcome) == "the boot gave up early: Decoding failed"
    assert verdict.evidence.wants_explanation(outcome)


def test_fault_37_silence_on_an_incomplete_kvm_is_reported(
    run: FakeRun, tmp_path: Path
) -> None:
    lines: list[str] = []
    verdict = Verdict(run, is_linux=True)
    verdict.doubt_silence(lines.append, str(tmp_path))
    ((delay_s, look),) = run.calls
    assert delay_s == SILENCE_S
    look()
    (line,) = lines
    assert f"this host's KVM is {tmp_path.name}, which cannot run a stock Linux" in line
    assert "the same command behind `pyvmm lab --`" in line
    verdict.hear(Finding(Sign.FIRST_OUTPUT))
    look()
    assert len(lines) == 1, "it speaks"


@pytest.mark.parametrize(("is_linux", "module"), [(True, "missing"), (False, ".")])
def test_fault_37_other_guests_and_hosts_are_left_alone(
    run: FakeRun, tmp_path: Path, is_linux: bool, module: str
) -> None:
    Verdict(run, is_linux=is_linux).doubt_silence(pytest.fail, str(tmp_path / module))
    for _, look in run.calls:
        look()


def registers() -> str:
    return "rip 0x10"


@pytest.mark.parametrize(("seen", "outcome"), [
    (ShutdownExit(), Outcome(Kind.TRIPLE_FAULT, detail="rip 0x10")),
    (HltExit(), Outcome(Kind.SHUTDOWN, detail="halted")),
    (UnknownExit(99), Outcome(Kind.INTERNAL_ERROR, detail="unknown exit (99)\nrip 0x10")),
])
def test_every_exit_has_an_outcome(seen: ShutdownExit, outcome: Outcome) -> None:
    assert outcome_of_exit(seen, registers) == outcome


@pytest.mark.parametrize(("number", "kind"), [
    (abi.KVM_SYSTEM_EVENT_SHUTDOWN, Kind.SHUTDOWN), (abi.KVM_SYSTEM_EVENT_RESET, Kind.RESET),
    (abi.KVM_SYSTEM_EVENT_CRASH, Kind.PANIC), (77, Kind.INTERNAL_ERROR),
])
def test_events_of_the_kernel_are_ends_too(number: int, kind: Kind) -> None:
    assert outcome_of_exit(SystemEventExit(number, ()), registers).kind is kind


def test_an_internal_error_says_what_kvm_says() -> None:
    outcome = outcome_of_exit(InternalErrorExit(1, ()), registers)
    assert outcome.kind is Kind.INTERNAL_ERROR
    assert outcome.detail == "KVM cannot emulate an instruction (suberror 1)\nrip 0x10"


def test_evidence_is_saved_and_restored() -> None:
    first = Verdict(FakeRun(), is_linux=True)
    for finding in (
        Finding(Sign.FIRST_OUTPUT), Finding(Sign.WAITS_FOR_ROOT), Finding(Sign.USER_SPACE),
        Finding(Sign.NO_ROOT, "no such disk"),
    ):
        first.hear(finding)
    state, run = first.save(), FakeRun()
    assert is_plain(state)
    second = Verdict(run, is_linux=True)
    second.restore(state)
    assert second.save() == state
    assert second.evidence.user_space_seen_s is None, "the time of another run"
    second.go_on()
    assert (run.later, run.halt_watches) == ([], 0)
    assert second.judge(HALT) == HALT, "it has reached an init"


def test_a_guest_that_was_saved_in_its_panic_ends_by_it(run: FakeRun, verdict: Verdict) -> None:
    verdict.hear(PANIC)
    verdict.hear(Finding(Sign.GAVE_UP, "no room"))
    other_run = FakeRun()
    other = Verdict(other_run, is_linux=True)
    other.restore(verdict.save())
    assert (other_run.later, other_run.halt_watches) == ([], 0), "not before it goes on"
    other.go_on()
    assert (other_run.later, other_run.halt_watches) == (run.later, 1)


@given(st.data())
def test_junk_for_evidence_is_a_state_error(data: st.DataObject) -> None:
    verdict = Verdict(FakeRun(), is_linux=True)
    good = verdict.save()
    with contextlib.suppress(StateError):
        verdict.restore(data.draw(spoilt(good)))
        assert is_plain(verdict.save())
        return
    assert verdict.save() == good
