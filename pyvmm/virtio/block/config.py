"""The choices a user has about a block device, the features it therefore offers, and its
configuration space."""

from __future__ import annotations

import struct

from pyvmm.errors import ConfigError
from pyvmm.startup.types import TYPE_CHECKING, Record
from pyvmm.virtio.device import MAX_CHAIN_BYTES
from pyvmm.virtio.rate_limit import RateLimit
from pyvmm.virtio.spec import BLOCK_ID_SIZE, SECTOR_SIZE, BlockFeature, Feature

if TYPE_CHECKING:
    from pyvmm.storage.backend import BlockBackend

MIN_QUEUE_SIZE = 4
"""The smallest power of 2 that holds a header, a segment and a status byte."""
MAX_QUEUE_SIZE = 1024
MAX_QUEUES = 8
MAX_BLOCK_SIZE = 4096
"""Bytes, logical; Linux takes no block larger than a page."""
MAX_PHYSICAL_BLOCK_SIZE = 1 << 20

_MAX_SIZE_MAX = 4 << 20
MAX_SEGMENTS = 32
"""Ranges of one discard or write-zeroes request."""
MAX_DISCARD_SECTORS = 1 << 22
"""2 GiB a range: the file system of the host frees extents, it does not touch data."""
MAX_WRITE_ZEROES_SECTORS = 1 << 14
"""8 MiB a range: a file system that cannot zero a range has the zeroes written."""

_NOT_SWITCHABLE = int(Feature.VERSION_1 | BlockFeature.RO)
_ALWAYS = int(
    Feature.VERSION_1
    | Feature.INDIRECT_DESC
    | Feature.EVENT_IDX
    | Feature.RING_PACKED
    | Feature.RING_RESET
    | Feature.IN_ORDER
    | BlockFeature.SIZE_MAX
    | BlockFeature.SEG_MAX
    | BlockFeature.BLK_SIZE
    | BlockFeature.FLUSH
    | BlockFeature.TOPOLOGY
    | BlockFeature.CONFIG_WCE
    | BlockFeature.MQ
)

# struct virtio_blk_config up to the fields of VIRTIO_BLK_F_LIFETIME (5.2.4): le64 capacity;
# le32 size_max; le32 seg_max; struct { le16 cylinders; u8 heads; u8 sectors; } geometry;
# le32 blk_size; struct { u8 physical_block_exp; u8 alignment_offset; le16 min_io_size;
# le32 opt_io_size; } topology; u8 writeback; u8 unused0; u16 num_queues; le32
# max_discard_sectors; le32 max_discard_seg; le32 discard_sector_alignment; le32
# max_write_zeroes_sectors; le32 max_write_zeroes_seg; u8 write_zeroes_may_unmap; u8 unused1[3];
_CONFIG_SPACE = struct.Struct("<QIIHBBIBBHIBxHIIIIIB3x")
WRITEBACK_OFFSET = 32
"""Offset of the one field that a driver may write."""
_PLAIN_END, _WRITE_ZEROES_END, _SECURE_ERASE_END = 36, 57, 72


class BlockConfig(Record):
    """One block device.

    ``serial`` is the ID string the guest can ask for, at most 20 printable ASCII characters.
    ``read_only`` refuses every write, whatever the backend allows.  ``queue_size`` is the most
    entries the driver may give a queue, a power of 2; there are ``queues`` of them.

    ``block_size`` is the logical block shown to the guest, in bytes; 0 is the backend's.
    ``physical_block_size`` is the unit writes should be aligned to, in bytes: a page of the
    host's page cache unless something else is known.  Both are powers of 2, and advice: the
    protocol is in sectors of 512 bytes whatever they say.

    ``writeback`` is the cache mode the driver finds: True for a volatile cache that it flushes,
    False for writes that are stable once they complete.

    ``disabled_features`` are feature bits not to offer, ``Feature`` and ``BlockFeature`` in one
    word.  VERSION_1 and RO are no choice: legacy is not served, and RO says what ``read_only`` is.
    """

    serial: str = ""
    read_only: bool = False
    queue_size: int = 256
    queues: int = 1
    block_size: int = 0
    physical_block_size: int = 4096
    writeback: bool = True
    rate_limit: RateLimit = RateLimit()
    disabled_features: int = 0

    def __post_init__(self) -> None:
        if len(self.serial) > BLOCK_ID_SIZE:
            raise ConfigError(
                "--disk serial",
                f"{self.serial!r} has {len(self.serial)} characters, "
                f"the limit is {BLOCK_ID_SIZE}",
            )
        if not (self.serial.isascii() and (self.serial.isprintable())):
            raise ConfigError("--disk serial", f"{self.serial!r} is not printable ASCII")
        _check_power_of_2("queue size", self.queue_size, MIN_QUEUE_SIZE, MAX_QUEUE_SIZE)
        if not 1 <= self.queues <= MAX_QUEUES:
            raise ConfigError("--disk queues", f"{self.queues} is not within 1 to {MAX_QUEUES}")
        if self.queues > 1 and self.disabled_features & BlockFeature.MQ:
            raise ConfigError("--disk queues", f"{self.queues} queues need the feature MQ")
        if self.block_size:
            _check_power_of_2("block size", self.block_size, SECTOR_SIZE, MAX_BLOCK_SIZE)
        _check_power_of_2(
            "physical block size", self.physical_block_size, SECTOR_SIZE, MAX_PHYSICAL_BLOCK_SIZE
        )
        if self.disabled_features & _NOT_SWITCHABLE:
            raise ConfigError("--disk features", "VERSION_1 and RO cannot be switched off")


