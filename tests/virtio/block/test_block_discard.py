"""Discard and write-zeroes requests, on a real file: bad inputs 67 to 70 are here."""

from __future__ import annotations

import os
import struct

import pytest

from pyvmm.virtio.block import BlockConfig
from pyvmm.virtio.device import PASS_BYTES
from pyvmm.virtio.rate_limit import RateLimit
from pyvmm.virtio.spec import BlockFeature, Feature
from tests.support.packed_driver import PackedDriver
from tests.support.rig import DISK_SECTORS, Hooked, Rig
from tests.support.virtio_driver import RAM_BASE, readable, writable
from tests.virtio.conftest import MakeRig

DISCARD, WRITE_ZEROES = 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
UNMAP = 1
BOTH = pytest.mark.parametrize("request_type", [DISCARD, WRITE_ZEROES])
MAX_SECTORS = {DISCARD: 1 << 22, WRITE_ZEROES: 1 << 14}


def segment(sector: int, sectors: int, flags: int = 0) -> bytes:
    """struct virtio_blk_discard_write_zeroes."""
    return struct.pack("<QII", sector, sectors, flags)


def with_zeroes(disk: bytes, *ranges: tuple[int, int]) -> bytes:
    """``disk`` with the ``(sector, sectors)`` of ``ranges`` zeroed."""
    changed = bytearray(disk)
    for sector, sectors in ranges:
        changed[512 * sector : 512 * (sector + sectors)] = bytes(512 * sectors)
    return bytes(changed)


def assert_refused(rig: Rig, request_type: int, data: bytes, status: int) -> None:
    """``data`` gets ``status``, not a byte of the disk changes and the device goes on."""
    disk = rig.disk
    assert rig.driver.request(request_type, data=data) == (status, 1, b"")
    assert rig.disk == disk
    rig.assert_works()


@pytest.mark.parametrize("flags", [0, UNMAP])
@pytest.mark.parametrize("indirect", [False, True])
def test_write_zeroes(rig: Rig, flags: int, indirect: bool) -> None:
    disk = rig.disk
    data = segment(3, 2, flags)
    # "sector" of the header means nothing here.
    answer = rig.driver.request(WRITE_ZEROES, 2**40, data=data, indirect=indirect)
    assert answer == (OK, 1, b"")
    assert rig.disk == with_zeroes(disk, (3, 2))
    assert rig.driver.request(0, 3, room=1024) == (OK, 1025, bytes(1024))


def test_write_zeroes_of_many_segments(rig: Rig) -> None:
    disk = rig.disk
    ranges = [(2 * i, 1) for i in range(32)]
    data = b"".join(segment(*r, UNMAP * (i % 2)) for i, r in enumerate(ranges))
    assert rig.driver.request(WRITE_ZEROES, data=data) == (OK, 1, b"")
    assert rig.disk == with_zeroes(disk, *ranges)


@pytest.mark.parametrize("limit", [RateLimit(), RateLimit(ops_per_s=1 << 40)])
@pytest.mark.parametrize("plain", [{0, 1}, {0}, set()], ids=["plain", "mixed", "odd"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "split"])
def test_a_pass_ends_after_so_many_bytes_zeroed(
    new_rig: MakeRig, limit: RateLimit, plain: set[int], packed: bool
) -> None:
    """Few bytes of segments can ask for hours of work: other queues, and the end of the run, get
    their turn between requests."""
    rig = new_rig(config=BlockConfig(rate_limit=limit, queue_size=16))
    rig.path.write_bytes(b"")
    os.truncate(rig.path, PASS_BYTES)
    rig.device.refresh()
    driver = PackedDriver(rig.transport, rig.memory) if packed else rig.driver
    driver.start(rig.driver.offered & ~int(Feature.EVENT_IDX) if packed else None)
    most = MAX_SECTORS[WRITE_ZEROES]
    quarter = segment(0, most, UNMAP) + segment(most, most, UNMAP)  # of what a pass may zero
    assert 4 * 2 * most * 512 == PASS_BYTES
    for _ in range(3):  # what was left in the ring is not forgotten
        for place in range(6):
            request = driver.put(struct.pack("<IIQ", WRITE_ZEROES, 0, 0) + quarter)
            asked = [readable(request, 16 + len(quarter))]
            if place % 2 in plain:  # the three descriptors that every driver uses
                asked = [readable(request, 16), readable(request + 16, len(quarter))]
            driver.place([driver.indirect([*asked, writable(driver.status_byte(), 1)])], place)
        assert rig.transport.service(0) == 0.0
        assert len(driver.reap()) == 4
        assert rig.transport.service(0) is None
        assert len(driver.reap()) == 2


