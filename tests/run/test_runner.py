"""How a run ends, with vCPUs made of Python: exits, kicks, signals, halts, defects."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from pyvmm.console.place import Console
from pyvmm.kvm import abi
from pyvmm.kvm.exits import ExitReason
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.run.vcpu_loop import VcpuLoop
from tests.support.patience import patient
from tests.support.runner_rig import FakeVcpu, Rig, SpinningVcpu, idle, loop_of


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


@pytest.mark.parametrize(("reason", "kind"), [
    (ExitReason.SHUTDOWN, Kind.TRIPLE_FAULT),
    (ExitReason.HLT, Kind.SHUTDOWN),
    (ExitReason.INTERNAL_ERROR, Kind.INTERNAL_ERROR),
    (ExitReason.FAIL_ENTRY, Kind.INTERNAL_ERROR),
    (ExitReason.UNKNOWN, Kind.INTERNAL_ERROR),
    (ExitReason.DEBUG, Kind.INTERNAL_ERROR),
])
def test_exits_that_end_a_run(rig: Rig, reason: ExitReason, kind: Kind) -> None:
    outcome = rig.run(lambda _: int(reason))
    assert outcome.kind is kind
    if kind is not Kind.SHUTDOWN:
        assert "rip 0x1234" in outcome.detail


def test_a_kvm_run_that_fails_ends_the_run(rig: Rig) -> None:
    def guest(_: FakeVcpu) -> int:
        raise OSError(14, "Bad address")

    outcome = rig.run(guest)
    assert outcome.kind is Kind.INTERNAL_ERROR
    assert "KVM_RUN" in outcome.detail


def test_a_timeout_kicks_a_guest_that_never_exits(rig: Rig) -> None:
    rig.runner.finish_after(0.05, Outcome(Kind.TIMEOUT))
    assert rig.run(idle).kind is Kind.TIMEOUT
    assert rig.runner.stopped


def test_the_first_outcome_stands(rig: Rig) -> None:
    def guest(vcpu: FakeVcpu) -> int:
        rig.runner.finish(Outcome(Kind.GUEST_STATUS, 5))
        rig.runner.finish(Outcome(Kind.RESET))
        return vcpu.halt()

    assert rig.run(guest) == Outcome(Kind.GUEST_STATUS, 5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_ends_the_run_and_handlers_come_back(rig: Rig, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    timer = threading.Timer(0.05, lambda: os.kill(os.getpid(), number))
    timer.start()
    outcome = rig.run(idle)
    timer.join()
    assert (outcome.kind, outcome.exit_status) == (Kind.SIGNAL, 128 + number)
    assert signal.getsignal(number) is before


def test_a_signal_that_another_thread_gets_is_seen(rig: Rig) -> None:
    def guest(vcpu: FakeVcpu) -> int:
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        return vcpu.halt()

    assert rig.run(guest).exit_status == 128 + signal.SIGTERM


def test_a_halt_with_interrupts_off_is_a_shutdown(rig: Rig) -> None:
    def guest(vcpu: FakeVcpu) -> int:
        vcpu.mp_state, vcpu.rflags = abi.KVM_MP_STATE_HALTED, 0x2
        return vcpu.halt()

    rig.runner.watch_for_halt()
    assert rig.run(guest).kind is Kind.SHUTDOWN


@pytest.mark.parametrize(("boot_rflags", "kind"), [(0x2, Kind.SHUTDOWN), (0x202, Kind.TIMEOUT)])
def test_several_vcpus_have_halted_when_all_of_them_have(
    rig: Rig, boot_rflags: int, kind: Kind
) -> None:
    """What Linux's last CPU has still to do, such as to power off, is not cut short."""
    loops: list[VcpuLoop] = []
    for state, rflags in (
        (abi.KVM_MP_STATE_HALTED, boot_rflags), (abi.KVM_MP_STATE_HALTED, 0x2),
        (abi.KVM_MP_STATE_UNINITIALIZED, 0x2),
    ):
        vcpu = FakeVcpu(lambda one: one.halt())
        vcpu.mp_state, vcpu.rflags = state, rflags
        loops.append(loop_of(rig, vcpu, "vCPU", loops))
    rig.runner.watch_for_halt()
    rig.runner.finish_after(0.5, Outcome(Kind.TIMEOUT))
    outcome = rig.runner.run(
        vcpus=loops, workers=[], console=Console(None, None), output=rig.output,
    )
    assert outcome.kind is kind


def test_a_guest_on_its_way_to_halt_is_not_kicked_to_a_standstill(rig: Rig) -> None:
    kicks = [0]

    def guest(vcpu: FakeVcpu) -> int:
        kicks[0] += 1
        return vcpu.halt()

    rig.runner.watch_for_halt()
    rig.runner.finish_after(0.5, Outcome(Kind.TIMEOUT))
    assert rig.run(guest).kind is Kind.TIMEOUT
    assert 2 <= kicks[0] <= 15


def test_a_halt_that_an_interrupt_could_end_is_none(rig: Rig) -> None:
    def guest(vcpu: FakeVcpu) -> int:
        vcpu.mp_state = abi.KVM_MP_STATE_HALTED
        return vcpu.halt()

    rig.runner.watch_for_halt()
    rig.runner.finish_after(0.3, Outcome(Kind.TIMEOUT))
    assert rig.run(guest).kind is Kind.TIMEOUT


def test_a_defect_of_ours_ends_the_run_with_125(rig: Rig) -> None:
    def guest(_: FakeVcpu) -> int:
        raise ZeroDivisionError("oops")

    outcome = rig.run(guest)
    assert outcome.exit_status == 125
    assert "vcpu0" in outcome.detail
    assert "oops" in outcome.detail


def test_the_end_of_a_run_reaches_eight_busy_vcpus(rig: Rig) -> None:
    """The goal is 50 ms; a test host is busy with other things, so its bound is wide."""
    loops = [loop_of(rig, SpinningVcpu(), f"vCPU {index}") for index in range(8)]
    finished_s = []

    def end() -> None:
        finished_s.append(time.monotonic())
        rig.runner.finish(Outcome(Kind.RESET))

    timer = threading.Timer(0.2, end)
    timer.start()
    rig.runner.run(
        vcpus=loops, workers=[], console=Console(None, None), output=rig.output,
    )
    took_s = time.monotonic() - finished_s[0]
    timer.join()
    assert rig.runner.stopped
    assert took_s < patient(5), f"stopping took {took_s:.3f} s"


def test_one_vcpus_failure_ends_the_others(rig: Rig) -> None:
    vcpus = [FakeVcpu(idle) for _ in range(3)]
    vcpus.insert(2, FakeVcpu(lambda _: int(ExitReason.SHUTDOWN)))
    loops = [loop_of(rig, vcpu, f"vCPU {index}") for index, vcpu in enumerate(vcpus)]
    outcome = rig.runner.run(
        vcpus=loops, workers=[], console=Console(None, None), output=rig.output,
    )
    assert outcome == Outcome(Kind.TRIPLE_FAULT, detail="vCPU 2")
    assert rig.runner.stopped
