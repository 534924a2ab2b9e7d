"""Time in a guest that was saved and restored: its TSCs, of one vCPU and of several."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pyvmm.config import RunConfig
from pyvmm.kvm import abi, state_abi, tsc
from pyvmm.kvm.ioctl import ioctl
from pyvmm.machine import Machine
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.x86 import cpu, layout
from tests.support.bare import LONG_MODE_ENTRY, assemble
from tests.support.disk_guest import built, read_memory, write_memory
from tests.support.kernels import ElfSegment, elf
from tests.support.patience import patient

pytestmark = pytest.mark.bare

BACKWARDS, WORST, LAST, COUNTS = 0x3008, 0x3010, 0x3018, 0x3040
"""GPAs of the counters of guest/bare/compare_tscs.S."""
STOPPED = Outcome(Kind.STOPPED)
READS = 1000
WAIT_S = 30.0
GONE_S = 2.0
SLACK_S = 1.5
"""Between the last read and the save, and between the restore and the next read."""


def comparing(folder: Path, cpus: int) -> RunConfig:
    code = assemble("compare_tscs", LONG_MODE_ENTRY, folder)
    kernel = folder / "compare_tscs.elf"
    kernel.write_bytes(elf(ElfSegment(data=code, p_memsz=len(code))))
    return RunConfig(
        kernel=kernel, memory_bytes=16 << 20, cpus=cpus, console=str(folder / "console"),
        timeout_s=patient(4 * WAIT_S),
    )


def started(machine: Machine) -> None:
    """Start ``machine``, all of its vCPUs in 64-bit mode at the same place."""
    for loop in machine.loops[1:]:
        cpu.setup_long_mode(
            machine.board.memory, loop.vcpu, LONG_MODE_ENTRY, layout.BOOT_PARAMS
        )
        runnable = abi.kvm_mp_state(mp_state=abi.KVM_MP_STATE_RUNNABLE)
        ioctl(loop.vcpu.fd, state_abi.KVM_SET_MP_STATE, runnable)
    machine.start()


def reads(machine: Machine) -> list[int]:
    """How often each vCPU has read its TSC."""
    memory = machine.board.memory
    return [memory.read_int(COUNTS + 4 * index, 4) for index in range(len(machine.loops))]


def wait_for_reads(machine: Machine, more: int) -> None:
    """Wait until each vCPU has read its TSC ``more`` times more."""
    before, until_s = reads(machine), time.monotonic() + patient(WAIT_S)
    while any(now < then + more for now, then in zip(reads(machine), before, strict=True)):
        assert time.monotonic() < until_s, (before, reads(machine))
        assert machine.wait(0.001) is None


def steps_back(machine: Machine) -> tuple[int, int]:
    """How often a TSC was less than the one that was read before it, and by how much at most."""
    memory = machine.board.memory
    return memory.read_int(BACKWARDS, 4), memory.read_int(WORST, 8)


def last_tsc(machine: Machine) -> int:
    return machine.board.memory.read_int(LAST, 8)


def has_tsc_of_its_own(machine: Machine) -> bool:
    """False on a KVM that shows every guest the host's TSC (kvm-pvm): nothing can be set there."""
    vcpu = machine.loops[0].vcpu
    before = vcpu.get_msrs([tsc.TSC])[tsc.TSC]
    vcpu.set_msrs({tsc.TSC: before + (1 << 50)})
    return vcpu.get_msrs([tsc.TSC])[tsc.TSC] >= before + (1 << 50)


def stop_and_save(machine: Machine) -> tuple[dict[str, object], list[bytes]]:
    assert machine.quiesce(patient(WAIT_S))
    state, memory = machine.save(), read_memory(machine)
    assert machine.stop(STOPPED) == STOPPED
    return state, memory


