"""The agent's port behind a transport, a driver of its queues, and a host that listens."""

from __future__ import annotations

import struct

from pyvmm.memory import GuestMemory
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.port.device import (
    CONTROL_RECEIVE,
    CONTROL_TRANSMIT,
    PORT,
    PORT_NAME,
    RECEIVE,
    TRANSMIT,
    PortDevice,
)
from pyvmm.virtio.spec import ConsoleFeature, Feature, PortEvent, Register
from tests.support.packed_driver import PackedDriver
from tests.support.virtio_driver import RAM_BASE, VirtioDriver, readable, writable

FEATURES = int(Feature.VERSION_1 | Feature.INDIRECT_DESC | ConsoleFeature.MULTIPORT)
RAM_BYTES = 2 << 20
ADD = (PORT, PortEvent.PORT_ADD, 1, b"")
NAME = (PORT, PortEvent.PORT_NAME, 1, PORT_NAME)
HOST_OPENS = (PORT, PortEvent.PORT_OPEN, 1, b"")
HOST_CLOSES = (PORT, PortEvent.PORT_OPEN, 0, b"")
Message = tuple[int, int, int, bytes]


class PortRig:
    """``heard`` is all that the host was told, in order: bytes, and True and False for the port.

    The host takes up to ``appetite`` bytes in all.  The rig is the device's slot too, and
    ``settle`` its thread.
    """

    irq_fd = -1
    doorbells: tuple[int, ...] = ()

    def __init__(self, *, packed: bool = False, listens: bool = True) -> None:
        self.heard: list[bytes | bool] = []
        self.rooms = 0
        self.appetite = 1 << 40
        self.irqs = 0
        self.reports: list[str] = []
        self._asked: set[int] = set()
        self._buffers: dict[int, int] = {}
        self._refresh_is_asked = False
        self.is_packed = packed
        self.memory = GuestMemory.over(bytearray(RAM_BYTES), RAM_BASE)
        self.device = PortDevice()
        if listens:
            self.device.connect(on_data=self._take, on_room=self._note_room, on_open=self.note_open)
        self.device.plug(self)
        self.transport = MmioTransport(
            self.device, self.memory, self._interrupt, report=self.reports.append,
            defer=self.serve,
        )
        kind = PackedDriver if packed else VirtioDriver
        self.control_in, self.control_out, self.data_in, self.data_out = (
            kind(self.transport, self.memory, index=index, bottom=RAM_BASE + (number << 18))
            for number, index in enumerate((CONTROL_RECEIVE, CONTROL_TRANSMIT, RECEIVE, TRANSMIT))
        )

    def _interrupt(self) -> None:
        self.irqs += 1

    # The host

    def _take(self, data: bytes) -> int:
        taken = data[: self.appetite]
        self.appetite -= len(taken)
        if taken:
            self.heard.append(taken)
        return len(taken)

    def _note_room(self) -> None:
        self.rooms += 1

    def note_open(self, is_open: bool) -> None:
        """The guest opened or closed the port."""
        self.heard.append(is_open)

    @property
    def heard_bytes(self) -> bytes:
        return b"".join(one for one in self.heard if isinstance(one, bytes))

    # The slot, and its thread

    def serve(self, queue_index: int) -> None:
        """See ``Plug.serve``."""
        self._asked.add(queue_index)

    def refresh(self) -> None:
        """See ``Plug.refresh``."""
        self._refresh_is_asked = True

    def settle(self) -> None:
        """Do all that the device's thread was asked for."""
        for _ in range(1000):
            if self._refresh_is_asked:
                self._refresh_is_asked = False
                assert not self.device.refresh()
            elif self._asked:
                queue = self._asked.pop()
                if self.transport.service(queue) is not None:
                    self._asked.add(queue)
            else:
                return
        raise AssertionError("the device's thread finds no end")

    # The driver

    def start(self) -> None:
        """Bring the device up, with buffers for control messages."""
        drivers = (self.control_in, self.control_out, self.data_in, self.data_out)
        for driver in drivers:
            driver.restart()
        assert self.control_in.negotiate(FEATURES | (Feature.RING_PACKED * self.is_packed))
        for driver in drivers:
            driver.setup_queue()
        self.control_in.set(Register.STATUS, 15)
        assert self.control_in.status == 15
        self._buffers.clear()
        for head in range(8):
            self._offer_control(head)

    def _offer_control(self, head: int) -> None:
        gpa = self._buffers.setdefault(head, self.control_in.alloc(64))
        self.control_in.submit([writable(gpa, 64)], head)

    def say(self, event: int, value: int, port: int = PORT) -> None:
        """Send a control message."""
        self.send_control(struct.pack("<IHH", port, event, value))

    def send_control(self, message: bytes) -> None:
        """Send the bytes of a control message."""
        with self.control_out.scratch():
            self.control_out.submit([readable(self.control_out.put(message), len(message))])
            self.settle()
            assert [used.length for used in self.control_out.reap()] == [0]

    def told(self) -> list[Message]:
        """Return the control messages that have come since the last call."""
        self.settle()
        messages = []
        for head, length in self.control_in.reap():
            data = self.memory.read(self._buffers[head], length)
            messages.append((*struct.unpack("<IHH", data[:8]), data[8:]))
            self._offer_control(head)
        self.settle()
        return messages

    def make_ready(self) -> list[Message]:
        """Do as Linux does until it has the port; return what it is told."""
        self.start()
        self.say(PortEvent.DEVICE_READY, 1, 0xFFFF_FFFF)
        first = self.told()
        self.say(PortEvent.PORT_READY, 1)
        return first + self.told()

    def open(self) -> None:
        """Have a program in the guest open the port."""
        self.make_ready()
        self.say(PortEvent.PORT_OPEN, 1)

    def send(self, data: bytes, head: int = 0) -> None:
        """Have the guest write ``data`` to the port, in one chain."""
        self.data_out.submit([readable(self.data_out.put(data), len(data))], head)
        self.settle()

    def read(self, length: int) -> bytes:
        """Offer a buffer of ``length`` bytes; return what comes, b"" if it still waits."""
        gpa = self.data_in.alloc(length)
        self.data_in.submit([writable(gpa, length)])
        self.settle()
        return b"".join(self.memory.read(gpa, used.length) for used in self.data_in.reap())
