"""``bare``: a few instructions, their ports, memory and end, on any /dev/kvm."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from pyvmm.api.bare import BareGuest, bare
from pyvmm.api.hook_calls import REFUSE
from pyvmm.api.hooked_bus import Access
from pyvmm.errors import ConfigError
from pyvmm.kvm.exits import Exit, HltExit, IoExit, MmioExit
from pyvmm.run.outcome import Kind
from pyvmm.run.signals import KICK_SIGNAL
from pyvmm.run.vcpu_loop import Exits
from tests.support.patience import patient

LIMIT_S = 20.0
HLT = bytes.fromhex("f4")
SPIN = bytes.fromhex("ebfe")
UD2 = bytes.fromhex("0f0b")
ECHO = bytes.fromhex(
    "e460"  # in $0x60,%al
    "fec0"  # inc %al
    "e661"  # out %al,$0x61
    "f4"    # hlt
)  # fmt: skip
STORE_64 = bytes.fromhex(
    "b8000000d0"  # mov $0xd0000000,%eax
    "8b18"        # mov (%rax),%ebx
    "ffc3"        # inc %ebx
    "895804"      # mov %ebx,4(%rax)
    "891c2500004000"  # mov %ebx,0x400000
    "f4"          # hlt
)  # fmt: skip

bare_kvm = pytest.mark.bare


@bare_kvm
@pytest.mark.parametrize("bits", [16, 64])
def test_a_guest_talks_through_ports_and_halts(bits: int) -> None:
    written: list[Access] = []
    with bare(ECHO, bits=bits, timeout_s=patient(LIMIT_S)) as guest:
        guest.on_port(0x60, lambda access: 0x41)
        guest.on_port(0x61, written.append)
        outcome = guest.run()
        assert (outcome.kind, outcome.detail) == (Kind.SHUTDOWN, "halted")
        assert guest.exits == Exits(io=2, other=1)
    assert written == [Access(address=0x61, size=1, is_write=True, value=0x42, vcpu=0)]


@bare_kvm
def test_a_guest_reads_all_ones_where_nobody_is() -> None:
    written: list[int | None] = []
    with bare(ECHO, timeout_s=patient(LIMIT_S)) as guest:
        guest.on_port(0x61, lambda access: written.append(access.value))
        assert guest.run().kind is Kind.SHUTDOWN
    assert written == [0x00]


@bare_kvm
def test_a_long_mode_guest_has_memory_and_addresses_without() -> None:
    seen: list[tuple[int, int | None]] = []

    def hook(access: Access) -> int | None:
        seen.append((access.address, access.value))
        return None if access.is_write else 0x1234

    with bare(STORE_64, bits=64, memory="8M", timeout_s=patient(LIMIT_S)) as guest:
        guest.on_mmio(range(0xD000_0000, 0xD000_0008), hook)
        guest.memory.write(0x400000, b"\xff" * 4)
        assert guest.run().kind is Kind.SHUTDOWN
        assert guest.memory.read(0x400000, 4) == (0x1235).to_bytes(4, "little")
        assert guest.memory.size_bytes == 8 << 20
    assert seen == [(0xD000_0000, None), (0xD000_0004, 0x1235)]


@bare_kvm
def test_an_exit_hook_sees_and_answers_all_of_it() -> None:
    seen: list[Exit] = []

    def hook(vcpu: int, left: Exit) -> object:
        seen.append(left)
        if isinstance(left, IoExit) and not left.data:
            return 0x10
        return REFUSE if isinstance(left, IoExit) else None

    with bare(ECHO, timeout_s=patient(LIMIT_S)) as guest:
        guest.on_exit(hook)  # type: ignore[arg-type]
        guest.on_port(0x61, lambda access: 1 / 0)  # type: ignore[arg-type,return-value]
        assert guest.run().kind is Kind.SHUTDOWN
        assert guest.registers.rax == 0x11
        assert guest.exits == Exits(io=2, other=1)
    assert [type(left) for left in seen] == [IoExit, IoExit, HltExit]
    assert isinstance(seen[1], IoExit)
    assert seen[1].data == b"\x11"


@bare_kvm
def test_an_exit_hook_answers_and_replaces_memory_accesses() -> None:
    written: list[int | None] = []

    def hook(vcpu: int, left: Exit) -> int | None:
        if isinstance(left, MmioExit):
            return 0x99 if left.is_write else 6
        return None

    with bare(STORE_64, bits=64, memory="8M", timeout_s=patient(LIMIT_S)) as guest:
        guest.on_exit(hook)
        guest.on_mmio(0xD000_0004, lambda access: written.append(access.value))
        assert guest.run().kind is Kind.SHUTDOWN
        assert guest.memory.read(0x400000, 4) == b"\x07\0\0\0"
        assert guest.exits == Exits(mmio=2, other=1)
    assert written == [0x99]


@bare_kvm
@pytest.mark.parametrize("bits", [16, 64])
def test_a_guest_that_never_ends_is_ended_and_shows_its_registers(bits: int) -> None:
    with bare(SPIN, bits=bits, timeout_s=0.1) as guest:
        outcome = guest.run()
    assert outcome.kind is Kind.TIMEOUT
    assert outcome.detail.startswith("after 0.1 s\nrip 0x")
    assert "code eb fe" in outcome.detail


@bare_kvm
def test_a_triple_fault_shows_the_registers() -> None:
    with bare(UD2, bits=64, timeout_s=patient(LIMIT_S)) as guest:
        outcome = guest.run()
    assert outcome.kind is Kind.TRIPLE_FAULT
    assert "code 0f 0b" in outcome.detail


@bare_kvm
def test_code_where_there_is_no_memory_ends_the_run_with_the_registers() -> None:
    with bare(bytes.fromhex("b8000000c0 ffe0"), bits=64, timeout_s=patient(LIMIT_S)) as guest:
        outcome = guest.run()  # jmp *%rax
    assert outcome.kind is Kind.INTERNAL_ERROR
    assert "rip 0x00000000c0000000" in outcome.detail


@bare_kvm
def test_a_guest_is_started_paused_resumed_and_stopped_from_another_thread() -> None:
    # 1: out %al,$0x80; inc %ax; jmp 1b
    with bare(bytes.fromhex("e680 40 ebfb"), timeout_s=patient(LIMIT_S)) as guest:
        seen: list[int | None] = []
        guest.on_port(0x80, lambda access: seen.append(access.value))
        guest.start()
        assert guest.wait(0.01) is None
        assert guest.pause(patient(LIMIT_S))
        count = len(seen)
        time.sleep(0.05)
        assert len(seen) == count
        guest.resume()
        until_s = time.monotonic() + patient(LIMIT_S)
        while len(seen) == count and time.monotonic() < until_s:
            time.sleep(0.01)
        outcome = guest.stop()
        assert outcome is not None
        assert outcome.kind is Kind.STOPPED
        assert guest.wait() == outcome
    assert len(seen) > count
    assert seen[:3] == [0, 1, 2]


@bare_kvm
def test_hooks_may_come_while_the_guest_runs() -> None:
    with bare(bytes.fromhex("e460 3c07 75fa f4"), timeout_s=patient(LIMIT_S)) as guest:
        guest.start()  # 1: in $0x60,%al; cmp $7,%al; jne 1b; hlt
        assert guest.wait(0.05) is None
        guest.on_port(0x60, lambda access: 7)
        outcome = guest.wait(patient(LIMIT_S))
        assert outcome is not None
        assert outcome.kind is Kind.SHUTDOWN
        with pytest.raises(RuntimeError, match=r"on_exit\(\) comes before the start"):
            guest.on_exit(lambda vcpu, left: None)


@bare_kvm
@pytest.mark.parametrize("call", ["wait", "pause", "stop", "close"])
def test_a_hook_that_would_wait_for_itself_is_told_so(call: str) -> None:
    with bare(ECHO, timeout_s=patient(LIMIT_S)) as guest:
        told: list[str] = []

        def hook(access: Access) -> None:
            try:
                getattr(guest, call)()
            except RuntimeError as error:
                told.append(str(error))

        guest.on_port(0x60, hook)
        assert guest.run().kind is Kind.SHUTDOWN
    assert len(told) == 1
    assert "in a thread of the run would wait for ever" in told[0]


@bare_kvm
def test_a_hook_that_raises_ends_the_run() -> None:
    def hook(access: Access) -> None:
        raise LookupError("not here")

    with bare(SPIN + ECHO, address=0x1000, timeout_s=patient(LIMIT_S)) as guest:
        guest.set_registers(rip=0x1002)
        guest.on_port(0x60, hook)
        outcome = guest.run()
    assert outcome.kind is Kind.HOST_ERROR
    assert "the on_port hook test_a_hook_that_raises_ends_the_run.<locals>.hook (" in outcome.detail
    assert "LookupError: not here" in outcome.detail


@bare_kvm
def test_a_guest_runs_once_and_not_after_close() -> None:
    with bare(HLT) as guest:
        assert guest.stop() is None
        with pytest.raises(RuntimeError, match=r"wait\(\): the guest was not started"):
            guest.wait()
    for call in (
        guest.run, guest.start, guest.pause, guest.resume,
        lambda: guest.on_port(0, lambda access: None),
        lambda: guest.on_mmio(1 << 31, lambda access: None),
        lambda: guest.on_exit(lambda vcpu, left: None),
    ):
        with pytest.raises(RuntimeError, match="guest was closed"):
            call()
    guest.close()
    with bare(HLT, timeout_s=patient(LIMIT_S)) as guest:
        guest.run()
        for call in (guest.run, guest.start):
            with pytest.raises(RuntimeError, match="a bare guest runs once"):
                call()


def in_turn(guests: list[BareGuest]) -> None:
    for guest in guests:
        guest.run()
        guest.close()


@bare_kvm
def test_many_guests_of_several_threads_leave_nothing_behind() -> None:
    def open_fds() -> int:
        return len(os.listdir("/proc/self/fd"))

    with bare(HLT) as guest:  # whatever the first one loads for good
        guest.run()
    fds, threads, handler = open_fds(), threading.active_count(), signal.getsignal(KICK_SIGNAL)
    for _ in range(20):
        guests = [bare(HLT, timeout_s=patient(LIMIT_S)) for _ in range(6)]
        workers = [
            threading.Thread(target=in_turn, args=(guests[start::2],)) for start in range(2)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert (open_fds(), threading.active_count()) == (fds, threads)
    assert signal.getsignal(KICK_SIGNAL) == handler


@bare_kvm
def test_leaving_a_guest_that_runs_stops_it() -> None:
    with bare(SPIN, timeout_s=None) as guest:
        guest.start()
    assert guest.runner.stopped
    with pytest.raises(RuntimeError, match="closed"):
        guest.memory.read(0, 1)


@pytest.mark.parametrize(("make", "problem"), [
    (lambda: bare(HLT, bits=8), r"bare\(bits=8\): is no mode; it takes 16 or 64"),
    (lambda: bare(b""), r"bare\(code\): is empty"),
    (lambda: bare(HLT, memory="lots"), r"bare\(memory='lots'\): takes bytes or a size as 2M"),
    (lambda: bare(HLT, memory=4097), "whole pages of 4096 bytes, from 4K to 3G"),
    (lambda: bare(HLT, memory="4G"), "from 4K to 3G"),
    (lambda: bare(HLT, memory=0), "from 4K to 3G"),
    (lambda: bare(HLT, memory="-1M"), "takes bytes or a size"),
    (lambda: bare(HLT, memory=True), "takes bytes or a size"),
    (lambda: bare(HLT, address=0x10000), r"16-bit code lies in RAM from 0x0 to 0x10000"),
    (lambda: bare(HLT, address=-1), "leaves no room"),
    (lambda: bare(HLT, memory=4096), "leaves no room for 1 bytes of code"),
    (lambda: bare(HLT, bits=64, address=0x9000), "64-bit code lies in RAM from 0x20000 to"),
    (lambda: bare(HLT, bits=64, memory="64K"), "leaves no room"),
    (lambda: bare(HLT, timeout_s=0), "takes seconds, more than 0 and up to 86400, or None"),
    (lambda: bare(HLT, timeout_s=float("nan")), "takes seconds"),
])
def test_what_cannot_be_is_refused(make: Callable[[], BareGuest], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        make()


def test_code_is_bytes_and_an_address_an_int() -> None:
    with pytest.raises(TypeError, match="machine code as bytes, not str"):
        bare("hlt")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the address is a str, not an int"):
        bare(HLT, address="0x1000")  # type: ignore[arg-type]
