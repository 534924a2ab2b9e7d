"""What the driver half raises, by culprit: the caller, the device, or nobody (a full queue)."""

from __future__ import annotations

from pyvmm.errors import DriverError


class QueueFullError(DriverError):
    """There is no room for the request in the queue now; nothing of it was queued.

    Collect completions, then try again.
    """


class RequestError(DriverError):
    """The caller's request cannot be made: alignment, length, range, a read-only disk, a feature
    that was not negotiated, memory that was not mapped.  Nothing was queued."""


class TransportError(DriverError):
    """The transport cannot do what the caller asks of it: too many queues or regions, memory
    that overlaps, calls in the wrong order; or the device refused it."""


class DeviceBrokenError(DriverError):
    """The device broke a rule of virtio, or is gone: nothing it says is believed any more.

    ``VirtioBlkQueue.abandon`` hands back the contexts of what was in flight.
    """
