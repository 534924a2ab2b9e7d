"""The contract between a virtio device and its transport.

A device knows features, configuration space, queues and requests.  It knows nothing of
registers, addresses of its own, threads or KVM: ``activate`` gives it guest memory and an
``Interrupt``, and ``process_queue`` does one pass of work on the caller's thread.

The life of a device::

    made -> plug -> +-> set_acked_features -> activate -> process_queue ... -> reset -+ -> close
                    +-------------------------------<----------------------------------+

``plug`` comes once, before the guest runs; ``refresh`` and ``hurry`` may come at any time between
it and ``close``.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Sequence

from pyvmm.errors import ActivateError, GuestError, RingError, StateError
from pyvmm.memory import GuestMemory
from pyvmm.startup.types import TYPE_CHECKING, Protocol, name_of
from pyvmm.virtio.ring.queue import DESCRIPTOR_WORK, Chain, Queue, Ring
from pyvmm.virtio.ring.rings import make_ring
from pyvmm.virtio.spec import MAX_QUEUE_SIZE, DeviceType, Feature

if TYPE_CHECKING:
    from typing import ClassVar

    from pyvmm.run.io_loop import IoSource

_MAX_FEATURES = (1 << 64) - 1
MAX_CHAIN_BYTES = 256 << 20
"""Bytes in the buffers of a chain that a device need consider: a bound on a single one's time."""
PASS_BYTES = 64 << 20
"""After so much work a pass takes no further chain.  Work is bytes moved, and anything else that
takes as long (``chain_work``, CALL_WORK).  The transport's lock is then held for some 20 ms."""
CALL_WORK = 64 << 10
"""The work of a call to the host that moves no bytes: a discard, a flush."""


class Interrupt(Protocol):
    """How a device reaches its driver; safe to call from any thread."""

    def notify_used(self, queue_index: int) -> None:
        """Tell the driver that queue ``queue_index`` has used buffers."""

    def notify_config(self) -> None:
        """Tell the driver that the configuration space or the device status changed."""


class Plug(Protocol):
    """A device's slot, as the device sees it.  Its methods return at once, in any thread."""

    irq_fd: int
    """The eventfd that KVM turns into the device's interrupt."""
    doorbells: tuple[int, ...]
    """The eventfds of the driver's notifications, one for each queue."""

    def serve(self, queue_index: int) -> None:
        """Have the device's thread make a pass over queue ``queue_index`` soon."""

    def refresh(self) -> None:
        """Have the device's thread call ``VirtioDevice.refresh`` soon, and tell the driver."""


class NoSlot:
    """The ``Plug`` of a device that nobody has plugged in: its driver is the only one to ask."""

    irq_fd = -1
    doorbells: tuple[int, ...] = ()

    def serve(self, queue_index: int) -> None:
        """See ``Plug.serve``: there is no thread."""

    def refresh(self) -> None:
        """See ``Plug.refresh``: there is no thread."""


