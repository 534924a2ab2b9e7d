"""The interface that the driver's split and packed rings share, and the places of their parts.

Memory that a device can write is not trusted.  The free descriptors, the chains in flight and the
progress of each side are known here, and not read back from the memory that the device shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from pyvmm.virtio.ring.chains import DESCRIPTOR_SIZE

Descriptor = tuple[int, int, int]
"""``(address, length, flags)`` of a buffer; the only flags are WRITE and INDIRECT."""

_AREA_ALIGNMENT = 64  # a cache line of its own for each side's part; the spec asks for 16, 2, 4
_RING_HEADER_AND_EVENT = 6  # le16 flags, le16 idx, le16 event of a split ring's halves
_EVENT_SUPPRESSION = 4


class DriverRing(Protocol):
    """A ring in which a driver makes chains available and learns which were used.

    A chain is known by its head: a number below the queue size that no other chain in flight has.
    """

    free: int
    """The number of free descriptors; a chain of so many can be pushed."""

    @property
    def next_head(self) -> int:
        """The head of the chain that is pushed next.  Only while ``free`` is not 0."""

    def push(self, chain: Sequence[Descriptor]) -> None:
        """Make ``chain`` available to the device: 1 to ``free`` descriptors."""

    def push_one(self, address: int, length: int, flags: int) -> None:
        """``push`` of a single descriptor."""

    def notification_needed(self) -> bool:
        """True if the device wants to be notified of chains pushed since the last call."""

    def set_interrupts(self, enabled: bool) -> None:
        """Ask the device for interrupts when it has used chains, or for none."""

    def take_used(self) -> list[int]:
        """Return the heads of the chains used since the last call, oldest first; they are free
        again.

        If interrupts are enabled, the next used chain raises one.  DeviceBrokenError if the device
        names a chain that is not in flight; the chains used before that have been returned by then.
        """

    def release(self) -> None:
        """Drop every view of the ring's memory; nothing can be done with the ring any more."""


class RingAreas(NamedTuple):
    """The offsets at which a ring's three areas begin, and its ``end``, in bytes from its start.

    The start is aligned to 64.
    """

    descriptor: int
    driver: int
    device: int
    end: int


def ring_areas(size: int, *, packed: bool) -> RingAreas:
    """Return the areas of a ring of ``size`` entries.

    2.7 "Split Virtqueues" and 2.8.10.1 "Structure Size and Alignment" have sizes and alignments.
    """
    driver = align(DESCRIPTOR_SIZE * size)
    if packed:
        device = align(driver + _EVENT_SUPPRESSION)
        return RingAreas(0, driver, device, align(device + _EVENT_SUPPRESSION))
    device = align(driver + _RING_HEADER_AND_EVENT + 2 * size)
    return RingAreas(0, driver, device, align(device + _RING_HEADER_AND_EVENT + 8 * size))


def align(offset: int) -> int:
    """Return ``offset`` or the next multiple of 64."""
    return -(-offset // _AREA_ALIGNMENT) * _AREA_ALIGNMENT
