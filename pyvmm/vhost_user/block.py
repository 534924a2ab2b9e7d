"""A disk that another process serves: the guest's queues go to a vhost-user-blk back end.

The back end maps the guest's RAM.  It waits on the eventfds that KVM signals for the driver's
notifications, and interrupts the guest by the eventfd on which KVM waits.  Only set-up and
configuration space remain here, in a device whose ``process_queue`` does no work.

Whatever the back end does, no method raises for it: the guest's reset must go through.  A back
end that breaks the protocol, stops answering or hangs up is lost, which is reported once.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence

from pyvmm.errors import (
    ActivateError,
    GuestError,
    RequestRefusedError,
    RingError,
    StateError,
    VhostUserError,
)
from pyvmm.memory import GuestMemory
from pyvmm.run.io_loop import IoSource
from pyvmm.vhost_user.frontend import Frontend
from pyvmm.vhost_user.protocol import MemoryRegion
from pyvmm.virtio.block.config import WRITEBACK_OFFSET, config_space_length
from pyvmm.virtio.device import Interrupt, Plug, VirtioDevice
from pyvmm.virtio.ring.rings import first_base
from pyvmm.virtio.spec import BlockFeature, DeviceType, Feature

QUEUE_SIZE = 256
"""The most entries of a queue; a back end has no way of telling its own limit."""

_NO_STATE = "another process serves it (vhost-user), whose state cannot be saved or restored"

_PASSED_ON = int(
    Feature.INDIRECT_DESC
    | Feature.EVENT_IDX
    | Feature.VERSION_1
    | Feature.RING_PACKED
    | Feature.IN_ORDER
    | Feature.RING_RESET
    | BlockFeature.SIZE_MAX
    | BlockFeature.SEG_MAX
    | BlockFeature.GEOMETRY
    | BlockFeature.RO
    | BlockFeature.BLK_SIZE
    | BlockFeature.FLUSH
    | BlockFeature.TOPOLOGY
    | BlockFeature.CONFIG_WCE
    | BlockFeature.MQ
    | BlockFeature.DISCARD
    | BlockFeature.WRITE_ZEROES
    | BlockFeature.LIFETIME
    | BlockFeature.SECURE_ERASE
)
"""Features that are offered to the guest if the back end offers them.

