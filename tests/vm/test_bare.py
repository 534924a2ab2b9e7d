"""Guests of a few instructions on the real handles: any /dev/kvm will do."""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.kvm.exits import HltExit, InternalErrorExit, ShutdownExit
from pyvmm.virtio.console.device import ConsoleDevice
from pyvmm.virtio.mmio import MmioTransport
from tests.support.bare import (
    LONG_MODE_ENTRY,
    REAL_MODE_ENTRY,
    BareMachine,
    assemble,
    bare_machine,
    host_page,
)

pytestmark = pytest.mark.bare

DEVICE = 0xD000_0000


@pytest.fixture
def machine() -> Iterator[BareMachine]:
    with bare_machine() as bare:
        yield bare


def _load(machine: BareMachine, name: str, folder: Path) -> None:
    machine.load(assemble(name, LONG_MODE_ENTRY, folder), LONG_MODE_ENTRY)


def test_port_io_of_every_size_and_direction(machine: BareMachine, tmp_path: Path) -> None:
    _load(machine, "port_io", tmp_path)
    machine.port_input = [0x41, *b"abc"]
    assert machine.run() == HltExit(), machine.describe()
    assert machine.written == [
        (0x80, 1, 0x11),
        (0x3F8, 2, 0x2233),
        (0x3F8, 4, 0x4455_6677),
        (0x80, 1, 0x42),
        *((0x3F8, 1, byte) for byte in b"hello"),
        *((0x3F8, 1, byte) for byte in b"abc"),
    ]
    assert machine.port_input == []


def test_mmio_of_every_size_and_direction(machine: BareMachine, tmp_path: Path) -> None:
    _load(machine, "mmio", tmp_path)
    machine.loads = {DEVICE: 0x1234_5678, DEVICE + 1: 0xFFA5}
    assert machine.run() == HltExit(), machine.describe()
    assert machine.stored == [
        (DEVICE + 0x10, b"\x11"),
        (DEVICE + 0x12, b"\x33\x22"),
        (DEVICE + 0x14, b"\x77\x66\x55\x44"),
        (DEVICE + 0x18, bytes.fromhex("ffeeddccbbaa9988")),
        (DEVICE + 4, (0xEDCB_A987).to_bytes(4, "little")),
        (DEVICE + 8, (0xA5).to_bytes(8, "little")),
    ]


def test_a_register_page_is_read_without_exits(machine: BareMachine, tmp_path: Path) -> None:
    _load(machine, "register_page", tmp_path)
    doorbell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        with host_page() as (page, address):
            page[0:4] = (0x7472_6976).to_bytes(4, "little")
            page[0x60:0x64] = (1).to_bytes(4, "little")
            machine.vm.set_user_memory_region(1, DEVICE, len(page), address, read_only=True)
            machine.vm.ioeventfd(doorbell, DEVICE + 0x50, 4, datamatch=1)
            assert machine.run() == HltExit(), machine.describe()
            machine.vm.ioeventfd(doorbell, DEVICE + 0x50, 4, datamatch=1, deassign=True)
            machine.vm.set_user_memory_region(1, DEVICE, 0, address, read_only=True)
        assert os.eventfd_read(doorbell) == 2
    finally:
        os.close(doorbell)
    assert machine.stored == [
        (DEVICE + 0x50, b"\x02\x00\x00\x00"),
        (DEVICE + 0x70, (0x7472_6977).to_bytes(4, "little")),
    ]


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Threads give way to each other as often as they can, in the middle of whatever they do."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before_s)


