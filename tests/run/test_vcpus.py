"""All vCPUs of a run together, made of Python: pause and resume, and halts nobody announces."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pyvmm.console.place import Console
from pyvmm.kvm import abi
from pyvmm.run.io_loop import IoSource
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.run.vcpu_loop import VcpuLoop
from tests.support.patience import patient
from tests.support.runner_rig import FakeVcpu, Rig, SpinningVcpu, idle, loop_of

DEADLINE_S = 20.0
STEADY_S = 0.05
END = Outcome(Kind.RESET)


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


class Counting(SpinningVcpu):
    """A vCPU that is busy, and says how often it was entered."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def spin(self, vcpu: FakeVcpu) -> int:
        self.entries += 1
        return super().spin(vcpu)


def run(
    rig: Rig, *vcpus: FakeVcpu, script: Callable[[], object] = int, ends: bool = True
) -> Outcome:
    """Run ``vcpus``, with ``script`` in another thread; its end, if it ``ends``, is the run's.

    What the script raises is raised.
    """
    raised: list[BaseException] = []

    def body() -> None:
        try:
            script()
            if ends:
                rig.runner.finish(END)
        except BaseException as error:
            raised.append(error)
            rig.runner.finish(END)

    loops: list[VcpuLoop] = []
    loops += [loop_of(rig, vcpu, f"vCPU {n}", loops) for n, vcpu in enumerate(vcpus)]
    thread = threading.Thread(target=body)
    thread.start()
    rig.runner.finish_after(patient(DEADLINE_S), Outcome(Kind.TIMEOUT))
    outcome = rig.runner.run(
        vcpus=loops, workers=[], console=Console(None, None), output=rig.output,
    )
    thread.join()
    assert rig.runner.stopped
    for error in raised:
        raise error
    return outcome


def wait_for(what: Callable[[], bool]) -> None:
    until_s = time.monotonic() + patient(DEADLINE_S)
    while not what():
        assert time.monotonic() < until_s
        time.sleep(0.001)


def test_a_paused_guest_stands_still_until_it_is_resumed(rig: Rig) -> None:
    vcpus = [Counting() for _ in range(3)]

    def paused() -> bool:
        return rig.runner.is_paused

    def script() -> None:
        wait_for(lambda: all(vcpu.entries for vcpu in vcpus))
        assert not paused()
        assert rig.runner.pause()
        assert paused()
        before = [vcpu.entries for vcpu in vcpus]
        time.sleep(STEADY_S)
        assert [vcpu.entries for vcpu in vcpus] == before
        assert [vcpu.pauses_noted for vcpu in vcpus] == [0, 0, 0]
        rig.runner.resume()
        assert not paused()
        wait_for(lambda: all(vcpu.entries > n for vcpu, n in zip(vcpus, before, strict=True)))
        # So that the guest's watchdogs do not take the pause for a lock-up.
        assert [vcpu.pauses_noted for vcpu in vcpus] == [1, 1, 1]

    assert run(rig, *vcpus, script=script) == END


def test_pausing_twice_is_pausing_once(rig: Rig) -> None:
    vcpu = Counting()

    def script() -> None:
        rig.runner.resume()
        for _ in range(20):
            wait_for(lambda: vcpu.entries > 0)
            assert rig.runner.pause()
            assert rig.runner.pause()
            vcpu.entries = 0
            rig.runner.resume()
            rig.runner.resume()

    assert run(rig, vcpu, script=script) == END


def test_a_pause_before_the_run_is_one_from_the_first_instruction_on(rig: Rig) -> None:
    vcpu = Counting()
    assert rig.runner.pause()

    def script() -> None:
        time.sleep(STEADY_S)
        assert rig.runner.pause()
        assert vcpu.entries == 0
        rig.runner.resume()
        wait_for(lambda: vcpu.entries > 0)

    assert run(rig, vcpu, script=script) == END


def test_there_is_nothing_to_pause_once_the_run_is_over(rig: Rig) -> None:
    vcpu = FakeVcpu(idle)
    run(rig, vcpu)
    vcpu.page.release()
    for _ in range(2):
        assert not rig.runner.pause()
        assert not rig.runner.is_paused
        rig.runner.resume()
        rig.runner.close()


def test_a_paused_run_still_times_out(rig: Rig) -> None:
    def script() -> None:
        assert rig.runner.pause()
        rig.runner.finish_after(0.05, Outcome(Kind.TIMEOUT))

    assert run(rig, Counting(), Counting(), script=script, ends=False).kind is Kind.TIMEOUT
    assert not rig.runner.is_paused


def test_the_end_of_a_paused_run_reaches_its_vcpus(rig: Rig) -> None:
    def script() -> None:
        assert rig.runner.pause()  # and the run is ended after the script

    started_s = time.monotonic()
    assert run(rig, Counting(), Counting(), script=script) == END
    assert time.monotonic() - started_s < patient(3), "nobody had to be given up"


def test_a_vcpu_that_fails_while_it_is_being_paused_ends_the_pause(rig: Rig) -> None:
    running = threading.Event()

    def guest(vcpu: FakeVcpu) -> int:
        running.set()
        vcpu.kicked.wait()
        raise OSError(14, "Bad address")

    def script() -> None:
        running.wait()
        assert not rig.runner.pause()

    outcome = run(rig, Counting(), FakeVcpu(guest), script=script)
    assert outcome.kind is Kind.INTERNAL_ERROR


