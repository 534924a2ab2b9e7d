"""The run page and typed exits, on a bytearray: no KVM needed."""

from __future__ import annotations

import ctypes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.kvm import abi
from pyvmm.kvm.exits import (
    Direction,
    ExitReason,
    FailEntryExit,
    HltExit,
    InternalErrorExit,
    IoExit,
    MmioExit,
    RunPage,
    ShutdownExit,
    SystemEventExit,
    UnknownExit,
    decode,
)

PAGE_BYTES = 8192


def _page(reason: int) -> tuple[RunPage, abi.kvm_run]:
    """A run page, and the same bytes as the kernel's structure."""
    buffer = bytearray(PAGE_BYTES)
    run = abi.kvm_run.from_buffer(buffer)
    run.exit_reason = reason
    return RunPage(buffer), run


def test_io_is_read_where_the_kernel_puts_it() -> None:
    page, run = _page(ExitReason.IO)
    run.io.direction, run.io.size, run.io.port, run.io.count = 1, 2, 0x3F8, 3
    run.io.data_offset = 4096
    page.set_int(4096, 6, 0x636261)
    assert page.io() == (Direction.OUT, 2, 0x3F8, 3, 4096)
    assert decode(page) == IoExit(Direction.OUT, 2, 0x3F8, 3, 4096, b"abc\0\0\0")
    run.io.direction = 0
    assert decode(page) == IoExit(Direction.IN, 2, 0x3F8, 3, 4096)


def test_mmio_is_read_where_the_kernel_puts_it() -> None:
    page, run = _page(ExitReason.MMIO)
    run.mmio.phys_addr, run.mmio.len, run.mmio.is_write = 0xD000_0050, 4, 1
    run.mmio.data[:] = bytes(range(1, 9))
    assert page.mmio() == (0xD000_0050, 0x0807_0605_0403_0201, 4, 1)
    assert decode(page) == MmioExit(0xD000_0050, 4, True, b"\x01\x02\x03\x04")


@pytest.mark.parametrize("value", [0, 0x7472_6976, (1 << 64) - 1, -1, 1 << 70])
def test_an_mmio_answer_lands_in_the_data_bytes(value: int) -> None:
    page, run = _page(ExitReason.MMIO)
    page.set_mmio_data(value)
    assert bytes(run.mmio.data) == (value & ((1 << 64) - 1)).to_bytes(8, "little")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_port_data_is_little_endian_and_cut_to_its_size(size: int) -> None:
    page, _ = _page(ExitReason.IO)
    page.set_int(4096, size, -2)
    assert page.get_int(4096, size) == (1 << (8 * size)) - 2
    assert page.get_int(4096 + size, 4) == 0


def test_immediate_exit_is_the_kernels_byte() -> None:
    page, run = _page(0)
    page.set_immediate_exit(True)
    assert run.immediate_exit == 1
    page.set_immediate_exit(False)
    assert run.immediate_exit == 0
    assert run.request_interrupt_window == 0


def test_hlt_and_triple_fault_carry_nothing() -> None:
    assert decode(_page(ExitReason.HLT)[0]) == HltExit()
    assert decode(_page(ExitReason.SHUTDOWN)[0]) == ShutdownExit()


def test_an_emulation_failure_shows_the_instruction() -> None:
    page, run = _page(ExitReason.INTERNAL_ERROR)
    failure = run.emulation_failure
    failure.suberror, failure.ndata, failure.flags, failure.insn_size = 1, 3, 1, 3
    failure.insn_bytes[:3] = b"\x0f\xae\x20"
    decoded = decode(page)
    assert isinstance(decoded, InternalErrorExit)
    assert decoded.instruction == b"\x0f\xae\x20"
    assert str(decoded) == "KVM cannot emulate an instruction (suberror 1): 0f ae 20"


def test_other_internal_errors_show_their_words() -> None:
    page, run = _page(ExitReason.INTERNAL_ERROR)
    run.internal.suberror, run.internal.ndata = 3, 2
    run.internal.data[:2] = (0x80000306, 0x31)
    decoded = decode(page)
    assert decoded == InternalErrorExit(3, (0x80000306, 0x31))
    assert str(decoded) == "exit while an event was being delivered (suberror 3) 0x80000306 0x31"


def test_more_words_than_the_structure_has_are_not_believed() -> None:
    page, run = _page(ExitReason.INTERNAL_ERROR)
    run.internal.suberror, run.internal.ndata = 9, 0xFFFF_FFFF
    decoded = decode(page)
    assert isinstance(decoded, InternalErrorExit)
    assert len(decoded.data) == 16


def test_failed_entry_system_event_and_unknown() -> None:
    page, run = _page(ExitReason.FAIL_ENTRY)
    run.fail_entry.hardware_entry_failure_reason, run.fail_entry.cpu = 0x8000_0021, 1
    assert decode(page) == FailEntryExit(0x8000_0021, 1)
    page, run = _page(ExitReason.SYSTEM_EVENT)
    run.system_event.type = abi.KVM_SYSTEM_EVENT_RESET
    assert decode(page) == SystemEventExit(abi.KVM_SYSTEM_EVENT_RESET, ())
    page, run = _page(ExitReason.UNKNOWN)
    run.hw.hardware_exit_reason = 0x400
    assert str(decode(page)) == "KVM_EXIT_UNKNOWN (0, hardware reason 0x400)"
    assert str(UnknownExit(999)) == "unknown exit (999)"
    assert str(UnknownExit(ExitReason.X86_RDMSR)) == "KVM_EXIT_X86_RDMSR (29)"


def test_reads_outside_the_page_are_refused() -> None:
    page, _ = _page(0)
    for offset, length in [(-1, 1), (PAGE_BYTES, 1), (0, PAGE_BYTES + 1), (0, -1)]:
        with pytest.raises(ValueError, match="run page"):
            page.read(offset, length)
    assert page.read(PAGE_BYTES - 1, 1) == b"\x00"


@given(
    reason=st.integers(0, 40) | st.integers(0, (1 << 32) - 1),
    union=st.binary(min_size=256, max_size=256),
)
def test_decode_never_raises(reason: int, union: bytes) -> None:
    buffer = bytearray(PAGE_BYTES)
    run = abi.kvm_run.from_buffer(buffer)
    run.exit_reason = reason
    ctypes.memmove(ctypes.addressof(run.io), union, len(union))
    if reason == ExitReason.IO:
        run.io.direction &= 1
    decoded = decode(RunPage(buffer))
    assert isinstance(str(decoded), str)
