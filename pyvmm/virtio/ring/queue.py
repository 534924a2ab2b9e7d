"""Virtqueues of any ring format: the registers, the descriptor chains and the methods of a ring.

``Queue`` is what the driver wrote into the transport's registers.  A ``Ring`` is made from it
when the device is activated (``rings.make_ring``) and is the only thing that touches the rings
in guest memory.  A device never sees more than ``Chain``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from pyvmm.startup.types import Protocol

Buffer = tuple[int, int]
"""``(gpa, length)``: guest physical address and bytes, as the driver gave them: unchecked."""

DESCRIPTOR_WORK = 8 << 10
"""Bytes that a descriptor counts for in the work of a pass, besides its length.  Walking it and
finding its memory takes 2 us, as does moving so many bytes."""
_MAX_REGISTER, _MAX_ADDRESS = (1 << 32) - 1, (1 << 64) - 1


class Queue:
    """The registers of one virtqueue (4.2.2 "MMIO Device Register Layout").

    ``size`` is in entries; ``descriptor_area``, ``driver_area`` and ``device_area`` are guest
    physical addresses, ``None`` until the driver has written them.  Values are kept as written:
    they are checked when a ring is made of them, at QueueReady.

    ``base`` is where the ring goes on, as ``Ring.base`` says it; None for a ring that begins.
    virtio-mmio knows no other, and a vhost-user front end says it anew at each start.  So it is
    no part of the state.
    """

    __slots__ = (
        "base", "descriptor_area", "device_area", "driver_area", "max_size", "ready", "size"
    )

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self.reset()

    def reset(self) -> None:
        """Forget everything the driver wrote."""
        self.size = 0
        self.ready = False
        self.descriptor_area: int | None = None
        self.driver_area: int | None = None
        self.device_area: int | None = None
        self.base: int | None = None

    def save(self) -> dict[str, object]:
        """Return the registers as the driver wrote them (docs/architecture.md, "State")."""
        return {
            "size": self.size, "ready": self.ready, "descriptor_area": self.descriptor_area,
            "driver_area": self.driver_area, "device_area": self.device_area,
        }

    def restore(self, data: object) -> None:
        """Take what ``save`` returned; StateError."""
        from pyvmm.state import Fields  # not on the boot path

        fields = Fields("queue", data)
        size, ready = fields.integer("size", 0, _MAX_REGISTER), fields.boolean("ready")
        areas = [
            fields.optional_integer(name, 0, _MAX_ADDRESS)
            for name in ("descriptor_area", "driver_area", "device_area")
        ]
        fields.end()
        self.size, self.ready = size, ready
        self.descriptor_area, self.driver_area, self.device_area = areas


class Chain:
    """One descriptor chain, copied out of the ring.

    ``head`` is the identity the driver knows it by: the index of its first descriptor in a split
    ring, its buffer ID in a packed one.  ``readable`` buffers are for the device to read,
    ``writable`` ones for it to write; empty buffers are left out.  The ring has checked the
    structure; the addresses are unchecked.  ``slots`` is the ring's own: how many places of a
    packed ring it takes up.  ``empty`` is how many buffers were left out.
    """

    __slots__ = ("empty", "head", "readable", "slots", "writable")

    def __init__(
        self,
        head: int,
        readable: list[Buffer],
        writable: list[Buffer],
        slots: int = 1,
        empty: int = 0,
    ) -> None:
        self.head = head
        self.readable = readable
        self.writable = writable
        self.slots = slots
        self.empty = empty


class Ring(Protocol):
    """How a device takes chains from a virtqueue and gives them back.

    A pass is: ``take_chains``, ``push`` for each of them, ``publish``, ``enable_notifications``.
    ``virtio/block/fast`` has an extension for disks, with other ways to make a pass.

    VIRTIO_F_IN_ORDER is kept as long as chains are pushed in the order they were taken.  It
    would *allow* to write one used element for a batch of chains whose buffers were all filled
    completely.  Finding that out costs more than the element it saves, and a driver that looks
    for every element is served too; so every chain gets its own: a batch of one.
    """

    def take_chains(self) -> Iterator[Chain]:
        """Ask the driver not to notify, then take the waiting chains one by one, at most a
        queue's length of them.

        Chains left when the iteration is abandoned are there for the next pass.  Raises
        RingError where the ring is malformed.
        """

    def untake(self) -> None:
        """Make every chain that was taken and not pushed available again, and end the pass.

        The next pass takes the same chains in the same order.  The caller forgets them.
        """

    def push(self, chain: Chain, written: int) -> None:
        """Give ``chain`` back with ``written`` bytes written into it; not yet visible."""

    def publish(self) -> bool:
        """Show the driver every chain pushed so far; True if it wants an interrupt for them."""

    def enable_notifications(self) -> bool:
        """End the pass: ask the driver to notify again; True if chains are waiting already.

        The driver announces chains that it adds after this look.
        """

    @property
    def base(self) -> int:
        """Return the ring's position after a pass: a ring with this ``Queue.base`` goes on there.

        The numbers are those of SET_VRING_BASE (vhost-user).  Split: the available index, 16
        bits; the used ring has the used index.  Packed: the next available slot in bits 0 to 14,
        its wrap counter in bit 15, and above them the same of the next used slot.
        """

    def save(self) -> dict[str, object]:
        """Return the ring's position (docs/architecture.md, "State").

        Chains that were taken and not pushed count as available: whoever goes on serves them.
        """

    def restore(self, data: object) -> None:
        """Go on at the position that ``save`` returned.  Guest memory is not looked at;
        StateError."""


FullFence = threading.Lock
"""Entering one, with nothing inside, orders this thread's earlier stores before its later loads.

x86 keeps stores in order and loads in order, but lets a load overtake an earlier store.  CPython
has no fence; taking a free lock executes a locked instruction, which is one.  A ring has a lock of
its own for that, and ``with`` takes it without a call of a Python function (40 ns).
"""