@pytest.mark.parametrize("cpus", [1, 2, 4, 8])
def test_tscs_never_go_backwards_between_vcpus_after_a_restore(tmp_path: Path, cpus: int) -> None:
    config = comparing(tmp_path, cpus)
    with built(config) as machine:
        started(machine)
        wait_for_reads(machine, READS)
        state, memory = stop_and_save(machine)
        before = steps_back(machine)
    for clock in ("keep", "now", "keep", "now"):  # again and again: small mistakes would add up
        with built(config) as machine:
            write_memory(machine, memory)
            machine.restore(state, clock=clock)
            offsets = [tsc.offset_of(loop.vcpu) for loop in machine.loops]
            assert len(set(offsets)) == 1
            machine.start()
            wait_for_reads(machine, READS)
            state, memory = stop_and_save(machine)
            assert steps_back(machine) == before


def test_vcpus_whose_tscs_differ_differ_as_much_afterwards(tmp_path: Path) -> None:
    """A guest may set each vCPU's on its own."""
    config = comparing(tmp_path, 2)
    with built(config) as machine:
        can_be_set = has_tsc_of_its_own(machine)
    if not can_be_set:
        pytest.skip("this KVM shows every guest the host's TSC")
    with built(config) as machine:
        first, second = (loop.vcpu for loop in machine.loops)
        second.set_msrs({tsc.TSC: second.get_msrs([tsc.TSC])[tsc.TSC] + (1 << 45)})
        between = offset_between(machine)
        state = machine.save()
        assert first.get_msrs([tsc.TSC])[tsc.TSC] < second.get_msrs([tsc.TSC])[tsc.TSC]
    with built(config) as machine:
        machine.restore(state)
        assert offset_between(machine) == between


def offset_between(machine: Machine) -> int:
    """Return by how much the second vCPU's TSC is ahead of the first one's."""
    first, second = (tsc.offset_of(loop.vcpu) for loop in machine.loops)
    assert first is not None
    assert second is not None
    return second - first


@pytest.mark.parametrize("clock", ["keep", "now"])
def test_the_tsc_goes_on_from_the_save_or_from_now(tmp_path: Path, clock: str) -> None:
    config = comparing(tmp_path, 2)
    with built(config) as machine:
        started(machine)
        wait_for_reads(machine, READS)
        state, memory = stop_and_save(machine)
        before = last_tsc(machine)
    saved_ns = time.monotonic_ns()
    time.sleep(GONE_S)
    with built(config) as machine:
        can_be_set = has_tsc_of_its_own(machine)
    with built(config) as machine:
        write_memory(machine, memory)
        machine.restore(state, clock=clock)
        vcpu = machine.loops[0].vcpu
        after = vcpu.get_msrs([tsc.TSC])[tsc.TSC]
        gone_s = (time.monotonic_ns() - saved_ns) / 1e9
        (khz,) = {vcpu["tsc_khz"] for vcpu in state["vcpus"].values()}  # type: ignore[attr-defined]
        seconds = (after - before) / (1000 * khz)
        assert seconds >= 0
        if clock == "now" or not can_be_set:
            assert GONE_S <= seconds < gone_s + SLACK_S
        else:
            assert seconds < SLACK_S


@pytest.mark.parametrize("clock", ["keep", "now"])
def test_the_tsc_and_kvm_clock_agree_as_before(tmp_path: Path, clock: str) -> None:
    """Linux gives up a TSC that is a millisecond off."""
    config = comparing(tmp_path, 2)
    with built(config) as machine:
        can_be_set = has_tsc_of_its_own(machine)
    if not can_be_set:
        pytest.skip("this KVM shows every guest the host's TSC")
    with built(config) as machine:
        state = machine.save()
    for _ in range(3):
        with built(config) as machine:
            machine.restore(state, clock=clock)
            saved_ns, saved_tsc = state["clock_ns"], state["tsc"]
            assert isinstance(saved_ns, int)
            assert isinstance(saved_tsc, int)
            apart = tsc.lag(machine.vm, machine.loops[0].vcpu, (saved_ns, saved_tsc))
            khz = ioctl(machine.loops[0].vcpu.fd, state_abi.KVM_GET_TSC_KHZ)
            assert abs(apart) < khz / 2, "half a millisecond"
            state = machine.save()
