"""virtio-blk (virtio 1.2, 5.2 "Block Device")."""

from pyvmm.virtio.block.config import BlockConfig
from pyvmm.virtio.block.device import BlockDevice

__all__ = ["BlockConfig", "BlockDevice"]
