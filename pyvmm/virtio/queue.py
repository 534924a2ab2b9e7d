"""What a virtqueue is, whatever its ring format: the registers that describe it, the descriptor
chains taken from it and the face of a ring.

``Queue`` is what the driver wrote into the transport's registers.  A ``Ring`` is made from it
when the device is activated (``device.make_ring``) and is the only thing that touches the rings
in guest memory.  A device never sees more than ``Chain``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Protocol

Buffer = tuple[int, int]
"""``(gpa, length)``: guest physical address and bytes, as the driver gave them: unchecked."""


class Queue:
    """The registers of one virtqueue (4.2.2 "MMIO Device Register Layout").

    ``size`` is in entries; ``descriptor_area``, ``driver_area`` and ``device_area`` are guest
    physical addresses, ``None`` until the driver has written them.  Values are kept as written:
    they are checked when a ring is made of them, at QueueReady.
    """

    __slots__ = ("descriptor_area", "device_area", "driver_area", "max_size", "ready", "size")

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


class Chain:
    """One descriptor chain, copied out of the ring.

    ``head`` is its descriptor index, which is also the identity the driver knows it by.
    ``readable`` buffers are for the device to read, ``writable`` ones for it to write; empty
    buffers are left out.  The ring has checked the structure; the addresses are unchecked.
    """

    __slots__ = ("head", "readable", "writable")

    def __init__(self, head: int, readable: list[Buffer], writable: list[Buffer]) -> None:
        self.head = head
        self.readable = readable
        self.writable = writable


class Ring(Protocol):
    """How a device takes chains from a virtqueue and gives them back."""

    def chains(self) -> Iterator[Chain]:
        """The chains waiting now, at most a queue's length of them.

        Chains the driver adds meanwhile are for the next pass, and so are those left when the
        iteration is abandoned.  Raises RingError where the ring is malformed.
        """

    def push(self, chain: Chain, written: int) -> None:
        """Give ``chain`` back with ``written`` bytes written into it; not yet visible."""

    def publish(self) -> bool:
        """Show the driver every chain pushed so far; whether it wants an interrupt for them."""

    def pending(self) -> bool:
        """Whether chains are waiting."""


class FullFence:
    """Calling it orders this thread's earlier stores before its later loads.

    x86 keeps stores in order and loads in order, but lets a load overtake an earlier store.
    CPython has no fence; taking a free lock executes a locked instruction, which is one (65 ns).
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self) -> None:
        self._lock.acquire()
        self._lock.release()
