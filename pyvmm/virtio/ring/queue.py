"""What a virtqueue is, whatever its ring format: the registers that describe it, the descriptor
chains taken from it and the face of a ring.

``Queue`` is what the driver wrote into the transport's registers.  A ``Ring`` is made from it
when the device is activated (``rings.make_ring``) and is the only thing that touches the rings
in guest memory.  A device never sees more than ``Chain``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from pyvmm.startup.types import Protocol

Buffer = tuple[int, int]
"""``(gpa, length)``: guest physical address and bytes, as the driver gave them: unchecked."""

PlainChain = tuple[int, int, int, int, int, int, Sequence[Buffer]]
"""``(token, header, data, length, writes, status, pieces)``: a chain as drivers of disks lay out
nearly all of theirs, in a form that costs little to make.

Its descriptors are, in a row: a readable one of 16 bytes at GPA ``header``; one or more of data,
``length`` bytes in all, writable if ``writes`` is not 0, else readable; a writable one of 1 byte
at GPA ``status``.  None is empty.  ``data`` is the GPA of the first of data, and ``pieces`` holds
them all if they are several, else nothing.  ``token`` is for ``Ring.push_all``; its low 16 bits
are the head, the others ``Chain.slots`` of a packed ring.

A lone chain (``Ring.alone``) may also have no data at all: then ``length`` is 0.
"""
PLAIN_HEADER_BYTES = 16
PLAIN_STATUS_BYTES = 1
SLOTS_SHIFT = 16
_HEAD_MASK = (1 << SLOTS_SHIFT) - 1
DESCRIPTOR_WORK = 8 << 10
"""Bytes that a descriptor counts for in the work of a pass, besides its length.  Walking it and
finding its memory takes 2 us, as does moving so many bytes."""
TOKEN_BITS = 32
"""How wide a token is: ``token | written << TOKEN_BITS`` is what ``Ring.push_all`` takes."""


class Queue:
    """The registers of one virtqueue (4.2.2 "MMIO Device Register Layout").

    ``size`` is in entries; ``descriptor_area``, ``driver_area`` and ``device_area`` are guest
    physical addresses, ``None`` until the driver has written them.  Values are kept as written:
    they are checked when a ring is made of them, at QueueReady.

    ``base`` is where the ring goes on, as ``Ring.base`` says it; None for a ring that begins,
    which is all that virtio-mmio knows.
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


def chain_of(plain: PlainChain) -> Chain:
    """``plain`` as any other chain."""
    token, header, data, length, writes, status, pieces = plain
    readable, writable = [(header, PLAIN_HEADER_BYTES)], [(status, PLAIN_STATUS_BYTES)]
    if length:
        buffers = list(pieces) or [(data, length)]
        if writes:
            writable[:0] = buffers
        else:
            readable += buffers
    return Chain(token & _HEAD_MASK, readable, writable, token >> SLOTS_SHIFT or 1)


def plain_work(plain: PlainChain) -> int:
    """Return the work of ``plain`` in a pass, the same as ``chain_work(chain_of(plain))``."""
    descriptors = 2 + (len(plain[6]) or bool(plain[3]))
    return plain[3] + PLAIN_HEADER_BYTES + PLAIN_STATUS_BYTES + descriptors * DESCRIPTOR_WORK


class Ring(Protocol):
    """How a device takes chains from a virtqueue and gives them back.

    A pass is: ``chains``, ``push`` for each of them, ``publish``, ``pending``.  While it lasts the
    driver is asked not to notify.

    A device that can do more with plain chains has a pass of its own in place of ``chains``:
    ``begin``, then ``plain`` and ``walk`` in turn until nothing is left.  And because a driver
    often waits for each request before it makes the next, there is a shorter one for a single
    chain: ``alone``, ``answer``, ``pending``.

    VIRTIO_F_IN_ORDER is kept as long as chains are pushed in the order they were taken.  It
    would *allow* to write one used element for a batch of chains whose buffers were all filled
    completely.  Finding that out costs more than the element it saves, and a driver that looks
    for every element is served too; so every chain gets its own: a batch of one.
    """

    near: memoryview
    """The region of RAM that the ring is in, where most of what its chains name is too."""
    near_gpa: int
    """The GPA of its first byte."""

    def chains(self) -> Iterator[Chain]:
        """The chains waiting now, at most a queue's length of them.

        Chains left when the iteration is abandoned are for the next pass.  Raises RingError
        where the ring is malformed.
        """

    @property
    def base(self) -> int:
        """Where the ring stands after a pass: with this as ``Queue.base`` another one goes on.

        The numbers are those of SET_VRING_BASE (vhost-user).  Split: the available index, 16
        bits; how far used chains are is in the used ring.  Packed: the next available slot in
        bits 0 to 14, its wrap counter in bit 15, and above them the same of the next used slot.
        """

    def give_back(self) -> None:
        """Make every chain that was taken and not pushed available again, and end the pass.

        The next pass takes the same chains in the same order.  The caller forgets them.
        """

    def begin(self) -> None:
        """Begin a pass: ask the driver to be quiet, look what is waiting.  RingError."""

    def plain(self, work_limit: int) -> tuple[list[PlainChain], int, bool]:
        """Take the chains that come next, as long as they are plain; never raises.

        They end early once they are ``work_limit`` of work (``plain_work``).  With them come the
        work that is left of the limit, and whether a chain follows that is not known to be plain.
        """

    def alone(self) -> PlainChain | None:
        """Begin a pass as ``begin`` does; if one chain waits, in an indirect table with one data
        buffer or none, take it.  Else None: nothing is taken, the pass goes on.  RingError."""

    def answer(self, token: int, written: int) -> bool:
        """``push`` for the chain that ``alone`` took, and ``publish``."""

    def walk(self) -> Chain | None:
        """Take the next chain of the pass, of any shape; None if there is none.  RingError."""

    def push(self, chain: Chain, written: int) -> None:
        """Give ``chain`` back with ``written`` bytes written into it; not yet visible."""

    def push_all(self, done: list[int]) -> None:
        """``push`` for plain chains: ``token | written << TOKEN_BITS`` of each, in order."""

    def publish(self) -> bool:
        """Show the driver every chain pushed so far; whether it wants an interrupt for them."""

    def pending(self) -> bool:
        """End the pass: ask the driver to notify again, then look whether chains are waiting.

        What the driver adds after that look it announces.
        """


FullFence = threading.Lock
"""Entering one, with nothing inside, orders this thread's earlier stores before its later loads.

x86 keeps stores in order and loads in order, but lets a load overtake an earlier store.  CPython
has no fence; taking a free lock executes a locked instruction, which is one.  A ring has a lock of
its own for that, and ``with`` takes it without a call of a Python function (40 ns).
"""
