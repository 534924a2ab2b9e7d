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
from pyvmm.driver.in_process import InProcessTransport
from pyvmm.driver.memory import SharedMemory
from pyvmm.driver.queue import VirtioBlkQueue
from pyvmm.driver.request import Completion
from pyvmm.driver.transport import Transport
from pyvmm.driver.vhost_user import VhostUserTransport
from pyvmm.driver.vhost_vdpa import VhostVdpaTransport
from pyvmm.errors import DriverError

__all__ = [
    "Completion",
    "DeviceBrokenError",
    "DriverError",
    "InProcessTransport",
    "QueueFullError",
    "RequestError",
    "SharedMemory",
    "Transport",
    "TransportError",
    "VhostUserTransport",
    "VhostVdpaTransport",
    "VirtioBlkQueue",
]
