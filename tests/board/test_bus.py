"""The buses: accesses reach the device at its offset, everything else is all ones."""

from __future__ import annotations

import pytest

from pyvmm.board.bus import Bus


class Recorder:
    def __init__(self) -> None:
        self.seen: list[tuple[object, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.seen.append(("r", offset, size))
        return 0x5A

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append(("w", offset, size, value))


def test_accesses_reach_the_device_at_its_offset() -> None:
    bus, device = Bus("MMIO", 12), Recorder()
    bus.add(0xD0000000, 0x1000, device)
    assert bus.read(0xD0000FFC, 4) == 0x5A
    bus.write(0xD0000050, 4, 7)
    assert device.seen == [("r", 0xFFC, 4), ("w", 0x50, 4, 7)]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize(("bits", "address"), [(0, 0x3F0), (12, 0xD0001000), (12, (1 << 64) - 8)])
def test_bad_input_90_unmapped_reads_are_all_ones(bits: int, address: int, size: int) -> None:
    bus = Bus("PIO" if bits == 0 else "MMIO", bits)
    assert bus.read(address, size) == (1 << 8 * size) - 1
    bus.write(address, size, 0)


def test_bad_input_90_an_access_past_a_devices_end_is_unmapped() -> None:
    bus, device = Bus("MMIO", 12), Recorder()
    bus.add(0x1000, 0x1000, device)
    assert bus.read(0x1FFE, 4) == 0xFFFFFFFF
    bus.write(0x1FFE, 4, 1)
    assert device.seen == []


def test_two_devices_cannot_share_an_address() -> None:
    bus = Bus("PIO", 0)
    bus.add(0x60, 1, Recorder())
    bus.add(0x64, 1, Recorder())
    with pytest.raises(ValueError, match="taken"):
        bus.add(0x5E, 4, Recorder())
    assert bus.read(0x5E, 1) == 0xFF, "a refused device claims nothing"


@pytest.mark.parametrize(("base", "length"), [(0x10, 0x1000), (0x1000, 0x10), (0x1000, 0), (-1, 1)])
def test_a_region_is_whole_granules(base: int, length: int) -> None:
    with pytest.raises(ValueError, match="granules"):
        Bus("MMIO", 12).add(base, length, Recorder())
