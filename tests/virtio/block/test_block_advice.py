"""Everything the device advises is served, whatever size the driver gives its ring."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from pyvmm.storage.memory import MemoryBackend
from pyvmm.virtio.block import BlockConfig
from pyvmm.virtio.spec import Feature, Register
from tests.support.advised import (
    DISCARD,
    WRITE_ZEROES,
    Advice,
    Asker,
    check_ranges,
    check_transfers,
)
from tests.support.packed_driver import PackedDriver
from tests.support.rig import Rig
from tests.support.virtio_driver import BlockDriver, readable, writable
from tests.virtio.conftest import MakeRig

SPLIT_SIZES = [2, 4, 8, 16, 32, 64, 128, 256]
PACKED_SIZES = [2, 3, 4, 5, 7, 16, 31, 64, 100, 127, 128, 129, 200, 255, 256]


def advice_of(rig: Rig) -> Advice:
    """What the guest finds in configuration space."""
    space = [rig.driver.reg(Register.CONFIG + at) for at in range(0, 60, 4)]
    return Advice.of(struct.pack("<15I", *space))


def start(rig: Rig, size: int, *, packed: bool, indirect: bool, more: int = 0) -> BlockDriver:
    """A running driver with a ring of ``size`` entries."""
    kind = PackedDriver if packed else BlockDriver
    driver = kind(rig.transport, rig.memory, size=size)
    features = driver.offered & ~int(Feature.EVENT_IDX | Feature.RING_PACKED) | more
    features |= Feature.RING_PACKED if packed else 0
    features &= ~(0 if indirect else int(Feature.INDIRECT_DESC))
    driver.start(features)
    return driver


@pytest.mark.parametrize("indirect", [True, False], ids=["indirect", "direct"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("most", [4, 16, 256])
def test_fault_12_what_is_advised_is_served_in_a_ring_of_any_size(
    new_rig: MakeRig, tmp_path: Path, most: int, packed: bool, indirect: bool
) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    rig = new_rig(config=BlockConfig(queue_size=most), ram_bytes=8 << 20)
    advice = advice_of(rig)
    sizes = [size for size in (PACKED_SIZES if packed else SPLIT_SIZES) if size <= most]
    for size in sizes:
        driver = start(rig, size, packed=packed, indirect=indirect)
        asker = Asker(driver, indirect=indirect)
        check_transfers(asker, advice)
        check_ranges(asker, advice)
    assert rig.reports == []


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("size", [2, 128, 1024])
def test_fault_12_the_longest_table_there_may_be_is_served(
    new_rig: MakeRig, tmp_path: Path, packed: bool, size: int
) -> None:
    """1024 descriptors: as many as QEMU takes (VIRTQUEUE_MAX_SIZE), and preadv (IOV_MAX)."""
    (tmp_path / "disk.img").write_bytes(bytes(2 << 20))
    rig = new_rig(config=BlockConfig(queue_size=1024), ram_bytes=32 << 20)
    advice = advice_of(rig)
    assert advice.seg_max == 1022
    driver = start(rig, size, packed=packed, indirect=True)
    check_transfers(Asker(driver, indirect=True), advice)
    assert rig.reports == []


@pytest.mark.parametrize(("expected", "mebibytes"), [(256, 254), (128, 252)])
@pytest.mark.parametrize("size", [2, 256])
def test_fault_12_the_largest_request_is_served(
    new_rig: MakeRig, size: int, expected: int, mebibytes: int
) -> None:
    """SEG_MAX segments of SIZE_MAX bytes; for want of RAM they are all the same, and read."""
    space = bytearray(mebibytes << 20)
    rig = new_rig(config=BlockConfig(), backend=MemoryBackend(space), ram_bytes=4 << 20)
    rig.device.expect_rings_of(expected)
    rig.driver.negotiate()  # a register page shows what was there at the last reset
    advice = advice_of(rig)
    assert len(space) == advice.seg_max * advice.size_max
    space[-512:] = b"\x5a" * 512
    driver = start(rig, size, packed=False, indirect=True)
    room = driver.alloc(advice.size_max)
    asker = Asker(driver, indirect=True)
    chain = [writable(room, advice.size_max)] * advice.seg_max
    assert asker.ask(0, 0, chain, written=len(space) + 1) == 0
    assert driver.memory.read(room + advice.size_max - 513, 513) == b"\0" + b"\x5a" * 512


@pytest.mark.parametrize("size", [2, 256])
def test_fault_12_the_most_and_largest_ranges_are_served(
    new_rig: MakeRig, tmp_path: Path, size: int
) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"")
    os.truncate(path, 65 << 30)  # a hole
    rig = new_rig(config=BlockConfig(), ram_bytes=4 << 20)
    advice = advice_of(rig)
    asker = Asker(start(rig, size, packed=False, indirect=True), indirect=True)
    for request_type, count, sectors in (
        (DISCARD, advice.discard_ranges, advice.discard_sectors),
        (WRITE_ZEROES, advice.zero_ranges, advice.zero_sectors),
    ):
        assert count * sectors < advice.capacity, "or the disk is too small for this test"
        last = sectors * count - 1
        for sector in (0, last, last + 1):
            assert asker.write(sector, b"\xa5" * 512, [512]) == 0
        unmap = int(request_type == WRITE_ZEROES and bool(advice.may_unmap))
        ranges = [(n * sectors, sectors, unmap) for n in range(count)]
        assert asker.ranges(request_type, ranges, pieces=count) == 0
        assert asker.read(last + 1, [512]) == (0, b"\xa5" * 512)
        if request_type == WRITE_ZEROES:  # what is discarded may read as anything
            for sector in (0, last):
                assert asker.read(sector, [512]) == (0, bytes(512))


def test_a_split_chain_may_end_in_a_table(new_rig: MakeRig) -> None:
    """2.7.5.3.2 "Device Requirements": "zero or more normal chained descriptors followed by a
    single descriptor with flags&VIRTQ_DESC_F_INDIRECT"; all of it is one chain of 16 at most."""
    rig = new_rig()
    for behind, served in ((13, True), (14, False)):
        driver = start(rig, 4, packed=False, indirect=True)
        room, status = driver.alloc(64 * 15), driver.status_byte()
        data = [writable(room + 32 * n, 32) for n in range(behind)] + [writable(room, 96)]
        table = driver.indirect([*data, writable(status, 1)])
        driver.submit([readable(driver.header(0, 1), 16), table])
        assert len(driver.reap()) == served
        if served:
            assert driver.memory.read_int(status, 1) == 0
    rig.assert_needs_reset()
