"""Bad block requests and host faults, as the guest sees them: bad inputs 46-66 and 115.

67 to 70 are in test_block_discard.py.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from pyvmm.storage.raw import RawBackend
from pyvmm.virtio.block import BlockConfig
from pyvmm.virtio.spec import BlockFeature, Feature
from tests.support.rig import DISK_SECTORS, RAM_BYTES, Hooked, Rig
from tests.support.virtio_driver import (
    RAM_BASE,
    STATUS_POISON,
    Descriptor,
    readable,
    writable,
)
from tests.virtio.conftest import MakeRig

pytestmark = pytest.mark.usefixtures("both_paths", "both_pages")

RAM_END = RAM_BASE + RAM_BYTES
IN, OUT, FLUSH, GET_ID = 0, 1, 4, 8
OK, IOERR, UNSUPP = 0, 1, 2


def assert_returned_unanswered(rig: Rig, chain: list[Descriptor]) -> None:
    """Outcome D: the head comes back with used.len 0, nothing else changes, all goes on."""
    disk = rig.disk
    status = rig.driver.status_byte()
    rig.driver.submit(chain)
    assert rig.driver.reap() == [(0, 0)]
    assert rig.memory.read_int(status, 1) == STATUS_POISON
    assert rig.disk == disk
    assert not rig.driver.needs_reset
    assert rig.driver.request(FLUSH).status == OK
    rig.assert_works()


def test_bad_input_46_header_only(rig: Rig) -> None:
    assert_returned_unanswered(rig, [readable(rig.driver.header(IN), 16)])


@pytest.mark.parametrize("length", [1, 8, 15])
def test_bad_input_47_header_shorter_than_16_bytes(rig: Rig, length: int) -> None:
    driver = rig.driver
    chain = [readable(driver.header(FLUSH), length), writable(driver.status_byte(), 1)]
    assert_returned_unanswered(rig, chain)


@pytest.mark.parametrize("pieces", range(2, 17))
def test_bad_input_48_header_split_over_descriptors(new_rig: MakeRig, pieces: int) -> None:
    rig = new_rig(queue_size=32)
    driver = rig.driver
    driver.start()
    header, data, status = driver.header(IN, 5), driver.alloc(512), driver.status_byte()
    chain = [readable(header + i, 1) for i in range(pieces - 1)]
    chain += [readable(header + pieces - 1, 17 - pieces)]
    chain += [writable(data, 512), writable(status, 1)]
    assert driver.ask(chain, status, data, 512) == (OK, 513, b"\5" * 512)


def test_bad_input_49_header_writable(rig: Rig) -> None:
    driver = rig.driver
    header, status = driver.header(FLUSH), driver.status_byte()
    driver.submit([writable(header, 16), writable(status, 1)])
    assert rig.memory.read(header, 16) == struct.pack("<IIQ", FLUSH, 0, 0)
    assert rig.memory.read_int(status, 1) == STATUS_POISON
    assert driver.reap() == [(0, 0)]
    assert_returned_unanswered(rig, [writable(header, 16), writable(status, 1)])


@pytest.mark.parametrize("gpa", [0, RAM_END - 8, RAM_END, 2**64 - 8])
def test_header_outside_ram_cannot_be_answered(rig: Rig, gpa: int) -> None:
    assert_returned_unanswered(rig, [readable(gpa, 16), writable(rig.driver.status_byte(), 1)])


def test_bad_input_50_no_status(rig: Rig) -> None:
    driver = rig.driver
    data = driver.put(b"x" * 512)
    assert_returned_unanswered(rig, [readable(driver.header(OUT), 16), readable(data, 512)])
    assert_returned_unanswered(rig, [readable(driver.header(FLUSH), 16), writable(data, 0)])


def test_bad_input_51_status_read_only(rig: Rig) -> None:
    driver = rig.driver
    for request_type in (OUT, FLUSH, GET_ID):
        header = driver.header(request_type)
        assert_returned_unanswered(
            rig, [readable(header, 16), readable(driver.status_byte(), 1)]
        )


@pytest.mark.parametrize("gpa", [0, RAM_BASE - 1, RAM_END, 2**63, 2**64 - 1])
@pytest.mark.parametrize("request_type", [OUT, FLUSH])
def test_bad_input_53_status_at_a_bad_address(rig: Rig, gpa: int, request_type: int) -> None:
    driver = rig.driver
    chain = [readable(driver.header(request_type), 16), readable(driver.put(b"x" * 512), 512)]
    assert_returned_unanswered(rig, [*chain, writable(gpa, 1)])


def test_bad_input_53_last_byte_of_the_status_descriptor_is_not_ram(rig: Rig) -> None:
    chain = [readable(rig.driver.header(FLUSH), 16), writable(RAM_END - 1, 2)]
    assert_returned_unanswered(rig, chain)


@pytest.mark.parametrize("length", [0, 1, 511, 513, 1023])
@pytest.mark.parametrize("request_type", [IN, OUT])
def test_bad_input_55_length_is_not_whole_sectors(
    rig: Rig, length: int, request_type: int
) -> None:
    disk = rig.disk
    if request_type == IN:
        answer = rig.driver.request(IN, room=length)
        assert answer == (IOERR, 1, bytes(length))
    else:
        assert rig.driver.request(OUT, data=b"x" * length) == (IOERR, 1, b"")
    assert rig.disk == disk
    rig.assert_works()


def assert_out_of_range(rig: Rig, sector: int, length: int) -> None:
    """Reading and writing there get IOERR; no byte moves and the file does not grow."""
    disk = rig.disk
    assert rig.driver.request(IN, sector, room=length) == (IOERR, 1, bytes(length))
    assert rig.driver.request(OUT, sector, data=b"x" * length) == (IOERR, 1, b"")
    assert rig.disk == disk
    rig.assert_works()


def test_bad_input_57_sector_at_the_capacity(rig: Rig) -> None:
    assert_out_of_range(rig, DISK_SECTORS, 512)
    assert_out_of_range(rig, DISK_SECTORS + 1, 512)


@pytest.mark.parametrize("sectors", [2, 8])
def test_bad_input_58_split_at_the_last_sector(rig: Rig, sectors: int) -> None:
    assert_out_of_range(rig, DISK_SECTORS - 1, 512 * sectors)
    last = DISK_SECTORS - 1
    assert rig.driver.request(IN, last, room=512).data == bytes([last]) * 512


@pytest.mark.parametrize("sector", [2**55, 2**55 - 1, 2**63, 2**64 - 1, 2**64 - DISK_SECTORS])
def test_bad_input_60_sector_times_512_wraps(rig: Rig, sector: int) -> None:
    assert_out_of_range(rig, sector, 512)


@pytest.mark.parametrize("request_type", [IN, OUT, GET_ID])
def test_bad_input_61_data_of_the_wrong_direction(rig: Rig, request_type: int) -> None:
    driver = rig.driver
    disk = rig.disk
    data, room, status = driver.put(b"x" * 512), driver.alloc(512), driver.status_byte()
    chain = [readable(driver.header(request_type), 16), readable(data, 512)]
    chain += [writable(room, 512), writable(status, 1)]
    assert driver.ask(chain, status, room, 512) == (IOERR, 1, bytes(512))
    assert rig.disk == disk
    rig.assert_works()


def test_bad_input_61_only_data_of_the_wrong_direction(rig: Rig) -> None:
    disk = rig.disk
    assert rig.driver.request(IN, data=b"x" * 512).status == IOERR
    assert rig.driver.request(OUT, room=512) == (IOERR, 1, bytes(512))
    assert rig.disk == disk


def test_bad_input_62_write_to_a_read_only_disk_without_acking_ro(
    hooked: tuple[Rig, Hooked], new_rig: MakeRig
) -> None:
    _, backend = hooked
    rig = new_rig(config=BlockConfig(read_only=True, queue_size=16), backend=backend)
    writes: list[int] = []

    def note(buffers: Sequence[memoryview], offset: int, *, durable: bool = False) -> None:
        writes.append(offset)

    backend.writev = note  # type: ignore[method-assign]
    for features in (int(Feature.VERSION_1 | BlockFeature.FLUSH), None):
        rig.driver.start(features)
        assert rig.driver.request(OUT, data=b"x" * 512) == (IOERR, 1, b"")
    assert writes == []
    rig.assert_works()


def test_bad_input_63_flush_with_data_or_a_sector(rig: Rig) -> None:
    driver = rig.driver
    disk = rig.disk
    assert driver.request(FLUSH, 2**64 - 1) == (OK, 1, b"")
    assert driver.request(FLUSH, data=b"x" * 512) == (OK, 1, b"")
    assert driver.request(FLUSH, room=512) == (OK, 1, bytes(512))
    assert rig.disk == disk
    rig.assert_works()


@pytest.mark.parametrize(
    "request_type",
    [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 16, 18, 20, 22, 24, 26, 100, 2**31, 2**32 - 1],
)
def test_bad_input_65_unknown_zoned_and_scsi_requests(rig: Rig, request_type: int) -> None:
    disk = rig.disk
    assert rig.driver.request(request_type) == (UNSUPP, 1, b"")
    assert rig.driver.request(request_type, 2**60, data=b"x" * 24) == (UNSUPP, 1, b"")
    assert rig.driver.request(request_type, room=512) == (UNSUPP, 1, bytes(512))
    assert rig.disk == disk
    rig.assert_works()


@pytest.mark.parametrize("room", [0, 1, 19, 20, 21, 4096])
@pytest.mark.parametrize("serial", ["", "disk-1", "twenty characters ok"])
def test_bad_input_66_id_of_any_length(new_rig: MakeRig, room: int, serial: str) -> None:
    rig = new_rig(config=BlockConfig(serial=serial, queue_size=16))
    rig.driver.start()
    wanted = serial.encode().ljust(20, b"\0")[:room]
    answer = rig.driver.request(GET_ID, room=room)
    assert answer == (OK, len(wanted) + 1, wanted.ljust(room, b"\0"))


def test_id_is_written_over_several_buffers(new_rig: MakeRig) -> None:
    rig = new_rig(config=BlockConfig(serial="abcdef", queue_size=16))
    driver = rig.driver
    driver.start()
    room, status = driver.alloc(30), driver.status_byte()
    chain = [readable(driver.header(GET_ID), 16), writable(room, 3), writable(room + 3, 27)]
    answer = driver.ask([*chain, writable(status, 1)], status, room, 30)
    assert answer == (OK, 21, b"abcdef".ljust(30, b"\0"))


def test_a_request_of_256_mebibytes_is_ioerr(tmp_path: Path, new_rig: MakeRig) -> None:
    # 255 buffers of 1 MiB and a smaller one, all of them the same RAM: more would take too long.
    path = tmp_path / "big.img"
    with path.open("wb") as file:
        file.truncate(8 << 30)
    backend = Hooked(RawBackend(str(path), report=print))
    backend.readv = lambda buffers, offset: None  # type: ignore[method-assign]
    rig = new_rig(backend=backend, queue_size=1024, ram_bytes=16 << 20)
    driver = rig.driver
    driver.start()
    header, status = driver.header(IN), driver.status_byte()
    data = [writable(RAM_BASE + (8 << 20), 1 << 20)] * 255
    data.append(writable(RAM_BASE + (8 << 20), (1 << 20) - 4096))
    data.append(writable(RAM_BASE + (8 << 20), 512))
    chain = [readable(header, 16), *data, writable(status, 1)]
    assert driver.ask(chain, status) == (IOERR, 1, b"")
    chain = [readable(header, 16), *data[:-1], writable(status, 1)]
    assert driver.ask(chain, status) == (OK, (256 << 20) - 4096 + 1, b"")


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_bad_input_115_host_error_is_ioerr_and_the_next_request_works(
    hooked: tuple[Rig, Hooked], error: int
) -> None:
    rig, backend = hooked

    def fail(buffers: Sequence[memoryview], offset: int, *, durable: bool = False) -> None:
        raise OSError(error, os.strerror(error))

    backend.readv = backend.writev = fail  # type: ignore[method-assign]
    assert rig.driver.request(IN, room=512) == (IOERR, 1, bytes(512))
    assert rig.driver.request(OUT, data=bytes(512)) == (IOERR, 1, b"")
    del backend.readv, backend.writev
    assert rig.driver.request(IN, 8, room=512) == (OK, 513, b"\x08" * 512)
    assert not rig.driver.needs_reset