def test_discard_makes_a_hole_and_leaves_the_rest(new_rig: MakeRig) -> None:
    rig = new_rig()
    rig.path.write_bytes(bytes([0xAA]) * (1 << 20))
    assert rig.device.refresh()
    rig.driver.start()
    blocks = rig.path.stat().st_blocks
    data = segment(8, 1000) + segment(1024, 1024)
    assert rig.driver.request(DISCARD, data=data) == (OK, 1, b"")
    assert rig.path.stat().st_size == 1 << 20
    assert rig.path.stat().st_blocks <= blocks - 1900
    disk = rig.disk
    assert disk[: 8 * 512] == b"\xaa" * (8 * 512)
    assert disk[1008 * 512 : 1024 * 512] == b"\xaa" * (16 * 512)


def test_whole_disk(rig: Rig) -> None:
    data = segment(0, DISK_SECTORS)
    assert rig.driver.request(DISCARD, data=data) == (OK, 1, b"")
    assert rig.driver.request(WRITE_ZEROES, data=data) == (OK, 1, b"")
    assert rig.disk == bytes(DISK_SECTORS * 512)


@pytest.mark.parametrize("cut", range(1, 32, 5))
def test_segments_are_split_over_descriptors(rig: Rig, cut: int) -> None:
    driver, disk = rig.driver, rig.disk
    data = segment(1, 2) + segment(7, 3)
    header = struct.pack("<IIQ", WRITE_ZEROES, 0, 0)
    first = driver.put(header + data[:cut])  # with the header in the same descriptor
    rest, status = driver.put(data[cut:]), driver.status_byte()
    chain = [readable(first, 16 + cut), readable(rest, 32 - cut), writable(status, 1)]
    assert driver.ask(chain, status) == (OK, 1, b"")
    assert rig.disk == with_zeroes(disk, (1, 2), (7, 3))


@BOTH
@pytest.mark.parametrize(
    "config",
    [
        BlockConfig(read_only=True, queue_size=16),
        BlockConfig(
            queue_size=16,
            disabled_features=int(BlockFeature.DISCARD | BlockFeature.WRITE_ZEROES),
        ),
    ],
)
def test_bad_input_67_discard_and_write_zeroes_that_were_not_offered(
    new_rig: MakeRig, request_type: int, config: BlockConfig
) -> None:
    rig = new_rig(config=config)
    rig.driver.start()
    assert_refused(rig, request_type, segment(0, 8), UNSUPP)


@BOTH
def test_bad_input_67_discard_and_write_zeroes_that_were_declined(
    rig: Rig, request_type: int
) -> None:
    rig.driver.start(int(Feature.VERSION_1 | BlockFeature.FLUSH))
    assert_refused(rig, request_type, segment(0, 8), UNSUPP)


@BOTH
@pytest.mark.parametrize("length", [1, 8, 15, 17, 31, 33])
def test_bad_input_68_segments_of_no_multiple_of_16_bytes(
    rig: Rig, request_type: int, length: int
) -> None:
    assert_refused(rig, request_type, (segment(0, 1) * 3)[:length], IOERR)


@BOTH
def test_bad_input_68_no_segments(rig: Rig, request_type: int) -> None:
    assert_refused(rig, request_type, b"", IOERR)


@BOTH
def test_bad_input_68_segment_of_no_sectors(rig: Rig, request_type: int) -> None:
    assert_refused(rig, request_type, segment(5, 1) + segment(3, 0), IOERR)


@BOTH
@pytest.mark.parametrize("count", [33, 64, 1000])
def test_bad_input_68_more_segments_than_the_limit(
    rig: Rig, request_type: int, count: int
) -> None:
    assert_refused(rig, request_type, segment(0, 1) * count, IOERR)


