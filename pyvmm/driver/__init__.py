"""The driver half of virtio-blk: submit block requests, collect completions.

``VirtioBlkQueue`` over a ``Transport``; the API follows the Rust crate ``virtio-driver`` of
libblkio.  ``docs/driver.md`` has a worked example and what is tested by what.
"""

from pyvmm.driver.errors import (
    DeviceBrokenError,
    QueueFullError,
    RequestError,
    TransportError,
)
from pyvmm.driver.memory import SharedMemory
from pyvmm.driver.queue import VirtioBlkQueue
from pyvmm.driver.request import Completion
from pyvmm.driver.transport import Transport

__all__ = [
    "Completion",
    "DeviceBrokenError",
    "QueueFullError",
    "RequestError",
    "SharedMemory",
    "Transport",
    "TransportError",
    "VirtioBlkQueue",
]
