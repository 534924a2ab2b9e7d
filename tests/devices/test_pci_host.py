"""PCI's configuration mechanism #1, as Linux looks for it (arch/x86/pci/direct.c)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.devices.pci_host import PciHost

ADDRESS, DATA = 0, 4
VENDOR, CLASS_DEVICE, HEADER_TYPE = 0x00, 0x0A, 0x0E
HOST_BRIDGE = 0x0600


def select(host: PciHost, register: int, *, bus: int = 0, devfn: int = 0) -> int:
    """Select a register as pci_conf1_read() does: the offset of its data port."""
    host.write(ADDRESS, 4, 1 << 31 | bus << 16 | devfn << 8 | register & 0xFC)
    return DATA + (register & 3)


def test_fault_28_linux_finds_the_mechanism() -> None:
    host = PciHost()
    host.write(3, 1, 0x01)
    before = host.read(ADDRESS, 4)
    host.write(ADDRESS, 4, 0x8000_0000)
    assert host.read(ADDRESS, 4) == 0x8000_0000
    assert host.read(select(host, CLASS_DEVICE), 2) == HOST_BRIDGE
    host.write(ADDRESS, 4, before)
    assert host.read(DATA, 4) == 0xFFFF_FFFF, "disabled again"


def test_the_bridge_is_the_only_device_and_has_one_function() -> None:
    host = PciHost()
    assert host.read(select(host, VENDOR), 4) == 0x0D57_8086
    assert host.read(select(host, HEADER_TYPE), 1) == 0
    for bus, devfn in [(0, slot << 3) for slot in range(1, 32)] + [(0, 1), (1, 0), (255, 255)]:
        assert host.read(select(host, VENDOR, bus=bus, devfn=devfn), 4) == 0xFFFF_FFFF


@pytest.mark.parametrize("register", range(0x10, 0x40, 4))
def test_it_has_no_base_addresses_nor_capabilities(register: int) -> None:
    host = PciHost()
    port = select(host, register)
    host.write(port, 4, 0xFFFF_FFFF)
    assert host.read(port, 4) == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.sampled_from([1, 2, 4, 8]),
                          st.integers(0, 2**32 - 1)), max_size=30))
def test_no_sequence_of_accesses_breaks_it(
    accesses: list[tuple[bool, int, int, int]],
) -> None:
    host = PciHost()
    for is_write, offset, size, value in accesses:
        if is_write:
            host.write(offset, size, value)
        else:
            assert 0 <= host.read(offset, size) < 1 << 8 * size