@pytest.mark.usefixtures("hasty_threads")
def test_no_torn_configuration_is_taken_for_a_whole_one(
    machine: BareMachine, tmp_path: Path
) -> None:
    """The guest reads a mapped page while the terminal's size changes all the time; both numbers
    of it are equal."""
    _load(machine, "config_space", tmp_path)
    size = 1
    device = ConsoleDevice(lambda _data: None, lambda: None, size=lambda: (size, size))
    transport = MmioTransport(device, machine.memory, lambda: None, report=print)
    address = ctypes.addressof(ctypes.c_char.from_buffer(transport.page))
    machine.vm.set_user_memory_region(1, DEVICE, len(transport.page), address, read_only=True)
    over = threading.Event()
    changes = itertools.count(1)

    def change() -> None:
        nonlocal size
        while not over.is_set():
            size = next(changes) & 0x7FFF
            device.refresh()
            transport.config_changed()

    def hinder() -> None:
        while not over.is_set():
            pass

    threads = [threading.Thread(target=body) for body in (change, hinder)]
    for thread in threads:
        thread.start()
    try:
        assert machine.run() == HltExit(), machine.describe()
    finally:
        over.set()
        for thread in threads:
            thread.join()
        machine.vm.set_user_memory_region(1, DEVICE, 0, address, read_only=True)
        transport.close()
    assert machine.written == [(0xF4, 1, ord("W"))]
    assert next(changes) > 100


def test_hlt_stops_after_the_instruction(machine: BareMachine, tmp_path: Path) -> None:
    _load(machine, "halt", tmp_path)
    assert machine.run() == HltExit()
    assert machine.vcpu.get_regs().rip == LONG_MODE_ENTRY + 1


def test_a_triple_fault_is_a_shutdown(machine: BareMachine, tmp_path: Path) -> None:
    _load(machine, "triple_fault", tmp_path)
    assert machine.run() == ShutdownExit(), machine.describe()


def test_running_where_there_is_no_ram_is_described(
    machine: BareMachine, tmp_path: Path
) -> None:
    _load(machine, "no_ram", tmp_path)
    assert isinstance(machine.run(), InternalErrorExit), machine.describe()
    text = machine.describe()
    assert "rip 0x00000000d0000000" in text
    assert "code ??" in text
    assert "rbx 0000000000001234" in text


def test_long_mode_is_as_the_boot_protocol_says(machine: BareMachine, tmp_path: Path) -> None:
    _load(machine, "long_mode", tmp_path)
    assert machine.run() == HltExit(), machine.describe()
    assert [value for _, _, value in machine.written] == [
        0x7000, 0x1234_5678, 0x10, 0x18, 0, 0xFFFF_FFFF
    ]  # fmt: skip


def test_protected_mode_is_as_the_pvh_abi_says(machine: BareMachine, tmp_path: Path) -> None:
    machine.load_protected_mode(
        assemble("protected_mode", LONG_MODE_ENTRY, tmp_path), LONG_MODE_ENTRY
    )
    assert machine.run() == HltExit(), machine.describe()
    assert [value for _, _, value in machine.written] == [0x8000, 1, 0, 0x20, 0, 0x1234_5678]
    assert machine.memory.read_int(0x180000, 4) == 0x1234_5678


def test_real_mode_reaches_memory_by_segments(machine: BareMachine, tmp_path: Path) -> None:
    machine.load_real_mode(assemble("real_mode", REAL_MODE_ENTRY, tmp_path), REAL_MODE_ENTRY)
    assert machine.run() == HltExit(), machine.describe()
    assert machine.written == [(0x3F8, 1, 0x5A)]
    assert machine.memory.read(0x12350, 1) == b"\x5a"


def test_the_description_shows_the_instruction_bytes(
    machine: BareMachine, tmp_path: Path
) -> None:
    code = assemble("long_mode", LONG_MODE_ENTRY, tmp_path)
    machine.load(code, LONG_MODE_ENTRY)
    text = machine.describe()
    assert f"code {code[:15].hex(' ')}" in text
    assert "rip 0x0000000000100000" in text
    assert "rsi 0000000000007000" in text


def test_the_description_stops_at_the_end_of_ram(machine: BareMachine) -> None:
    end = machine.memory.size_bytes
    machine.load(b"\x90\x90\xf4", end - 3)
    assert "code 90 90 f4 ??" in machine.describe()
    machine.load(b"\xf4", end - 1)
    assert "code f4 ??" in machine.describe()