All features of the block device, and those of the transport that need only a kick and rings in RAM:
no IOMMU, no data in a kick.
"""

# struct virtio_blk_config (5.2.4 "Device configuration layout"): where fields are.
_CAPACITY = struct.Struct("<Q")
_SIZE_MAX, _SIZE_MAX_OFFSET = struct.Struct("<I"), 8
_SEG_MAX, _SEG_MAX_OFFSET = struct.Struct("<I"), 12
_NUM_QUEUES, _NUM_QUEUES_OFFSET = struct.Struct("<H"), 34


class VhostUserBlock(VirtioDevice):
    """The disk that ``frontend``'s back end serves; ``frontend`` belongs to the caller.

    The device has ``max_queues`` queues, or as many as the back end if that has fewer.  The back
    end gets the slot's doorbells and its ``irq_fd``.  ``lost`` is called once, on the thread that
    notices the loss, with its cause.  From then on every request of the guest waits for ever.
    VhostUserError if the back end is not a disk that can be handed on.
    """

    device_type = DeviceType.BLOCK
    is_served_elsewhere = True

    def __init__(
        self,
        frontend: Frontend,
        *,
        max_queues: int,
        lost: Callable[[str], None],
        queue_size: int = QUEUE_SIZE,
    ) -> None:
        if not frontend.features & Feature.VERSION_1:
            raise VhostUserError(
                frontend.peer, "a legacy device: it does not offer VIRTIO_F_VERSION_1"
            )
        self._frontend = frontend
        self._lost = lost
        self._is_lost = threading.Lock()  # taken, by whoever finds out first, and never released
        self._shared: set[MemoryRegion] = set()
        self._started: set[int] = set()
        features = frontend.features & _PASSED_ON
        self._config_length = config_space_length(features)
        self._config = frontend.get_config(0, self._config_length)
        if not _SIZE_MAX.unpack_from(self._config, _SIZE_MAX_OFFSET)[0]:
            # qemu-storage-daemon offers the limit and leaves it 0, which no driver can keep.
            features &= ~int(BlockFeature.SIZE_MAX)
        queues = 1
        if features & BlockFeature.MQ:
            (queues,) = _NUM_QUEUES.unpack_from(self._config, _NUM_QUEUES_OFFSET)
        queues = min(queues, frontend.max_queues, max_queues)
        if queues < 1:
            raise VhostUserError(frontend.peer, "GET_CONFIG: num_queues is 0")
        super().__init__(avail_features=features, queue_max_sizes=(queue_size,) * queues)

    # Configuration space

    @property
    def capacity_sectors(self) -> int:
        """The disk's size in sectors of 512 bytes, as the back end last said."""
        (sectors,) = _CAPACITY.unpack_from(self._config)
        return int(sectors)

    def refresh(self) -> bool:
        """See ``VirtioDevice.refresh``: ask the back end again how large the disk is."""
        before = self.capacity_sectors
        with contextlib.suppress(RequestRefusedError), self._noticing_loss():
            self._read_config()
        return self.capacity_sectors != before

    def read_config(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes of configuration space from ``offset``; zeros behind its end.

        The bytes are the back end's, but for two facts it cannot know: how many of its queues the
        driver has, and that a chain is no longer than a queue.
        """
        space = bytearray(self._config)
        if self.avail_features & BlockFeature.MQ:
            _NUM_QUEUES.pack_into(space, _NUM_QUEUES_OFFSET, len(self.queues))
        if self.avail_features & BlockFeature.SEG_MAX:
            (seg_max,) = _SEG_MAX.unpack_from(space, _SEG_MAX_OFFSET)
            # Header and status may take a descriptor each.
            most = self.queue_max_sizes[0] - 2
            _SEG_MAX.pack_into(space, _SEG_MAX_OFFSET, min(seg_max, most))
        return bytes(space[offset : offset + length]).ljust(length, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """Set the cache mode from ``writeback``, if the driver negotiated CONFIG_WCE.

        Ignore other fields, which are not writable, and a mode that the back end refuses.
        """
        place = WRITEBACK_OFFSET - offset
        if not (self.acked_features & BlockFeature.CONFIG_WCE and 0 <= place < len(data)):
            return
        if data[place] not in (0, 1):
            return
        with contextlib.suppress(RequestRefusedError), self._noticing_loss():
            self._frontend.set_config(WRITEBACK_OFFSET, data[place : place + 1])
            self._read_config()

    def _read_config(self) -> None:
        self._config = self._frontend.get_config(0, self._config_length)

    def set_acked_features(self, features: int) -> None:
        """See ``VirtioDevice.set_acked_features``; GuestError too if the back end refuses."""
        super().set_acked_features(features)
        try:
            with self._noticing_loss():
                self._frontend.set_features(features)
                self._read_config()  # the features may decide what writeback is
        except RequestRefusedError as error:
            raise GuestError(str(error)) from error

    # Queues

    def activate(self, memory: GuestMemory, interrupt: Interrupt) -> None:
        """Hand the queues that are ready over to the back end; see ``VirtioDevice.activate``.

        ActivateError too if the back end refuses one, or if ``memory`` cannot be shared.
        """
        super().activate(memory, interrupt)
        try:
            with self._noticing_loss():
                self._share(memory)
                for index, queue in enumerate(self.queues):
                    if queue.ready:
                        self._hand_over(index, memory)
        except (RequestRefusedError, ActivateError) as error:
            for index in range(len(self.queues)):
                self._take_back(index)
            self._memory, self._interrupt, self._rings = None, None, []
            raise ActivateError(str(error)) from error

    def reset(self) -> None:
        """See ``VirtioDevice.reset``: waits until the back end has let go of every queue."""
        for index in range(len(self.queues)):
            self._take_back(index)
        super().reset()

    def stop_queue(self, index: int) -> int:
        """See ``VirtioDevice.stop_queue``; return the queue's start if the back end is lost."""
        stands, begun = self._take_back(index), super().stop_queue(index)
        return begun if stands is None else stands

    def start_queue(self, index: int) -> None:
        """See ``VirtioDevice.start_queue``; RingError too if the back end refuses."""
        super().start_queue(index)
        if self._memory is None:
            return
        try:
            with self._noticing_loss():
                self._hand_over(index, self._memory)
        except RequestRefusedError as error:
            self._take_back(index)
            self.queues[index].ready = False
            raise RingError(str(error)) from error

    def save(self) -> dict[str, object]:
        """Raise StateError: the back end has the rings, requests on their way and the disk."""
        raise StateError(self.name, _NO_STATE)

    def restore(self, data: object, memory: GuestMemory, interrupt: Interrupt) -> None:
        """Raise StateError; see ``save``."""
        raise StateError(self.name, _NO_STATE)

    def process_queue(self, index: int) -> float | None:
        """Pass on a notification that KVM did not deliver itself.  No work is left here."""
        if index in self._started:
            # A counter at its limit says already that there is work.  A back end may make our
            # write wait until it reads (``peers.eventfds``), and so stop its own guest: the end of
            # the run interrupts the write.
            with contextlib.suppress(BlockingIOError, InterruptedError):
                os.eventfd_write(self._slot.doorbells[index], 1)
        return None

    def _share(self, memory: GuestMemory) -> None:
        """Let the back end map ``memory``, once: a mapping survives every reset by the driver."""
        if memory.fd is None:
            raise ActivateError("guest RAM is private memory, which no other process can map")
        for part in memory.regions:
            region = MemoryRegion(part.gpa, part.length, part.host_address, part.offset)
            if region not in self._shared:
                try:
                    self._frontend.add_region(region, memory.fd)
                except RequestRefusedError as error:
                    # A driver cannot help it; without RAM there is no disk.
                    raise VhostUserError(error.peer, error.problem) from error
                self._shared.add(region)

    def _hand_over(self, index: int, memory: GuestMemory) -> None:
        queue = self.queues[index]
        # A queue that is refused half-way may have begun all the same.
        self._started.add(index)
        self._frontend.start_queue(
            index,
            size=queue.size,
            descriptor=_user_address(memory, queue.descriptor_area),
            driver=_user_address(memory, queue.driver_area),
            device=_user_address(memory, queue.device_area),
            base=first_base(self.acked_features) if queue.base is None else queue.base,
            kick_fd=self._slot.doorbells[index],
            call_fd=self._slot.irq_fd,
        )

    def _take_back(self, index: int) -> int | None:
        """Stop queue ``index`` if it runs; return the position of its ring, or None."""
        if index in self._started:
            self._started.discard(index)
            with self._noticing_loss():
                return self._frontend.stop_queue(index)
        return None

    # The back end

    def fileno(self) -> int:
        """Return the back end's socket, readable at news and for good once the back end has gone.

        Call ``look`` when it is readable.
        """
        return self._frontend.fileno()

    def plug(self, slot: Plug) -> Sequence[IoSource]:
        """See ``VirtioDevice.plug``: the device's thread waits for news of the back end."""
        super().plug(slot)
        # Edge-triggered, because a socket whose peer has gone stays readable.
        return (IoSource(self.fileno(), self.look),)

    def hurry(self, until_s: float) -> None:
        """See ``VirtioDevice.hurry``: limit the wait of a vCPU for the back end in a reset."""
        self._frontend.limit_waits(until_s)

    def look(self) -> None:
        """Notice if the back end has gone, without a request to it; from any thread."""
        with self._noticing_loss():
            self._frontend.check()

    @contextlib.contextmanager
    def _noticing_loss(self) -> Iterator[None]:
        """Call ``lost`` once if the back end is lost; let a refusal pass."""
        try:
            yield
        except RequestRefusedError:
            raise
        except VhostUserError as error:
            if self._is_lost.acquire(blocking=False):
                self._lost(str(error))


def _user_address(memory: GuestMemory, gpa: int | None) -> int:
    """Return the address in this process of ``gpa``, which the ring has found to be in RAM."""
    for region in memory.regions:
        if gpa is not None and region.gpa <= gpa < region.end:
            return region.host_address + gpa - region.gpa
    raise RingError(f"the queue is not in RAM: {gpa}")
