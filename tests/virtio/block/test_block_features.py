"""What the block device offers, what of that can be switched off, and its configuration space."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import pytest

from pyvmm.errors import ConfigError
from pyvmm.storage.memory import MemoryBackend
from pyvmm.storage.raw import RawBackend
from pyvmm.virtio.block import BlockConfig, BlockDevice
from pyvmm.virtio.device import MAX_CHAIN_BYTES
from pyvmm.virtio.rate_limit import RateLimit
from pyvmm.virtio.spec import BlockFeature, Feature, InterruptBit, Register, Status
from tests.support.rig import DISK_SECTORS, Rig
from tests.support.virtio_driver import BlockDriver
from tests.virtio.conftest import MakeRig

COMMON = [
    Feature.INDIRECT_DESC,
    Feature.EVENT_IDX,
    Feature.RING_PACKED,
    Feature.IN_ORDER,
    Feature.RING_RESET,
]
BLOCK = [
    BlockFeature.SIZE_MAX,
    BlockFeature.SEG_MAX,
    BlockFeature.BLK_SIZE,
    BlockFeature.FLUSH,
    BlockFeature.TOPOLOGY,
    BlockFeature.CONFIG_WCE,
    BlockFeature.MQ,
    BlockFeature.DISCARD,
    BlockFeature.WRITE_ZEROES,
]
FIELDS = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3x")


class Space(NamedTuple):
    """struct virtio_blk_config (5.2.4), field by field."""

    capacity: int
    size_max: int
    seg_max: int
    cylinders: int
    heads: int
    sectors: int
    blk_size: int
    physical_block_exp: int
    alignment_offset: int
    min_io_size: int
    opt_io_size: int
    writeback: int
    unused0: int
    num_queues: int
    max_discard_sectors: int
    max_discard_seg: int
    discard_sector_alignment: int
    max_write_zeroes_sectors: int
    max_write_zeroes_seg: int
    write_zeroes_may_unmap: int


def device(config: BlockConfig, backend: MemoryBackend | None = None) -> BlockDevice:
    return BlockDevice(config, backend or MemoryBackend(bytearray(DISK_SECTORS * 512)))


def space_of(config: BlockConfig, backend: MemoryBackend | None = None) -> Space:
    return Space._make(FIELDS.unpack(device(config, backend).read_config(0, FIELDS.size)))


# Features


def test_everything_that_can_be_served_is_offered(rig: Rig) -> None:
    wanted = int(Feature.VERSION_1)
    for feature in (*COMMON, *BLOCK):
        wanted |= feature
    assert rig.driver.offered == rig.device.avail_features == wanted


@pytest.mark.parametrize("feature", [*COMMON, *BLOCK], ids=hex)
def test_each_feature_can_be_switched_off(
    new_rig: MakeRig, feature: Feature | BlockFeature
) -> None:
    everything = new_rig().device.avail_features
    rig = new_rig(
        config=BlockConfig(queue_size=16, disabled_features=feature), backend=new_backend()
    )
    gone = int(feature)
    if feature is BlockFeature.FLUSH:
        gone |= int(BlockFeature.CONFIG_WCE)  # 5.2.5.2: not without FLUSH
    assert rig.driver.offered == everything & ~gone
    assert not rig.driver.negotiate(everything)
    rig.driver.start()
    assert rig.driver.request(0, 1, room=512) == (0, 513, bytes(512))
    assert rig.driver.request(1, 1, data=b"x" * 512) == (0, 1, b"")


def new_backend() -> MemoryBackend:
    return MemoryBackend(bytearray(DISK_SECTORS * 512))


def test_all_features_can_be_switched_off_at_once(new_rig: MakeRig) -> None:
    off = 0
    for feature in (*COMMON, *BLOCK):
        off |= feature
    rig = new_rig(config=BlockConfig(queue_size=16, disabled_features=off))
    assert rig.driver.offered == Feature.VERSION_1
    rig.driver.start()
    assert rig.driver.request(0, 2, room=512).data == b"\2" * 512
    space = rig.device.read_config(0, 64)
    assert space == struct.pack("<Q", DISK_SECTORS) + bytes(56)


def test_read_only_disk_offers_nothing_that_writes() -> None:
    for disk in (
        device(BlockConfig(read_only=True)),
        device(BlockConfig(), MemoryBackend(bytes(512))),
    ):
        assert disk.avail_features & BlockFeature.RO
        assert not disk.avail_features & (BlockFeature.DISCARD | BlockFeature.WRITE_ZEROES)


def test_backend_that_cannot_discard_or_zero(new_rig: MakeRig) -> None:
    backend = new_backend()
    backend.can_discard = False
    features = device(BlockConfig(), backend).avail_features
    assert not features & BlockFeature.DISCARD
    assert features & BlockFeature.WRITE_ZEROES
    backend.can_discard, backend.can_write_zeroes = True, False
    features = device(BlockConfig(), backend).avail_features
    assert features & BlockFeature.DISCARD
    assert not features & BlockFeature.WRITE_ZEROES


def test_what_no_backend_can_honour_is_not_offered() -> None:
    never = BlockFeature.SECURE_ERASE | BlockFeature.LIFETIME | BlockFeature.GEOMETRY
    assert not device(BlockConfig()).avail_features & never


# Configuration space


def test_configuration_space_is_on_the_page(new_rig: MakeRig) -> None:
    rig = new_rig(config=BlockConfig(queue_size=128, queues=4))
    raw = rig.device.read_config(0, FIELDS.size)
    assert rig.transport.page[Register.CONFIG : Register.CONFIG + FIELDS.size] == raw
    assert Space._make(FIELDS.unpack(raw)) == Space(
        capacity=DISK_SECTORS,
        size_max=2 << 20,
        seg_max=126,
        cylinders=0,
        heads=0,
        sectors=0,
        blk_size=512,
        physical_block_exp=3,
        alignment_offset=0,
        min_io_size=8,
        opt_io_size=0,
        writeback=1,
        unused0=0,
        num_queues=4,
        max_discard_sectors=1 << 22,
        max_discard_seg=32,
        discard_sector_alignment=8,
        max_write_zeroes_sectors=1 << 14,
        max_write_zeroes_seg=32,
        write_zeroes_may_unmap=1,
    )
    assert rig.device.read_config(56, 8) == raw[56:] + bytes(4)
    assert rig.device.read_config(1000, 3) == bytes(3)
    assert rig.device.capacity_sectors == DISK_SECTORS


def test_block_sizes() -> None:
    space = space_of(BlockConfig(block_size=4096))
    assert (space.blk_size, space.physical_block_exp, space.min_io_size) == (4096, 0, 1)
    space = space_of(BlockConfig(block_size=1024, physical_block_size=1 << 20))
    assert (space.blk_size, space.physical_block_exp, space.min_io_size) == (1024, 10, 1024)
    # The physical block is never the smaller one.
    space = space_of(BlockConfig(block_size=2048, physical_block_size=512))
    assert (space.physical_block_exp, space.min_io_size) == (0, 1)
    assert space.discard_sector_alignment == 4


@pytest.mark.parametrize("queue_size", [4, 64, 256, 1024])
def test_the_largest_advised_request_is_not_refused(queue_size: int) -> None:
    space = space_of(BlockConfig(queue_size=queue_size))
    assert space.size_max >= 256 << 10
    assert 16 + space.size_max * space.seg_max + 1 < MAX_CHAIN_BYTES


def test_zeroing_that_frees_nothing_says_so() -> None:
    backend = new_backend()
    backend.can_discard = False
    assert space_of(BlockConfig(), backend).write_zeroes_may_unmap == 0


# Queues


def test_up_to_eight_queues_serve(new_rig: MakeRig) -> None:
    rig = new_rig(config=BlockConfig(queue_size=16, queues=8), queue_size=16)
    assert rig.device.queue_max_sizes == (16,) * 8
    drivers = [rig.driver]
    for index in range(1, 8):
        driver = BlockDriver(rig.transport, rig.memory, size=16, index=index)
        driver._top = rig.memory.regions[0].gpa + index * 0x10000
        areas = [driver.alloc(length, 16) for length in (256, 64, 256)]
        driver.desc, driver.avail, driver.used = areas
        drivers.append(driver)
    assert rig.driver.negotiate()
    for driver in drivers:
        driver.setup_queue()
    rig.driver.set(Register.STATUS, 15)
    for index in (7, 0, 3, 7, 1, 2, 4, 5, 6):
        answer = drivers[index].request(0, 10 + index, room=512)
        assert answer == (0, 513, bytes([10 + index]) * 512)
    rig.driver.set(Register.QUEUE_SEL, 8)
    assert rig.driver.reg(Register.QUEUE_NUM_MAX) == 0


# Resize


def test_grown_file_is_seen_by_the_running_driver(rig: Rig) -> None:
    driver = rig.driver
    assert not rig.device.refresh()
    generation = driver.reg(Register.CONFIG_GENERATION)
    with rig.path.open("r+b") as file:
        file.truncate(100 * 512)
    assert driver.request(0, 90, room=512).status == 1
    assert rig.device.refresh()
    rig.interrupt_status()
    rig.transport.config_changed()
    assert rig.device.capacity_sectors == driver.reg(Register.CONFIG) == 100
    assert driver.reg(Register.CONFIG_GENERATION) != generation
    assert rig.interrupt_status() & InterruptBit.CONFIG_CHANGE
    assert driver.request(1, 99, data=b"n" * 512).status == 0
    assert driver.request(0, 99, room=512) == (0, 513, b"n" * 512)
    assert driver.request(1, 100, data=b"n" * 512).status == 1
    assert driver.status == Status.DRIVER_OK | 11


# What a user can get wrong


@pytest.mark.parametrize("serial", ["x" * 21, "caf\u00e9", "a\nb"])
def test_bad_serial_is_refused(serial: str) -> None:
    with pytest.raises(ConfigError, match="--disk serial"):
        BlockConfig(serial=serial)


@pytest.mark.parametrize("size", [0, 2, 3, 100, 2048, -4])
def test_bad_queue_size_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=r"queue size: .* power of 2 from 4 to 1024"):
        BlockConfig(queue_size=size)


@pytest.mark.parametrize("queues", [0, -1, 9])
def test_bad_number_of_queues_is_refused(queues: int) -> None:
    with pytest.raises(ConfigError, match=r"--disk queues: .* not within 1 to 8"):
        BlockConfig(queues=queues)


@pytest.mark.parametrize("size", [1, 256, 513, 8192, -512])
def test_bad_block_size_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=r"block size: .* power of 2 from 512 to 4096"):
        BlockConfig(block_size=size)


@pytest.mark.parametrize("size", [0, 511, 3000, 1 << 21])
def test_bad_physical_block_size_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=r"physical block size: .* power of 2 from 512"):
        BlockConfig(physical_block_size=size)


def test_features_that_are_no_choice() -> None:
    for feature in (Feature.VERSION_1, BlockFeature.RO):
        with pytest.raises(ConfigError, match="cannot be switched off"):
            BlockConfig(disabled_features=feature)
    with pytest.raises(ConfigError, match="need the feature MQ"):
        BlockConfig(queues=2, disabled_features=BlockFeature.MQ)


def test_defaults_are_valid_and_limit_nothing(tmp_path: Path) -> None:
    assert BlockConfig().rate_limit == RateLimit()
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(512))
    backend = RawBackend(str(path), report=print)
    assert BlockDevice(BlockConfig(), backend).capacity_sectors == 1
    backend.close()
