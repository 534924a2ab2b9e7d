"""A block driver with a packed virtqueue (2.8 "Packed Virtqueues")."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from pyvmm.virtio.spec import BlockFeature, EventFlags, Feature, PackedFlag
from tests.support.rig import Rig
from tests.support.virtio_driver import (
    NEXT,
    WRITE,
    BlockDriver,
    Descriptor,
    Used,
    readable,
    writable,
)

AVAIL, USED = int(PackedFlag.AVAIL), int(PackedFlag.USED)
IN, FLUSH = 0, 4
FEATURES = int(Feature.VERSION_1 | Feature.RING_PACKED | Feature.INDIRECT_DESC | BlockFeature.FLUSH)


class PackedDriver(BlockDriver):
    """``desc`` is the descriptor ring, ``avail`` the driver's event suppression structure and
    ``used`` the device's.  A chain's ``head`` is its buffer ID."""

    def restart(self) -> None:
        """See ``VirtioDriver.restart``."""
        self._top = self.bottom
        self.desc = self.alloc(16 * self.size, 16)
        self.avail = self.alloc(4, 4)
        self.used = self.alloc(4, 4)
        self.slot, self.wrap = 0, 1
        self.used_slot, self.used_wrap = 0, 1
        self.slots_of: dict[int, list[int]] = {}
        self._untold = 0  # slots

    def negotiate(self, features: int | None = None) -> bool:
        """See ``VirtioDriver.negotiate``; None stands for FEATURES."""
        return super().negotiate(FEATURES if features is None else features)

    def indirect(self, chain: Sequence[Descriptor]) -> Descriptor:
        """A descriptor of a fresh indirect table, in which only WRITE means something."""
        table = b"".join(pack(d.gpa, d.length, 0, d.flags) for d in chain)
        gpa = self.alloc(len(table), 16)
        self.memory.write(gpa, table)
        return Descriptor(gpa, len(table), 4)

    def place(self, chain: Sequence[Descriptor], head: int = 0) -> None:
        """Put ``chain`` into the next slots, its first descriptor last, without notifying."""
        links = [d._replace(flags=d.flags | NEXT) for d in chain[:-1]]
        self.place_raw([*links, chain[-1]], head)

    def place_raw(self, descriptors: Sequence[Descriptor], head: int) -> None:
        """The same for descriptors that are used as they are, but for their owner bits."""
        first, first_owner = self.slot, self.owner
        for descriptor in descriptors:
            self.write_slot(self.slot, descriptor, head, self.owner)
            self._step()
        self.write_slot(first, descriptors[0], head, first_owner)
        self.slots_of.setdefault(head, []).append(len(descriptors))

    @property
    def owner(self) -> int:
        """The owner bits that make a descriptor available in this lap."""
        return AVAIL if self.wrap else USED

    def write_slot(self, slot: int, descriptor: Descriptor, buffer_id: int, owner: int) -> None:
        """Store one descriptor."""
        gpa, length, flags, _ = descriptor
        self.memory.write(self.desc + 16 * slot, pack(gpa, length, buffer_id, flags | owner))

    def _step(self) -> None:
        self._untold += 1
        self.slot += 1
        if self.slot == self.size:
            self.slot, self.wrap = 0, self.wrap ^ 1

    def reap(self) -> list[Used]:
        """What the device has used since the last call."""
        done: list[Used] = []
        while True:
            slot = self.memory.read(self.desc + 16 * self.used_slot, 16)
            _, length, buffer_id, flags = struct.unpack("<QIHH", slot)
            if flags & (AVAIL | USED) != (AVAIL | USED if self.used_wrap else 0):
                return done
            if not self.slots_of.get(buffer_id):
                raise AssertionError(f"buffer {buffer_id} was used but never offered")
            if bool(flags & WRITE) != bool(length):
                raise AssertionError(f"WRITE does not go with a used length of {length}")
            done.append(Used(buffer_id, length))
            self.used_slot += self.slots_of[buffer_id].pop(0)
            if self.used_slot >= self.size:
                self.used_slot, self.used_wrap = self.used_slot - self.size, self.used_wrap ^ 1

    # Events: 2.8.10 "Driver and Device Event Suppression"

    def set_driver_event(self, flags: int, slot: int = 0, wrap: int = 0) -> None:
        """Store the driver's event suppression structure."""
        self.memory.write(self.avail, struct.pack("<HH", slot | wrap << 15, flags))

    def device_event(self) -> tuple[int, int, int]:
        """Flags, slot and wrap counter of the device's event suppression structure."""
        position, flags = struct.unpack("<HH", self.memory.read(self.used, 4))
        return flags, position & 0x7FFF, position >> 15

    def want_interrupts(self, wanted: bool) -> None:
        """Without EVENT_IDX: enable or disable them all."""
        self.set_driver_event(EventFlags.ENABLE if wanted else EventFlags.DISABLE)

    def interrupt_after(self, used: int) -> None:
        """With EVENT_IDX: an interrupt once the last of the ``used`` slots that come next was
        used, or skipped as part of a chain."""
        slot, wrap = self.used_slot + used - 1, self.used_wrap
        if slot >= self.size:
            slot, wrap = slot - self.size, wrap ^ 1
        self.set_driver_event(EventFlags.DESC, slot, wrap)

    def must_notify(self) -> bool:
        """See ``VirtioDriver.must_notify``; 2.8.10 "Driver and Device Event Suppression"."""
        offered, self._untold = self._untold, 0
        flags, slot, wrap = self.device_event()
        if flags != EventFlags.DESC:
            return bool(offered) and flags != EventFlags.DISABLE
        # How many slots ago the one was offered that the device wants to hear of; 0: not yet.
        behind = self.slot - slot + (0 if wrap == self.wrap else self.size)
        return 0 < behind <= offered

    def is_quiet(self) -> bool:
        """Whether the device asks not to be notified of what is offered next."""
        flags, slot, wrap = self.device_event()
        if flags == EventFlags.DESC:
            return (slot, wrap) != (self.slot, self.wrap)
        return flags == EventFlags.DISABLE


def pack(gpa: int, length: int, buffer_id: int, flags: int) -> bytes:
    """struct pvirtq_desc { le64 addr; le32 len; le16 id; le16 flags; }."""
    return struct.pack("<QIHH", gpa, length, buffer_id, flags)


def new_driver(rig: Rig, size: int = 16) -> PackedDriver:
    """A packed driver of ``rig``'s device, not started."""
    return PackedDriver(rig.transport, rig.memory, size=size)


def flush_chain(driver: PackedDriver) -> list[Descriptor]:
    """The two descriptors of a flush request."""
    return [readable(driver.header(FLUSH), 16), writable(driver.status_byte(), 1)]


def read_chain(driver: PackedDriver, pieces: int) -> tuple[list[Descriptor], int, int]:
    """A read of sector 3 whose data is in ``pieces`` descriptors; data GPA, status GPA."""
    data, status = driver.alloc(512), driver.status_byte()
    chain = [readable(driver.header(IN, 3), 16)]
    chain += [writable(data + i, 1) for i in range(pieces - 1)]
    chain += [writable(data + pieces - 1, 512 - pieces + 1), writable(status, 1)]
    return chain, data, status


def assert_refused(rig: Rig, driver: PackedDriver) -> None:
    """Outcome N of bad-inputs.md, with nothing returned; afterwards both kinds of ring work."""
    assert driver.reap() == []
    rig.assert_needs_reset()
    driver.start()
    assert driver.request(IN, 5, room=512).data == b"\5" * 512