@BOTH
def test_bad_input_68_more_sectors_than_the_limit(new_rig: MakeRig, request_type: int) -> None:
    backend = Hooked(new_rig().backend)
    rig = new_rig(backend=backend)
    calls: list[tuple[int, int]] = []

    def note(offset: int, length: int, *, unmap: bool = False) -> None:
        calls.append((offset, length))

    backend.discard = backend.write_zeroes = note  # type: ignore[method-assign]
    with rig.path.open("r+b") as file:
        file.truncate(1 << 33)
    assert rig.device.refresh()
    rig.driver.start()
    most = MAX_SECTORS[request_type]
    assert rig.driver.request(request_type, data=segment(1, most)).status == OK
    assert calls == [(512, 512 * most)]
    for sectors in (most + 1, 2**31, 2**32 - 1):
        data = segment(0, 1) + segment(0, sectors)
        assert rig.driver.request(request_type, data=data) == (IOERR, 1, b"")
    assert len(calls) == 1


@BOTH
@pytest.mark.parametrize(
    ("sector", "sectors"),
    [
        (DISK_SECTORS, 1),
        (DISK_SECTORS - 1, 2),
        (0, DISK_SECTORS + 1),
        (2**55, 1),
        (2**63, 8),
        (2**64 - 1, 1),
        (2**64 - 8, 16),
    ],
)
def test_segment_outside_the_disk(
    rig: Rig, request_type: int, sector: int, sectors: int
) -> None:
    assert_refused(rig, request_type, segment(0, 1) + segment(sector, sectors), IOERR)


@BOTH
@pytest.mark.parametrize("flags", [2, 3, 1 << 16, 1 << 31, 2**32 - 1])
def test_bad_input_70_unknown_flag(rig: Rig, request_type: int, flags: int) -> None:
    assert_refused(rig, request_type, segment(4, 2) + segment(0, 2, flags), UNSUPP)
    # "if any unknown flag is set", whatever else is wrong
    assert_refused(rig, request_type, segment(2**60, 2, flags), UNSUPP)


def test_bad_input_70_unmap_on_discard(rig: Rig) -> None:
    assert_refused(rig, DISCARD, segment(4, 2) + segment(0, 2, UNMAP), UNSUPP)


@BOTH
def test_segments_of_the_wrong_direction(rig: Rig, request_type: int) -> None:
    driver, disk = rig.driver, rig.disk
    assert driver.request(request_type, room=16) == (IOERR, 1, bytes(16))
    data, room, status = driver.put(segment(0, 1)), driver.alloc(16), driver.status_byte()
    chain = [readable(driver.header(request_type), 16), readable(data, 16)]
    chain += [writable(room, 16), writable(status, 1)]
    assert driver.ask(chain, status, room, 16) == (IOERR, 1, bytes(16))
    assert rig.disk == disk
    rig.assert_works()


@BOTH
def test_segments_outside_ram(rig: Rig, request_type: int) -> None:
    driver, disk = rig.driver, rig.disk
    for gpa in (0, RAM_BASE - 16, 2**64 - 16):
        status = driver.status_byte()
        chain = [readable(driver.header(request_type), 16), readable(gpa, 16)]
        assert driver.ask([*chain, writable(status, 1)], status) == (IOERR, 1, b"")
    assert rig.disk == disk
    rig.assert_works()


@BOTH
def test_host_error_is_ioerr(hooked: tuple[Rig, Hooked], request_type: int) -> None:
    rig, backend = hooked

    def fail(offset: int, length: int, *, unmap: bool = False) -> None:
        raise OSError(5, "no")

    backend.discard = backend.write_zeroes = fail  # type: ignore[method-assign]
    assert rig.driver.request(request_type, data=segment(0, 1)) == (IOERR, 1, b"")
    del backend.discard, backend.write_zeroes
    assert rig.driver.request(request_type, data=segment(0, 1)) == (OK, 1, b"")


@BOTH
def test_bad_input_68_ranges_that_are_more_than_the_disk(rig: Rig, request_type: int) -> None:
    sectors = rig.device.capacity_sectors
    half = segment(0, sectors // 2 + 1)
    assert_refused(rig, request_type, half + half, IOERR)
