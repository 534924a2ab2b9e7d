"""The driver's half of virtio, for tests: it knows nothing but the registers and guest memory.

``VirtioDriver`` brings a device up through the transport's registers and submits descriptor
chains; ``BlockDriver`` adds block requests in any framing.  Guest memory is carved up by
``alloc``; ``RAM_BASE`` is not 0, so that a forgotten base address shows.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from pyvmm.memory import Region
from pyvmm.virtio.spec import (
    AVAIL_F_NO_INTERRUPT,
    USED_F_NO_NOTIFY,
    DescriptorFlag,
    Feature,
    Register,
    Status,
)

RAM_BASE = 0x10_0000
NEXT, WRITE, INDIRECT = (int(flag) for flag in DescriptorFlag)
STATUS_POISON = 0xEE
DECLINED = int(Feature.RING_PACKED | Feature.EVENT_IDX)
"""What a driver here accepts only when it is asked to: other rings, other notifications."""

_DESCRIPTOR = struct.Struct("<QIHH")


class Registers(Protocol):
    """What a driver sees of a transport."""

    def read(self, offset: int, size: int) -> int: ...

    def write(self, offset: int, size: int, value: int) -> None: ...


class Descriptor(NamedTuple):
    """One struct virtq_desc."""

    gpa: int
    length: int
    flags: int = 0
    following: int = 0

    def pack(self) -> bytes:
        return _DESCRIPTOR.pack(*self)


class Used(NamedTuple):
    """One struct virtq_used_elem."""

    head: int
    length: int


def readable(gpa: int, length: int) -> Descriptor:
    """A buffer for the device to read."""
    return Descriptor(gpa, length)


def writable(gpa: int, length: int) -> Descriptor:
    """A buffer for the device to write."""
    return Descriptor(gpa, length, WRITE)


def linked(chain: Sequence[Descriptor], first: int = 0) -> list[Descriptor]:
    """``chain`` with NEXT and ``next`` filled in, for a place in a table at ``first``."""
    last = len(chain) - 1
    return [
        d if i == last else d._replace(flags=d.flags | NEXT, following=first + i + 1)
        for i, d in enumerate(chain)
    ]


class DriverMemory(Protocol):
    """What a driver sees of guest memory; ``GuestMemory`` is one."""

    @property
    def regions(self) -> Sequence[Region]: ...

    def read(self, gpa: int, length: int) -> bytes: ...

    def write(self, gpa: int, data: bytes) -> None: ...

    def read_int(self, gpa: int, size: int) -> int: ...

    def write_int(self, gpa: int, size: int, value: int) -> None: ...


class VirtioDriver:
    """A driver of one queue (``index``) of ``size`` entries; its memory begins at GPA ``bottom``,
    by default that of RAM."""

    def __init__(
        self,
        registers: Registers,
        memory: DriverMemory,
        *,
        size: int = 16,
        index: int = 0,
        bottom: int | None = None,
    ) -> None:
        self.registers = registers
        self.memory = memory
        self.size = size
        self.index = index
        self.event_idx = False
        self.bottom = memory.regions[0].gpa if bottom is None else bottom
        self.restart()

    def restart(self) -> None:
        """Forget all memory and queue state, as after a reset; the areas are made anew."""
        self._top = self.bottom
        self.desc = self.alloc(16 * self.size, 16)
        self.avail = self.alloc(6 + 2 * self.size, 2)
        self.used = self.alloc(6 + 8 * self.size, 4)
        self.avail_idx = 0
        self.used_idx = 0
        self._told_idx = 0

    # Memory

    def alloc(self, length: int, alignment: int = 16) -> int:
        """The GPA of ``length`` zeroed bytes."""
        gpa = -(-self._top // alignment) * alignment
        self.memory.write(gpa, bytes(length))
        self._top = gpa + length
        return gpa

    @contextlib.contextmanager
    def scratch(self) -> Iterator[None]:
        """What is allocated within is free again afterwards."""
        mark = self._top
        yield
        self._top = mark

    def put(self, data: bytes) -> int:
        """The GPA of a fresh copy of ``data``."""
        gpa = self.alloc(len(data), 1)
        self.memory.write(gpa, data)
        return gpa

    # Registers

    def reg(self, register: int) -> int:
        return self.registers.read(register, 4)

    def set(self, register: int, value: int) -> None:
        self.registers.write(register, 4, value)

    @property
    def status(self) -> int:
        return self.reg(Register.STATUS)

    @property
    def needs_reset(self) -> bool:
        return bool(self.status & Status.DEVICE_NEEDS_RESET)

    @property
    def offered(self) -> int:
        """The device's 64 feature bits."""
        features = 0
        for word in (0, 1):
            self.set(Register.DEVICE_FEATURES_SEL, word)
            features |= self.reg(Register.DEVICE_FEATURES) << 32 * word
        return features

    def accept(self, features: int) -> None:
        """Write DriverFeatures."""
        for word in (0, 1):
            self.set(Register.DRIVER_FEATURES_SEL, word)
            self.set(Register.DRIVER_FEATURES, features >> 32 * word & 0xFFFF_FFFF)

    def negotiate(self, features: int | None = None) -> bool:
        """From reset to FEATURES_OK with ``features`` (None: what is offered, but DECLINED)."""
        for status in (0, 1, 3):
            self.set(Register.STATUS, status)
        self.accept(self.offered & ~DECLINED if features is None else features)
        self.set(Register.STATUS, 11)
        self.event_idx = bool((features or 0) & Feature.EVENT_IDX)
        return self.status == 11

    def setup_queue(
        self,
        *,
        size: int | None = None,
        desc: int | None = None,
        avail: int | None = None,
        used: int | None = None,
        ready: bool = True,
    ) -> None:
        """Describe the queue to the device; what is not given is as it should be."""
        self.set(Register.QUEUE_SEL, self.index)
        self.set(Register.QUEUE_NUM, self.size if size is None else size)
        for register, value in (
            (Register.QUEUE_DESC_LOW, self.desc if desc is None else desc),
            (Register.QUEUE_DRIVER_LOW, self.avail if avail is None else avail),
            (Register.QUEUE_DEVICE_LOW, self.used if used is None else used),
        ):
            self.set(register, value & 0xFFFF_FFFF)
            self.set(register + 4, value >> 32)
        if ready:
            self.set(Register.QUEUE_READY, 1)

    def start(self, features: int | None = None) -> None:
        """All of 3.1.1 "Device Initialization", from reset to DRIVER_OK."""
        self.restart()
        if not self.negotiate(features):
            raise AssertionError(f"FEATURES_OK refused, status {self.status:#x}")
        self.setup_queue()
        self.set(Register.STATUS, 15)
        if self.status != 15:
            raise AssertionError(f"not running, status {self.status:#x}")

    # Rings

    def write_table(self, descriptors: Iterable[Descriptor], first: int = 0) -> None:
        """Store ``descriptors`` as they are, in the descriptor table from index ``first``."""
        self.memory.write(self.desc + 16 * first, b"".join(d.pack() for d in descriptors))

    def indirect(self, chain: Sequence[Descriptor]) -> Descriptor:
        """A descriptor of a fresh indirect table that holds ``chain``."""
        table = b"".join(d.pack() for d in linked(chain))
        gpa = self.alloc(len(table), 16)
        self.memory.write(gpa, table)
        return Descriptor(gpa, len(table), INDIRECT)

    def offer(self, *heads: int) -> None:
        """Make ``heads`` available, without notifying."""
        for head in heads:
            self.memory.write_int(self.avail + 4 + 2 * (self.avail_idx % self.size), 2, head)
            self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        self.memory.write_int(self.avail + 2, 2, self.avail_idx)

    def notify(self) -> None:
        self.set(Register.QUEUE_NOTIFY, self.index)

    def place(self, chain: Sequence[Descriptor], head: int = 0) -> None:
        """Put ``chain`` into the table at ``head`` and offer it, without notifying."""
        self.write_table(linked(chain, head), head)
        self.offer(head)

    def place_at(self, chain: Sequence[Descriptor], indices: Sequence[int]) -> None:
        """Put ``chain`` into the table at ``indices``, in that order, and offer it, without
        notifying.  An indirect descriptor may be its last."""
        last = len(chain) - 1
        for i, descriptor in enumerate(chain):
            if i < last:
                flags = descriptor.flags | NEXT
                descriptor = descriptor._replace(flags=flags, following=indices[i + 1])
            self.write_table([descriptor], indices[i])
        self.offer(indices[0])

    def submit(self, chain: Sequence[Descriptor], head: int = 0) -> None:
        """``place`` and notify."""
        self.place(chain, head)
        self.notify()

    def reap(self) -> list[Used]:
        """What the device has used since the last call."""
        done = []
        idx = self.memory.read_int(self.used + 2, 2)
        while self.used_idx != idx:
            element = self.memory.read(self.used + 4 + 8 * (self.used_idx % self.size), 8)
            done.append(Used(*struct.unpack("<II", element)))
            self.used_idx = (self.used_idx + 1) & 0xFFFF
        return done

    # Events: 2.7.7 "Used Buffer Notification Suppression" and 2.7.10, its counterpart

    def want_interrupts(self, wanted: bool) -> None:
        """Without EVENT_IDX: avail.flags."""
        self.memory.write_int(self.avail, 2, 0 if wanted else AVAIL_F_NO_INTERRUPT)

    def interrupt_after(self, used: int) -> None:
        """With EVENT_IDX: an interrupt once ``used`` more elements were used (1: the next)."""
        event = (self.used_idx + used - 1) & 0xFFFF
        self.memory.write_int(self.avail + 4 + 2 * self.size, 2, event)

    def must_notify(self) -> bool:
        """True if the device asked to be told of what was offered since the last call (2.7.10
        "Available Buffer Notification Suppression")."""
        old, self._told_idx = self._told_idx, self.avail_idx
        offered = (self.avail_idx - old) & 0xFFFF
        if self.event_idx:
            event = self.memory.read_int(self.used + 4 + 8 * self.size, 2)
            return (self.avail_idx - event - 1) & 0xFFFF < offered
        return bool(offered) and not self.memory.read_int(self.used, 2) & USED_F_NO_NOTIFY

    def is_quiet(self) -> bool:
        """Whether the device asks not to be notified of what is offered next."""
        if self.event_idx:
            event = self.memory.read_int(self.used + 4 + 8 * self.size, 2)
            return event != self.avail_idx
        return bool(self.memory.read_int(self.used, 2) & USED_F_NO_NOTIFY)