class VirtioDevice(abc.ABC):
    """A virtio device: features, queues and activation; what a request means is a subclass's.

    Not thread-safe: the transport calls every method under one lock, but for ``plug``, ``refresh``,
    ``hurry`` and ``close``, which are the slot's.
    """

    device_type: ClassVar[int]
    """A ``DeviceType``, or the number of a type that it does not list."""
    is_served_elsewhere: ClassVar[bool] = False
    """True if another process serves the queues.  It waits for the slot's doorbells itself and
    writes the slot's ``irq_fd``; guest RAM is memory that it can map."""

    def __init__(self, *, avail_features: int, queue_max_sizes: tuple[int, ...]) -> None:
        if not queue_max_sizes or not all(0 < size <= MAX_QUEUE_SIZE for size in queue_max_sizes):
            raise ValueError(
                f"{type(self).__name__}: queue_max_sizes {queue_max_sizes!r:.80}: a virtio device "
                f"has queues of 1 to {MAX_QUEUE_SIZE} entries, one at least"
            )
        self._slot: Plug = NoSlot()
        self.avail_features = int(avail_features)
        self.queue_max_sizes = queue_max_sizes
        self.queues = [Queue(max_size) for max_size in queue_max_sizes]
        # The device's advice to the driver suits a ring of so many entries.
        self._advised_ring_size = min(queue_max_sizes)
        self._acked_features = 0
        self._memory: GuestMemory | None = None
        self._interrupt: Interrupt | None = None
        self._rings: list[Ring | None] = []

    @property
    def is_plugged(self) -> bool:
        """True once the device has had a slot; a machine's device serves no other."""
        return not isinstance(self._slot, NoSlot)

    def plug(self, slot: Plug) -> Sequence[IoSource]:
        """Take ``slot`` as the device's own; return the sources of the device's own descriptors.

        The device's thread waits for them besides the doorbells: a tap, a socket, a timer.
        """
        self._slot = slot
        return ()

    def refresh(self) -> bool:
        """Look at the host again; True if the configuration space has changed by it.

        The device's thread calls it after ``Plug.refresh`` and on SIGUSR1, perhaps while a pass is
        under way on a vCPU's thread.  The slot then tells the driver.
        """
        return False

    def hurry(self, until_s: float) -> None:  # noqa: B027 - most devices wait for nobody
        """Let no wait for a peer last beyond ``until_s`` (time.monotonic), nor one under way.

        Called once, when the run ends, from any thread.
        """

    def close(self) -> None:  # noqa: B027 - most devices open nothing
        """Free what the device itself has opened; idempotent.  It has been reset before."""

    @property
    def acked_features(self) -> int:
        """The features the driver accepted; 0 until it has."""
        return self._acked_features

    def set_acked_features(self, features: int) -> None:
        """Take ``features`` as what the driver accepts, in place of any earlier set.

        GuestError if they cannot be: then the transport "MUST fail to set the FEATURES_OK
        device status bit" (2.2.2 "Device Requirements: Feature Bits").
        """
        unoffered = features & ~self.avail_features
        if unoffered:
            raise GuestError(f"feature bits {unoffered:#x} were not offered")
        if not features & Feature.VERSION_1:
            # 6.2 "Device Requirements: Reserved Feature Bits": "A device MAY fail to operate
            # further if VIRTIO_F_VERSION_1 is not accepted."
            raise GuestError("VIRTIO_F_VERSION_1 was not accepted; legacy is not served")
        self._acked_features = features

    def expect_rings_of(self, size: int) -> None:
        """Advise the driver of nothing that needs a ring of more than ``size`` entries.

        For a transport that learns how long the rings are after the driver has read the
        configuration space, and perhaps kept it.
        """
        self._advised_ring_size = min(size, *self.queue_max_sizes)

    @abc.abstractmethod
    def read_config(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes of configuration space from ``offset``; zeros behind its end."""

    @abc.abstractmethod
    def write_config(self, offset: int, data: bytes) -> None:
        """Take ``data``, which the driver writes at ``offset``; ignore bytes that are not
        writable."""

    @property
    def is_activated(self) -> bool:
        """True while the device runs: from ``activate`` to ``reset``."""
        return self._memory is not None

    def activate(self, memory: GuestMemory, interrupt: Interrupt) -> None:
        """Start serving the queues that are ready.  The transport calls it once per DRIVER_OK;
        ActivateError if the device runs already or a queue is malformed."""
        if self.is_activated:
            raise ActivateError("the device is active; it has to be reset first")
        try:
            self._rings = [
                self._make_ring(queue, memory) if queue.ready else None for queue in self.queues
            ]
        except RingError as error:
            raise ActivateError(str(error)) from error
        self._memory = memory
        self._interrupt = interrupt

    def reset(self) -> None:
        """Go back to the state before any driver; drop every view of guest memory."""
        self._acked_features = 0
        self._memory = None
        self._interrupt = None
        self._rings = []
        for queue in self.queues:
            queue.reset()

    @property
    def name(self) -> str:
        """The device in messages, such as "virtio block device"."""
        number = self.device_type
        kind = name_of(DeviceType, number).lower() or f"type {number}"
        return f"virtio {kind} device"

    def save(self) -> dict[str, object]:
        """Return what the driver chose, and where the rings stand (docs/architecture.md, "State").

        Chains that were taken and not yet served are available again in the state.
        """
        rings = self._rings or [None] * len(self.queues)
        return {
            "features": self._acked_features,
            "active": self.is_activated,
            "queues": [
                {"registers": queue.save(), "ring": ring.save() if ring and queue.ready else None}
                for queue, ring in zip(self.queues, rings, strict=True)
            ],
        }

    def restore(self, data: object, memory: GuestMemory, interrupt: Interrupt) -> None:
        """Take what ``save`` returned; StateError.

        The device must be fresh or reset; if ``data`` is refused, it is reset.  A device that was
        active is active again, with ``memory`` and ``interrupt`` as ``activate`` gets them: each
        of its queues must be served once, because a doorbell may have been lost.
        """
        from pyvmm.state import Fields  # not on the boot path

        fields = Fields(self.name, data)
        features, is_active = fields.integer("features", 0, _MAX_FEATURES), fields.boolean("active")
        queues = fields.take("queues")
        fields.end()
        if self.is_activated:
            raise StateError(self.name, "it is active: a state needs a device that was reset")
        if features & ~self.avail_features or (features and not features & Feature.VERSION_1):
            raise fields.error("features", f"{features:#x} are not some of those offered")
        if is_active and not features:
            raise fields.error("active", "is true, but no features were accepted")
        if not isinstance(queues, list) or len(queues) != len(self.queues):
            raise fields.error("queues", f"is not a list of {len(self.queues)}")
        self._acked_features = features
        try:
            rings = [self._restore_queue(*each, memory, is_active) for each in enumerate(queues)]
        except StateError:
            VirtioDevice.reset(self)
            raise
        if is_active:
            self._memory, self._interrupt, self._rings = memory, interrupt, rings

    def _restore_queue(
        self, index: int, data: object, memory: GuestMemory, is_active: bool
    ) -> Ring | None:
        """Set the registers of queue ``index``; return its ring if it is served.  StateError."""
        from pyvmm.state import Fields  # not on the boot path

        name, queue = f"{self.name}, queue {index}", self.queues[index]
        fields = Fields(name, data)
        registers, ring_state = fields.take("registers"), fields.take("ring")
        fields.end()
        try:
            queue.restore(registers)
            if not (is_active and queue.ready):
                if ring_state is not None:
                    raise fields.error("ring", "is not None, and the queue is not served")
                return None
            ring = self._make_ring(queue, memory)
            ring.restore(ring_state)
        except RingError as error:
            raise StateError(name, str(error)) from error
        except StateError as error:
            if error.part == name:
                raise
            raise StateError(f"{name}: {error.part}", error.problem) from error
        return ring

    def stop_queue(self, index: int) -> int:
        """Serve queue ``index`` no more; return the ``Queue.base`` with which it could go on.

        Chains that were taken and not yet served are available again; all others are answered.
        """
        queue = self.queues[index]
        queue.ready = False
        ring = self._rings[index] if self._rings else None
        if ring is not None:
            ring.untake()
            return ring.base
        return queue.base or 0

    def reset_queue(self, index: int) -> None:
        """Forget queue ``index`` alone, and touch nothing of it afterwards (2.6.1 "Virtqueue
        Reset")."""
        self.stop_queue(index)
        if self._rings:
            self._rings[index] = None
        self.queues[index].reset()

    def start_queue(self, index: int) -> None:
        """Serve queue ``index``, which the driver has set up anew after ``reset_queue``.

        2.6.1.2 "Virtqueue Re-enable"; only in a device that is active.  RingError if malformed."""
        if self._memory is None:
            return
        queue = self.queues[index]
        self._rings[index] = self._make_ring(queue, self._memory)
        queue.ready = True

    def _make_ring(self, queue: Queue, memory: GuestMemory) -> Ring:
        """Return the ring of ``queue``; RingError if malformed.  A device with a fast path has
        rings of its own kind."""
        return make_ring(queue, memory, self._acked_features, self.queues)

    @abc.abstractmethod
    def process_queue(self, index: int) -> float | None:
        """Make one pass: serve the waiting chains of queue ``index``, publish them all, interrupt
        once.  Never sleep.

        A pass is at most a queue's length of chains and about PASS_BYTES of work.  Return the
        seconds after which to call again: 0.0 if more is waiting, more if a rate limit says so,
        None if the next notification is soon enough.  A queue that is not ready, or a device that
        is not active, has no work.  RingError where the ring is
        malformed; the chains served before that point have been published.
        """


class RingDevice(VirtioDevice):
    """A device that serves its own rings, chain by chain."""

    @abc.abstractmethod
    def _serve(self, chain: Chain, memory: GuestMemory) -> int:
        """Do what ``chain`` asks; return the number of bytes written into it.

        Faults of the guest or the host are answered inside the chain and never raised."""

    def process_queue(self, index: int) -> float | None:
        """See ``VirtioDevice.process_queue``."""
        if self._memory is None or self._interrupt is None or not self.queues[index].ready:
            return None
        ring = self._rings[index]
        if ring is None:
            return None
        try:
            delay_s = self._serve_ring(index, ring, self._memory)
        finally:
            if ring.publish():
                self._interrupt.notify_used(index)
        if delay_s:
            return delay_s
        return 0.0 if ring.enable_notifications() else None

    def _serve_ring(self, index: int, ring: Ring, memory: GuestMemory) -> float:
        """Serve and push the chains that wait in ``ring``, which is queue ``index``.

        Return the seconds to wait before the rest may be served, 0.0 if nothing has to wait."""
        for chain in for_one_pass(ring.take_chains(), self._take_extra_work):
            ring.push(chain, self._serve(chain, memory))
        return 0.0

    def _take_extra_work(self) -> int:
        """Return the work since the last call that no descriptor and no buffer shows."""
        return 0


def for_one_pass(chains: Iterable[Chain], extra_work: Callable[[], int]) -> Iterator[Chain]:
    """Yield ``chains`` until they have been PASS_BYTES of work; the rest stays available for the
    next pass.  ``extra_work`` returns the part that the last chain's buffers do not show."""
    left = PASS_BYTES
    for chain in chains:
        yield chain
        left -= chain_work(chain) + extra_work()
        if left <= 0:
            return


def chain_work(chain: Chain) -> int:
    """Return the work of ``chain``: its descriptors, and the bytes in its buffers."""
    readable, writable = chain.readable, chain.writable
    length = 0
    for _, buffer_length in readable:
        length += buffer_length
    for _, buffer_length in writable:
        length += buffer_length
    if length > MAX_CHAIN_BYTES:
        length = 0  # it was refused, and nothing moved
    return length + (len(readable) + len(writable) + chain.empty) * DESCRIPTOR_WORK