def size_max(ring_size: int) -> int:
    """Return the bytes a data segment may have: 1 MiB with a ring of 256.  A longer one is served
    too.  As many segments as there may be, of this size, are less than MAX_CHAIN_BYTES.

    Guests have large buffers in few pieces, and one segment costs less than four.
    """
    return min(MAX_CHAIN_BYTES // ring_size, _MAX_SIZE_MAX)


def seg_max(ring_size: int) -> int:
    """Return the most data segments of a request: header and status may take a descriptor each.

    Without INDIRECT_DESC all of them are in the ring, where a longer chain never finds room.
    Linux takes this number on trust and would wait for ever.
    """
    return ring_size - 2


def _check_power_of_2(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most or value & (value - 1):
        raise ConfigError(
            f"--disk {name}", f"{value} is not a power of 2 from {least} to {most}"
        )


def offered_features(config: BlockConfig, backend: BlockBackend) -> int:
    """Return the features that a device of ``config`` over ``backend`` can serve, without those
    that ``config`` hides."""
    features = _ALWAYS
    if config.read_only or backend.read_only:
        features |= BlockFeature.RO
    else:
        if backend.can_discard:
            features |= BlockFeature.DISCARD
        if backend.can_write_zeroes:
            features |= BlockFeature.WRITE_ZEROES
    features &= ~int(config.disabled_features)  # ~ of an IntFlag drops the bits it does not know
    if not features & BlockFeature.FLUSH:
        # 5.2.5.2 "Device Requirements: Device Initialization": devices "MUST offer it if they
        # offer VIRTIO_BLK_F_CONFIG_WCE".
        features &= ~int(BlockFeature.CONFIG_WCE)
    return features


def config_space(
    config: BlockConfig, backend: BlockBackend, features: int, *, writeback: bool, ring_size: int
) -> bytes:
    """Return the configuration space of a device that offers ``features``.

    5.2.4 "Device configuration layout"; fields of other features are 0.  Its advice suits rings
    of ``ring_size`` entries and more."""

    def of(feature: BlockFeature, value: int) -> int:
        return value if features & feature else 0

    block = config.block_size or backend.block_size
    physical = max(config.physical_block_size, block)
    return _CONFIG_SPACE.pack(
        backend.size_bytes // SECTOR_SIZE,
        of(BlockFeature.SIZE_MAX, size_max(ring_size)),
        of(BlockFeature.SEG_MAX, seg_max(ring_size)),
        *(0, 0, 0),  # geometry
        of(BlockFeature.BLK_SIZE, block),
        of(BlockFeature.TOPOLOGY, (physical // block).bit_length() - 1),
        0,  # alignment_offset: the first block begins where the disk does
        of(BlockFeature.TOPOLOGY, physical // block),  # min_io_size
        0,  # opt_io_size: none is better than another
        of(BlockFeature.CONFIG_WCE, writeback),
        of(BlockFeature.MQ, config.queues),
        of(BlockFeature.DISCARD, MAX_DISCARD_SECTORS),
        of(BlockFeature.DISCARD, MAX_SEGMENTS),
        of(BlockFeature.DISCARD, physical // SECTOR_SIZE),
        of(BlockFeature.WRITE_ZEROES, MAX_WRITE_ZEROES_SECTORS),
        of(BlockFeature.WRITE_ZEROES, MAX_SEGMENTS),
        of(BlockFeature.WRITE_ZEROES, backend.can_discard),
    )


def config_space_length(features: int) -> int:
    """Return the bytes of configuration space that every device with ``features`` has.

    A vhost-user back end may refuse to show more than it has."""
    if features & BlockFeature.SECURE_ERASE:
        return _SECURE_ERASE_END
    if features & (BlockFeature.DISCARD | BlockFeature.WRITE_ZEROES):
        return _WRITE_ZEROES_END
    return _PLAIN_END
