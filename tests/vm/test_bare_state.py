"""A guest saved half-way goes on in another VM; every part of KVM's is compared."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.board.polled_uart import PolledUart
from pyvmm.devices.rtc import Rtc
from pyvmm.devices.serial import Register, Serial
from pyvmm.errors import HostError, StateError
from pyvmm.kvm import abi
from pyvmm.kvm.exits import Direction, ExitReason
from pyvmm.kvm.handles import Kvm
from pyvmm.x86 import cpuid
from pyvmm.x86.trial import deadline
from tests.support.bare import (
    LONG_MODE_ENTRY,
    MEMORY_BYTES,
    BareMachine,
    assemble,
    bare_machine,
)
from tests.support.kvm_states import comparable_chips, comparable_vcpu
from tests.support.patience import patient
from tests.support.states import Part, is_plain, spoilt

pytestmark = pytest.mark.bare

TSC, TSC_DEADLINE, SYSTEM_TIME = 0x10, 0x6E0, 0x4B56_4D01
MTRR_DEF_TYPE = 0x2FF
TRACES = [0x5F80, 0x89AB_CDEF, 0x5566_7788, 0x12_3456]
"""MXCSR, ST0, XMM7 and DR0, as guest/bare/state.S set them."""
TRACES_OF_CHIPS = [0xCD, 0x20, 0x1_0033]
"""The second PIC's mask, the local APIC's task priority, the IOAPIC's entry."""


def _start(machine: BareMachine, folder: Path, *, chips: bool) -> None:
    code = assemble("state", LONG_MODE_ENTRY, folder)
    machine.load(code[:-4] + chips.to_bytes(4, "little"), LONG_MODE_ENTRY)


def _run(machine: BareMachine, answers: list[int]) -> list[int]:
    """Answer reads of port 0x80, then interrupt KVM_RUN as a pause does; the values written."""
    vcpu, page, left = machine.vcpu, machine.vcpu.page, list(answers)
    written: list[int] = []
    with deadline(vcpu, patient(20)):
        while True:
            assert vcpu.run() == ExitReason.IO, machine.describe()
            direction, size, port, _, offset = page.io()
            if direction == Direction.OUT:
                if port == 0xF4:
                    return written
                written.append(page.get_int(offset, size))
                continue
            assert port == 0x80
            page.set_int(offset, size, left.pop(0))
            if not left:
                break
    vcpu.request_exit()
    with pytest.raises(InterruptedError):
        vcpu.run()
    vcpu.clear_exit_request()
    return written


def _finish(machine: BareMachine) -> list[int]:
    """Have the guest count to the end; what it reports."""
    written: list[int] = []
    vcpu, page = machine.vcpu, machine.vcpu.page
    answers = [0, 0, 1]
    with deadline(vcpu, patient(20)):
        while True:
            assert vcpu.run() == ExitReason.IO, machine.describe()
            direction, size, port, _, offset = page.io()
            if direction == Direction.IN:
                page.set_int(offset, size, answers.pop(0))
            elif port == 0xF4:
                return written
            else:
                written.append(page.get_int(offset, size))


def _copy_memory(source: BareMachine, target: BareMachine) -> None:
    target.memory.write(0, source.memory.read(0, MEMORY_BYTES))


def _msrs(state: dict[str, object]) -> dict[int, int]:
    msrs = state["msrs"]
    assert isinstance(msrs, list)
    return dict(msrs)


@pytest.mark.parametrize("chips", [True, False], ids=["chips", "no_chips"])
def test_a_guest_goes_on_in_another_vm_where_it_was(tmp_path: Path, chips: bool) -> None:
    with bare_machine(chips=chips) as first, bare_machine(chips=chips) as second:
        _start(first, tmp_path, chips=chips)
        _run(first, [0] * 100)
        vcpu, vm = first.vcpu.save(), first.vm.save()
        assert is_plain(vcpu)
        assert is_plain(vm)
        _copy_memory(first, second)
        second.vcpu.restore(vcpu)
        second.vm.restore(vm)

        vcpu2, vm2 = second.vcpu.save(), second.vm.save()
        assert comparable_vcpu(vcpu2) == comparable_vcpu(vcpu)
        assert comparable_chips(vm2) == comparable_chips(vm)
        assert _msrs(vcpu2)[TSC] >= _msrs(vcpu)[TSC]
        assert _msrs(vcpu)[MTRR_DEF_TYPE] != 0
        if chips:
            assert _msrs(vcpu2)[TSC_DEADLINE] == _msrs(vcpu)[TSC_DEADLINE] != 0
        else:
            assert (vm["ioapic"], vm["pit2"], vcpu["lapic"]) == (None, None, None)

        expected = [103, *TRACES, *(TRACES_OF_CHIPS if chips else [])]
        assert _finish(second) == expected, "another VM"
        assert _finish(first) == expected, "the original, which nothing was taken from"


