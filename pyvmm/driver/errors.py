"""The errors of the driver half, by culprit: the caller, the device, or nobody (a full queue)."""

from __future__ import annotations

from pyvmm.errors import DriverError


class QueueFullError(DriverError):
    """There is no room for the request in the queue now; nothing of it was queued.

    Collect completions, then try again.
    """


class RequestError(DriverError):
    """The caller's request cannot be made; nothing was queued.

    Its alignment, length or range is wrong, the disk is read-only, a feature was not negotiated, or
    memory was not mapped.
    """


class TransportError(DriverError):
    """The transport cannot do what the caller asks of it, or the device refused it.

    For example: too many queues or regions, memory that overlaps, calls in the wrong order.
    """


class DeviceBrokenError(DriverError):
    """The device broke a rule of virtio, or is gone: it is not trusted any more.

    ``VirtioBlkQueue.abandon`` hands back the contexts of the requests in flight.
    """