def test_a_vcpu_at_a_device_is_paused_when_it_is_done_there(rig: Rig) -> None:
    at_device, go_on = threading.Event(), threading.Event()
    entries = [0]

    def guest(vcpu: FakeVcpu) -> int:
        entries[0] += 1
        at_device.set()
        go_on.wait()
        raise InterruptedError  # as at the next KVM_RUN, if not before

    def script() -> None:
        at_device.wait()
        assert not rig.runner.pause(timeout_s=STEADY_S)
        assert rig.runner.is_paused, "the pause stays asked for"
        go_on.set()
        assert rig.runner.pause(timeout_s=patient(DEADLINE_S))
        assert entries == [1]
        rig.runner.resume()

    assert run(rig, Counting(), FakeVcpu(guest), script=script) == END


def test_a_pause_that_somebody_else_takes_back_is_none(rig: Rig) -> None:
    at_device, go_on = threading.Event(), threading.Event()

    def guest(vcpu: FakeVcpu) -> int:
        at_device.set()
        go_on.wait()
        return vcpu.halt()

    def script() -> None:
        at_device.wait()
        timer = threading.Timer(STEADY_S, rig.runner.resume)
        timer.start()
        assert not rig.runner.pause()
        timer.join()
        go_on.set()

    assert run(rig, FakeVcpu(guest), script=script) == END


def test_the_runs_own_threads_may_not_pause_it(rig: Rig) -> None:
    """They would wait for themselves, or for one another."""
    refused = []

    def pause(where: str) -> None:
        with pytest.raises(RuntimeError, match="another"):
            rig.runner.pause()
        refused.append(where)

    def guest(vcpu: FakeVcpu) -> int:
        if not refused:
            pause("vcpu")
            os.eventfd_write(doorbell, 1)
        return vcpu.halt()

    def service() -> float | None:
        pause("worker")
        os.write(rig.input_write, b"x")
        return None

    def receive(data: bytes) -> int:
        pause("main")
        rig.runner.finish(END)
        return len(data)

    doorbell = os.eventfd(0, os.EFD_NONBLOCK)
    rig.receive = receive  # type: ignore[method-assign]
    assert rig.run(guest, [("disk", [IoSource(doorbell, service)])]) == END
    assert refused == ["vcpu", "worker", "main"]
    os.close(doorbell)


def test_a_pause_reaches_eight_busy_vcpus(rig: Rig) -> None:
    """The goal is 50 ms; a test host is busy with other things, so its bound is wide."""
    vcpus = [Counting() for _ in range(8)]
    took_s = []

    def script() -> None:
        wait_for(lambda: all(vcpu.entries for vcpu in vcpus))
        started_s = time.monotonic()
        assert rig.runner.pause()
        took_s.append(time.monotonic() - started_s)

    assert run(rig, *vcpus, script=script) == END
    assert took_s[0] < patient(5), f"pausing took {took_s[0]:.3f} s"


# Halts -------------------------------------------------------------------------------------------

HALTED = abi.KVM_MP_STATE_HALTED
NEVER_STARTED, GOT_INIT = abi.KVM_MP_STATE_UNINITIALIZED, abi.KVM_MP_STATE_INIT_RECEIVED
OFF, ON = 0x2, 0x202  # RFLAGS, by what they say of interrupts


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that a test can wait for; before the rig is made."""
    monkeypatch.setattr("pyvmm.run.halts.FIRST_WINDOW_S", 0.1)


def waiting(state: int, rflags: int) -> FakeVcpu:
    vcpu = FakeVcpu(idle)
    vcpu.mp_state, vcpu.rflags = state, rflags
    return vcpu


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("others", [
    [], [(HALTED, OFF)], [(NEVER_STARTED, OFF)], [(GOT_INIT, OFF), (HALTED, OFF)],
])
def test_a_halt_without_a_word_ends_the_run(rig: Rig, others: list[tuple[int, int]]) -> None:
    vcpus = [waiting(HALTED, OFF), *(waiting(*other) for other in others)]
    outcome = run(rig, *vcpus, ends=False)
    assert outcome == Outcome(Kind.SHUTDOWN, detail="halted with interrupts off")


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("others", [
    [(HALTED, ON)], [(abi.KVM_MP_STATE_RUNNABLE, OFF), (NEVER_STARTED, OFF)],
])
def test_a_guest_that_waits_is_seldom_looked_at_and_never_ended(
    rig: Rig, others: list[tuple[int, int]]
) -> None:
    entries = [0]

    def guest(vcpu: FakeVcpu) -> int:
        entries[0] += 1
        return vcpu.halt()

    first = FakeVcpu(guest)
    first.mp_state, first.rflags = HALTED, OFF
    vcpus = [first, *(waiting(*other) for other in others)]
    assert run(rig, *vcpus, script=lambda: time.sleep(2)) == END
    # After 0.1, 0.3, 0.7 and 1.5 s, besides the start; a slow host skips some.
    assert 2 <= entries[0] <= 5


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("by_pit", [True, False])
def test_a_guest_that_an_nmi_may_wake_has_not_halted(rig: Rig, by_pit: bool) -> None:
    vcpu = waiting(HALTED, OFF)
    vcpu.pit_sends_nmi = by_pit
    loops: list[VcpuLoop] = []
    loops.append(loop_of(rig, vcpu, "vCPU", loops, lambda: not by_pit))
    rig.runner.finish_after(1.0, END)
    assert rig.runner.run(
        vcpus=loops, workers=[], console=Console(None, None), output=rig.output,
    ) == END


@pytest.mark.usefixtures("hasty")
def test_nobody_looks_while_the_guest_is_paused(rig: Rig) -> None:
    def script() -> None:
        assert rig.runner.pause()
        time.sleep(0.5)
        assert rig.runner.pause(), "it was not ended"
        rig.runner.resume()

    outcome = run(rig, waiting(HALTED, OFF), script=script, ends=False)
    assert outcome.kind is Kind.SHUTDOWN
