"""The entropy device: random bytes, bounded, into RAM only."""

from __future__ import annotations

import pytest

from pyvmm.memory import GuestMemory
from pyvmm.virtio.entropy.device import MAX_CHAIN_BYTES, EntropyDevice
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.spec import Register
from tests.support.virtio_driver import RAM_BASE, Used, VirtioDriver, readable, writable


@pytest.fixture
def driver() -> VirtioDriver:
    memory = GuestMemory.over(bytearray(1 << 16), RAM_BASE)
    transport = MmioTransport(EntropyDevice(), memory, lambda: None, report=print)
    driver = VirtioDriver(transport, memory)
    driver.start()
    return driver


def test_buffers_are_filled_with_random_bytes(driver: VirtioDriver) -> None:
    first, second = driver.alloc(32), driver.alloc(32)
    driver.submit([writable(first, 16), writable(second, 32)])
    assert driver.reap() == [Used(0, 48)]
    pieces = driver.memory.read(first, 16), driver.memory.read(second, 32)
    assert all(any(piece) for piece in pieces)
    driver.submit([writable(first, 16)])
    assert driver.memory.read(first, 16) != pieces[0]


def test_a_chain_gets_no_more_than_a_page(driver: VirtioDriver) -> None:
    gpa = driver.alloc(2 * MAX_CHAIN_BYTES)
    driver.submit([writable(gpa, 2 * MAX_CHAIN_BYTES)])
    assert driver.reap() == [Used(0, MAX_CHAIN_BYTES)]
    assert not any(driver.memory.read(gpa + MAX_CHAIN_BYTES, MAX_CHAIN_BYTES))


@pytest.mark.parametrize("gpa", [0, (1 << 64) - 4, RAM_BASE + (1 << 16) - 4])
def test_nothing_is_written_outside_ram(driver: VirtioDriver, gpa: int) -> None:
    before = driver.memory.read(RAM_BASE + 0x8000, 0x8000)
    driver.submit([writable(gpa, 8)])
    driver.submit([readable(RAM_BASE, 8)])
    assert driver.reap() == [Used(0, 0), Used(0, 0)]
    assert driver.memory.read(RAM_BASE + 0x8000, 0x8000) == before


def test_there_is_no_configuration(driver: VirtioDriver) -> None:
    driver.registers.write(Register.CONFIG, 4, 1)
    assert driver.reg(Register.CONFIG) == 0
    assert driver.reg(Register.DEVICE_ID) == 4


def test_a_chain_that_waits_is_filled_by_the_next_device(driver: VirtioDriver) -> None:
    first, memory = driver.registers, driver.memory
    assert isinstance(first, MmioTransport)
    assert isinstance(memory, GuestMemory)
    driver.submit([writable(driver.alloc(8), 8)])
    assert driver.reap() == [Used(0, 8)]
    gpa = driver.alloc(16)
    driver.place([writable(gpa, 16)])
    state = first.save()
    second = MmioTransport(EntropyDevice(), memory, lambda: None, report=print)
    second.restore(state)
    assert second.save() == state
    assert not any(memory.read(gpa, 16)), "nothing is served before it is asked for"
    assert second.service(0) is None
    assert driver.reap() == [Used(0, 16)]
    assert any(memory.read(gpa, 16))