class Answer(NamedTuple):
    """A finished block request: its status byte, used.len and what is in its data buffer."""

    status: int
    used_length: int
    data: bytes


class BlockDriver(VirtioDriver):
    """Block requests, one at a time."""

    def header(self, request_type: int, sector: int = 0) -> int:
        """The GPA of a fresh request header."""
        return self.put(struct.pack("<IIQ", request_type, 0, sector))

    def status_byte(self) -> int:
        """The GPA of a fresh status byte that holds no valid status."""
        return self.put(bytes([STATUS_POISON]))

    def request(
        self,
        request_type: int,
        sector: int = 0,
        *,
        data: bytes = b"",
        room: int = 0,
        indirect: bool = False,
    ) -> Answer:
        """A request with ``data`` to read or ``room`` bytes to write, and its answer."""
        mark = self._top
        status = self.status_byte()
        buffer = self.put(data) if data else self.alloc(room, 1)
        chain = [readable(self.header(request_type, sector), 16)]
        if data:
            chain.append(readable(buffer, len(data)))
        if room:
            chain.append(writable(buffer, room))
        chain.append(writable(status, 1))
        answer = self.ask([self.indirect(chain)] if indirect else chain, status, buffer, room)
        self._top = mark
        return answer

    def ask(
        self, chain: Sequence[Descriptor], status: int, buffer: int = 0, room: int = 0
    ) -> Answer:
        """Submit ``chain``; the answer, with ``room`` bytes of ``buffer`` read back."""
        self.submit(chain)
        done = self.reap()
        if len(done) != 1 or done[0].head != 0:
            raise AssertionError(f"one request in, {done} out, status {self.status:#x}")
        data = self.memory.read(buffer, room) if room else b""
        return Answer(self.memory.read_int(status, 1), done[0].length, data)