def test_a_vcpu_that_waits_for_sipi_still_does(tmp_path: Path) -> None:
    with bare_machine(chips=True) as first, bare_machine(chips=True) as second, Kvm() as kvm:
        _start(first, tmp_path, chips=True)
        with first.vm.create_vcpu(1) as waits, second.vm.create_vcpu(1) as fresh:
            for vcpu in (waits, fresh):
                vcpu.set_cpuid(cpuid.build(
                    kvm.supported_cpuid(), cpuid.CpuModel(), 1, vcpu_count=2, tsc_deadline=True
                ))
            state = waits.save()
            assert state["mp_state"] == abi.KVM_MP_STATE_UNINITIALIZED
            fresh.set_regs(abi.kvm_regs(rip=0x1000, rflags=2))
            fresh.restore(state)
            assert comparable_vcpu(fresh.save()) == comparable_vcpu(state)
            with pytest.raises(StateError, match=r"^vcpu1: mp_state is not an integer of 0 to 4"):
                fresh.restore(state | {"mp_state": 5})


def test_the_tscs_of_all_vcpus_go_on_together(tmp_path: Path) -> None:
    with bare_machine(chips=True) as first, bare_machine(chips=True) as second:
        _start(first, tmp_path, chips=True)
        with first.vm.create_vcpu(1) as other, second.vm.create_vcpu(1) as fresh:
            states = [first.vcpu.save(), other.save()]
            for vcpu, state in zip((second.vcpu, fresh), states, strict=True):
                vcpu.restore(state)
            for _ in range(10):
                before, between, after = (
                    vcpu.get_msrs([TSC])[TSC] for vcpu in (second.vcpu, fresh, second.vcpu)
                )
                assert _msrs(states[0])[TSC] <= before <= between <= after


def test_kvm_clock_goes_on_from_the_save(tmp_path: Path) -> None:
    with bare_machine(chips=True) as first, bare_machine(chips=True) as second:
        _start(first, tmp_path, chips=True)
        state = first.vm.save()
        clock = state["clock"]
        assert isinstance(clock, bytes)
        saved_ns = int.from_bytes(clock[:8], "little")
        later = (saved_ns + 10**15).to_bytes(8, "little") + clock[8:]
        second.vm.restore(state | {"clock": later})
        restored = second.vm.save()["clock"]
        assert isinstance(restored, bytes)
        now_ns = int.from_bytes(restored[:8], "little")
        assert 10**15 <= now_ns - saved_ns < 10**15 + patient(60) * 10**9


def test_the_chips_on_the_buses_come_along_with_the_vcpu(tmp_path: Path) -> None:
    with bare_machine(chips=True) as first, bare_machine(chips=True) as second:
        _start(first, tmp_path, chips=True)
        lines: list[bool] = []

        def devices(machine: BareMachine) -> tuple[Serial, PolledUart, Rtc]:
            def set_irq(level: bool) -> None:
                lines.append(level)
                machine.vm.irq_line(4, level)

            serial = Serial(lambda data: None, set_irq)
            uart = PolledUart(
                serial, ring=None, gather=lambda on: None, begin=lambda: None
            )
            return serial, uart, Rtc()

        serial, uart, rtc = devices(first)
        uart.write(Register.IER, 1, 1)
        assert serial.receive(b"typed") == 5
        _run(first, [0] * 3)
        old: list[Part] = [first.vcpu, first.vm, uart, rtc]
        states = [part.save() for part in old]
        new_serial, new_uart, new_rtc = devices(second)
        _copy_memory(first, second)
        lines.clear()
        new: list[Part] = [second.vcpu, second.vm, new_uart, new_rtc]
        for part, state in zip(new, states, strict=True):
            part.restore(state)
        assert lines == []
        new_serial.drive_line()
        assert lines == [True]
        assert [part.save() for part in (new_uart, new_rtc)] == states[2:]
        assert _finish(second)[0] == 6
        assert new_uart.read(Register.DATA, 1) == ord("t")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, object], dict[str, object]]:
    """The states of a vCPU and of the chips."""
    with bare_machine(chips=True) as machine:
        _start(machine, tmp_path_factory.mktemp("state"), chips=True)
        _run(machine, [0] * 3)
        return machine.vcpu.save(), machine.vm.save()


