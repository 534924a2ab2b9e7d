"""What a user can choose about a block device, and its configuration space."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pyvmm.errors import ConfigError
from pyvmm.virtio.spec import BLOCK_ID_SIZE

MIN_QUEUE_SIZE = 4
"""The smallest power of 2 that holds a header, a segment and a status byte."""
MAX_QUEUE_SIZE = 1024

# struct virtio_blk_config up to blk_size: le64 capacity; le32 size_max; le32 seg_max;
# struct { le16 cylinders; u8 heads; u8 sectors; } geometry; le32 blk_size;
_CONFIG_SPACE = struct.Struct("<QIIHBBI")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockConfig:
    """One block device.

    ``serial`` is the ID string the guest can ask for, at most 20 ASCII characters.
    ``read_only`` refuses every write, whatever the backend allows.  ``queue_size`` is the most
    entries the driver may give the queue, a power of 2.
    """

    serial: str = ""
    read_only: bool = False
    queue_size: int = 256

    def __post_init__(self) -> None:
        if len(self.serial) > BLOCK_ID_SIZE:
            raise ConfigError(
                "--disk serial",
                f"{self.serial!r} has {len(self.serial)} characters, "
                f"the limit is {BLOCK_ID_SIZE}",
            )
        if not (self.serial.isascii() and (self.serial.isprintable())):
            raise ConfigError("--disk serial", f"{self.serial!r} is not printable ASCII")
        size = self.queue_size
        if not MIN_QUEUE_SIZE <= size <= MAX_QUEUE_SIZE or size & (size - 1):
            raise ConfigError(
                "--disk queue size",
                f"{size} is not a power of 2 from {MIN_QUEUE_SIZE} to {MAX_QUEUE_SIZE}",
            )

    @property
    def seg_max(self) -> int:
        """The most data segments of a request: a chain holds no more than ``queue_size``
        descriptors, and header and status may take one each."""
        return self.queue_size - 2


def config_space(*, capacity_sectors: int, seg_max: int, block_size: int) -> bytes:
    """The configuration space (5.2.4 "Device configuration layout"); ``block_size`` in bytes.

    size_max and geometry stay 0: their features are not offered.
    """
    return _CONFIG_SPACE.pack(capacity_sectors, 0, seg_max, 0, 0, 0, block_size)
