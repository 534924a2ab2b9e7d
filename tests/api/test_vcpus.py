"""``VcpuHandle``: registers of a guest that does not run, on any /dev/kvm."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyvmm.api.bare import BareGuest, bare
from pyvmm.api.hooked_bus import Access
from pyvmm.api.vcpus import Registers, VcpuHandle
from pyvmm.errors import KvmError
from pyvmm.run.outcome import Kind
from tests.support.patience import patient

pytestmark = pytest.mark.bare

SPIN = bytes.fromhex("ebfe")  # jmp .
ADD = bytes.fromhex("01d8 f4")  # add %bx,%ax; hlt
LIMIT_S = 20.0


@pytest.fixture
def spinning() -> Iterator[BareGuest]:
    with bare(SPIN, timeout_s=patient(LIMIT_S)) as guest:
        yield guest


def test_registers_may_be_read_and_set_before_the_start_and_read_after_the_end() -> None:
    with bare(ADD) as guest:
        before = guest.registers
        assert (before.rip, before.cs, before.cs_base) == (0x1000, 0, 0)
        guest.set_registers(rax=40, rbx=2)
        assert guest.run().kind is Kind.SHUTDOWN
        after = guest.registers
        assert (after.rax, after.rbx, after.rip) == (42, 2, 0x1003)
        assert str(after).startswith("rax 0x2a rbx 0x2 ")
    with pytest.raises(RuntimeError, match="registers: the machine is closed"):
        _ = guest.registers


def test_registers_of_a_guest_that_runs_are_refused(spinning: BareGuest) -> None:
    spinning.start()
    with pytest.raises(RuntimeError, match="registers: the guest runs; pause the machine first"):
        _ = spinning.registers
    with pytest.raises(RuntimeError, match=r"set_registers\(\): the guest runs"):
        spinning.set_registers(rax=1)


def test_a_paused_guest_goes_on_with_the_registers_it_was_given() -> None:
    # jmp .; mov %bl,%al; out %al,$0x80; hlt
    with bare(bytes.fromhex("ebfe 88d8 e680 f4"), timeout_s=patient(LIMIT_S)) as guest:
        seen: list[int | None] = []
        guest.on_port(0x80, lambda access: seen.append(access.value))
        guest.start()
        assert guest.pause(patient(LIMIT_S))
        assert guest.registers.rip == 0x1000
        guest.set_registers(rip=0x1002, rbx=0x55)
        guest.resume()
        outcome = guest.wait(patient(LIMIT_S))
    assert outcome is not None
    assert outcome.kind is Kind.SHUTDOWN
    assert seen == [0x55]


def test_a_hook_may_read_the_registers_of_the_vcpu_that_it_watches() -> None:
    seen: list[Registers] = []

    def hook(access: Access) -> None:
        seen.append(guest.registers)
        with pytest.raises(RuntimeError, match="the guest runs"):
            guest.set_registers(rax=1)

    with bare(bytes.fromhex("bb3412 e680 f4"), timeout_s=patient(LIMIT_S)) as guest:
        guest.on_port(0x80, hook)
        outcome = guest.run()
    assert outcome.kind is Kind.SHUTDOWN, outcome
    assert [registers.rbx for registers in seen] == [0x1234]


def test_segments_and_control_registers_are_set_as_they_are_given(spinning: BareGuest) -> None:
    spinning.set_registers(ds=0x123, ds_base=0x1230, cr2=0xABCD, rsp=0x800)
    registers = spinning.registers
    assert (registers.ds, registers.ds_base, registers.cr2) == (0x123, 0x1230, 0xABCD)
    assert registers.rsp == 0x800
    assert registers == spinning.registers


def test_a_long_mode_guest_has_the_registers_of_long_mode() -> None:
    with bare(SPIN, bits=64) as guest:
        registers = guest.registers
        assert registers.rip == 0x100000
        assert registers.efer & 0x500 == 0x500
        assert registers.cr0 >> 31 == 1
        assert VcpuHandle(guest.loops[0], guest.runner).index == 0


def test_mistakes_are_one_clear_error_each(spinning: BareGuest) -> None:
    before = spinning.registers
    with pytest.raises(TypeError, match="set_registers knows no eax; it knows rax, rbx"):
        spinning.set_registers(rbx=1, eax=1)
    with pytest.raises(TypeError, match="rax is a str, not an int"):
        spinning.set_registers(rax="1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rax 0x10000000000000000 does not fit into 64 bits"):
        spinning.set_registers(rbx=1, rax=1 << 64)
    with pytest.raises(ValueError, match="cs 0x10000 does not fit into 16 bits"):
        spinning.set_registers(cs=0x10000)
    with pytest.raises(ValueError, match="does not fit"):
        spinning.set_registers(rip=-1)
    assert spinning.registers == before
    with pytest.raises(KvmError, match="KVM_SET_SREGS"):
        spinning.set_registers(cr4=1 << 63)