@pytest.fixture(scope="module")
def target() -> Iterator[BareMachine]:
    """A machine that takes one bad state after the other."""
    with bare_machine(chips=True) as machine:
        yield machine


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_junk_is_a_state_error(
    saved: tuple[dict[str, object], dict[str, object]], target: BareMachine, data: st.DataObject
) -> None:
    with contextlib.suppress(StateError):
        target.vcpu.restore(data.draw(spoilt(saved[0])))
    with contextlib.suppress(StateError):
        target.vm.restore(data.draw(spoilt(saved[1])))


CHANGES = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=8)
VCPU_BYTES = ("regs", "sregs", "sregs2", "xsave", "xcrs", "debugregs", "lapic", "events")
CHIP_BYTES = ("pic_master", "pic_slave", "ioapic", "pit2", "clock")


def _with_other_bytes(
    state: dict[str, object], name: str, changes: list[tuple[int, int]]
) -> dict[str, object]:
    """``state`` with some bytes of the structure ``name`` changed, if it has that one."""
    old = state[name]
    if not isinstance(old, bytes):
        return state
    content = bytearray(old)
    for at, value in changes:
        content[at % len(content)] = value
    return state | {name: bytes(content)}


@given(
    vcpu=st.tuples(st.sampled_from(VCPU_BYTES), CHANGES),
    chips=st.tuples(st.sampled_from(CHIP_BYTES), CHANGES),
)
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_bytes_that_kvm_refuses_are_a_state_error(
    saved: tuple[dict[str, object], dict[str, object]], target: BareMachine,
    vcpu: tuple[str, list[tuple[int, int]]], chips: tuple[str, list[tuple[int, int]]],
) -> None:
    """Each structure's size is right, and its content is not what KVM wrote."""
    with contextlib.suppress(StateError):
        target.vcpu.restore(_with_other_bytes(saved[0], *vcpu))
    with contextlib.suppress(StateError):
        target.vm.restore(_with_other_bytes(saved[1], *chips))


def test_a_refusal_names_the_part_the_field_and_kvms_reason(
    saved: tuple[dict[str, object], dict[str, object]], target: BareMachine
) -> None:
    vcpu, vm = saved
    with pytest.raises(StateError, match=r"^vcpu0: msrs is refused by KVM: MSR 0xbad$"):
        target.vcpu.restore(vcpu | {"msrs": [[0xBAD, 1]]})
    with pytest.raises(StateError, match=r"^vcpu0: regs is not 144 bytes"):
        target.vcpu.restore(vcpu | {"regs": b""})
    with pytest.raises(StateError, match=r"^vcpu0: sregs and sregs2: exactly one must be there"):
        target.vcpu.restore(vcpu | {"sregs": None, "sregs2": None})
    with pytest.raises(StateError, match=r"^vcpu0: xcrs is refused by KVM: KVM_SET_XCRS"):
        target.vcpu.restore(vcpu | {"xcrs": b"\xff" * 392})
    with pytest.raises(StateError, match=r"^chips: ioapic is another chip than number 2"):
        target.vm.restore(vm | {"ioapic": vm["pic_slave"]})


def test_a_vcpu_whose_kvm_is_closed_is_not_saved() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        kvm.close()
        before = os.listdir("/proc/self/fd")
        with pytest.raises(HostError, match="only while the /dev/kvm that made it is open"):
            vcpu.save()
        assert os.listdir("/proc/self/fd") == before
