"""What a run moves, with vCPUs made of Python: console bytes, device accesses, doorbells."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from pyvmm.console.output import OutputBuffer
from pyvmm.kvm import abi
from pyvmm.kvm.exits import ExitReason
from pyvmm.run.io_loop import IoSource
from pyvmm.run.outcome import Kind, Outcome
from tests.support.patience import patient
from tests.support.runner_rig import FakeVcpu, Rig, idle


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


def test_typed_bytes_reach_the_guest(rig: Rig) -> None:
    os.write(rig.input_write, b"\x01x is data on a pipe")
    rig.runner.finish_after(0.2, Outcome(Kind.TIMEOUT))
    rig.run(idle)
    assert rig.received == b"\x01x is data on a pipe"


def test_bytes_the_guest_has_no_room_for_are_offered_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = [0, 3, 0, 2]

    def receive(data: bytes) -> int:
        taken = min(room.pop(0) if room else len(data), len(data))
        rig.received.extend(data[:taken])
        threading.Timer(0.01, rig.runner.input_room).start()
        return taken

    monkeypatch.setattr(rig, "receive", receive)
    os.write(rig.input_write, b"hello world")
    rig.runner.finish_after(0.5, Outcome(Kind.TIMEOUT))
    rig.run(idle)
    assert rig.received == b"hello world"


def test_typed_bytes_wait_while_the_run_is_quiesced(rig: Rig) -> None:
    def script() -> None:
        assert rig.runner.quiesce(patient(20))
        os.write(rig.input_write, b"patience")
        time.sleep(0.05)
        seen.append(bytes(rig.received))
        rig.runner.resume()
        until_s = time.monotonic() + patient(20)
        while rig.received != b"patience" and time.monotonic() < until_s:
            time.sleep(0.001)
        rig.runner.finish(Outcome(Kind.RESET))

    seen: list[bytes] = []
    thread = threading.Thread(target=script)
    thread.start()
    assert rig.run(idle).kind is Kind.RESET
    thread.join()
    assert seen == [b""]
    assert rig.received == b"patience"


def test_all_output_is_shown_before_the_run_returns(rig: Rig) -> None:
    def guest(vcpu: FakeVcpu) -> int:
        for _ in range(500):
            rig.output.write(b"0123456789")
        rig.runner.finish(Outcome(Kind.RESET))
        return vcpu.halt()

    rig.run(guest)
    assert os.read(rig.output_read, 10_000) == b"0123456789" * 500 == bytes(rig.observed)


def test_an_output_nobody_takes_does_not_hold_up_the_end(rig: Rig) -> None:
    def guest(vcpu: FakeVcpu) -> int:
        while True:  # fills the pipe, then the buffer, then waits
            rig.output.write(b"x" * 1000)
            if vcpu.kicked.is_set():
                raise InterruptedError

    rig.runner.finish_after(0.2, Outcome(Kind.TIMEOUT))
    started_s = time.monotonic()
    assert rig.run(guest).kind is Kind.TIMEOUT
    assert rig.runner.stopped
    assert time.monotonic() - started_s < patient(30)


def test_what_the_host_did_not_take_is_still_observed(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyvmm.console.output.DRAIN_TIMEOUT_S", 0.1)

    def guest(vcpu: FakeVcpu) -> int:
        rig.output.write(b"x" * (1 << 17) + b"Kernel panic\n")  # more than a pipe holds
        rig.runner.finish(Outcome(Kind.RESET))
        return vcpu.halt()

    rig.run(guest)
    assert rig.observed.endswith(b"Kernel panic\n")


def test_port_and_memory_accesses_reach_the_buses(rig: Rig) -> None:
    class Device:
        def __init__(self) -> None:
            self.seen: list[tuple[int, int, int]] = []

        def read(self, offset: int, size: int) -> int:
            return 0xAB

        def write(self, offset: int, size: int, value: int) -> None:
            self.seen.append((offset, size, value))

    port, page = Device(), Device()
    rig.pio.add(0x80, 4, port)
    rig.mmio.add(0x1000, 0x1000, page)
    union = abi.kvm_run.io.offset
    data = 4096

    def out_string(vcpu: FakeVcpu) -> int:
        vcpu.page.set_int(union, 16, 1 | 1 << 8 | 0x81 << 16 | 3 << 32 | data << 64)
        vcpu.page.set_int(data, 3, 0x636261)
        return int(ExitReason.IO)

    def in_byte(vcpu: FakeVcpu) -> int:
        vcpu.page.set_int(union, 16, 0 | 1 << 8 | 0x80 << 16 | 1 << 32 | data << 64)
        return int(ExitReason.IO)

    def store(vcpu: FakeVcpu) -> int:
        assert vcpu.page.get_int(data, 1) == 0xAB
        vcpu.page.set_int(union, 24, 0x1010 | 0xFFFF1234 << 64 | 2 << 128 | 1 << 160)
        return int(ExitReason.MMIO)

    def load(vcpu: FakeVcpu) -> int:
        vcpu.page.set_int(union, 24, 0x1010 | 4 << 128)
        return int(ExitReason.MMIO)

    def end(vcpu: FakeVcpu) -> int:
        assert vcpu.page.get_int(union + 8, 8) == 0xAB
        return int(ExitReason.HLT)

    script = iter((out_string, in_byte, store, load, end))
    assert rig.run(lambda vcpu: next(script)(vcpu)).kind is Kind.SHUTDOWN
    assert port.seen == [(1, 1, 0x61), (1, 1, 0x62), (1, 1, 0x63)]
    assert page.seen == [(0x10, 2, 0x1234)]


def test_output_that_nobody_takes_is_observed_all_the_same(rig: Rig) -> None:
    def observe(data: bytes) -> None:
        if b"panic" in data:
            rig.runner.finish(Outcome(Kind.PANIC))

    def guest(vcpu: FakeVcpu) -> int:
        rig.output.write(b"panic\n")
        return vcpu.halt()

    rig.output = OutputBuffer(None, rig.runner.wake, observe)
    assert rig.run(guest).kind is Kind.PANIC


def test_a_terminal_that_nobody_reads_does_not_keep_a_run_from_ending(rig: Rig) -> None:
    ours, theirs = os.openpty()

    def guest(vcpu: FakeVcpu) -> int:
        for _ in range(15):
            rig.output.write(b"x" * 4096)
        return vcpu.halt()

    rig.output = OutputBuffer(theirs, rig.runner.wake, rig.observed.extend)
    rig.runner.finish_after(0.3, Outcome(Kind.TIMEOUT))
    assert rig.run(guest).kind is Kind.TIMEOUT
    assert os.get_blocking(theirs)
    os.close(ours)
    os.close(theirs)


def test_a_doorbell_is_served_until_there_is_no_more_work(rig: Rig) -> None:
    doorbell = os.eventfd(0, os.EFD_NONBLOCK)
    left = [3]

    def service() -> float | None:
        left[0] -= 1
        if left[0] == 0:
            rig.runner.finish(Outcome(Kind.RESET))
            return None
        return 0.0

    os.eventfd_write(doorbell, 1)
    assert rig.run(idle, [("disk", [IoSource(doorbell, service)])]).kind is Kind.RESET
    assert left == [0]
    os.close(doorbell)


def test_a_busy_source_does_not_starve_another(rig: Rig) -> None:
    first, second = (os.eventfd(1, os.EFD_NONBLOCK) for _ in range(2))

    def endless() -> float | None:
        return 0.0

    def other() -> float | None:
        rig.runner.finish(Outcome(Kind.RESET))
        return None

    sources = [IoSource(first, endless), IoSource(second, other)]
    assert rig.run(idle, [("disk", sources)]).kind is Kind.RESET
    os.close(first)
    os.close(second)


def test_a_limited_source_is_called_again_in_time_and_holds_up_no_other(rig: Rig) -> None:
    limited, free = (os.eventfd(1, os.EFD_NONBLOCK) for _ in range(2))
    calls_s: list[float] = []
    served = [0]

    def slow() -> float | None:
        calls_s.append(time.monotonic())
        if len(calls_s) < 3:
            return 0.1
        rig.runner.finish(Outcome(Kind.RESET))
        return None

    def fast() -> float | None:
        served[0] += 1
        return 0.0

    sources = [IoSource(limited, slow), IoSource(free, fast)]
    assert rig.run(idle, [("disk", sources)]).kind is Kind.RESET
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(calls_s)]
    assert all(gap_s > 0.09 for gap_s in gaps_s)
    assert served[0] > 100
    os.close(limited)
    os.close(free)


def test_sigusr1_asks_for_a_look_at_the_disks(rig: Rig) -> None:
    def refresh() -> None:
        assert threading.current_thread() is threading.main_thread()
        rig.runner.finish(Outcome(Kind.RESET))

    rig.refresh = refresh
    timer = threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    timer.start()
    assert rig.run(idle).kind is Kind.RESET
    timer.join()
