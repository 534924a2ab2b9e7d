"""The agent's port: a console device (virtio 1.2, 5.3 "Console Device") with MULTIPORT.

It has one port, number 1 and named ``org.pyvmm.agent``, which is no console: Linux makes
/dev/vport*N*p1 of it, and no terminal.  Port 0, whose queues any such device has, is not there.

The life of the port, by control messages (5.3.6.2 "Multiport Device Operation")::

    driver: DEVICE_READY   device: PORT_ADD
    driver: PORT_READY     device: PORT_NAME, and PORT_OPEN if the host listens
    driver: PORT_OPEN 1    bytes go both ways
    driver: PORT_OPEN 0    bytes that are on their way are dropped

A control message of the device is never queued: what the driver must still be told is a state, so
a driver that repeats itself fills no memory.

Bytes wait in the ring, not here.  The device keeps at most one chain's of the guest's, and
MAX_WAITING_BYTES of the host's.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable

from pyvmm.errors import GuestError, GuestMemoryError
from pyvmm.memory import GuestMemory
from pyvmm.virtio.device import Interrupt, RingDevice, for_one_pass
from pyvmm.virtio.ring.queue import Chain, Ring
from pyvmm.virtio.spec import ConsoleFeature, DeviceType, Feature, PortEvent

PORT_NAME = b"org.pyvmm.agent"
PORT = 1
MAX_PORTS = 2
PORT_0_RECEIVE, PORT_0_TRANSMIT, CONTROL_RECEIVE, CONTROL_TRANSMIT, RECEIVE, TRANSMIT = range(6)
"""The queues, in the order of 5.3.2 "Virtqueues"; the driver receives and transmits."""
QUEUE_SIZE = 64
IDLE_QUEUE_SIZE = 16
"""Linux offers a page for each entry of a queue to receive: fewer where little comes."""
MAX_CHAIN_BYTES = 64 << 10
"""Of one chain no more is taken: a guest cannot make us keep its memory in ours."""
MAX_WAITING_BYTES = 64 << 10
"""For the guest."""

# struct virtio_console_config { le16 cols; le16 rows; le32 max_nr_ports; le32 emerg_wr; }
_CONFIG = struct.pack("<HHII", 0, 0, MAX_PORTS, 0)
# struct virtio_console_control { le32 id; le16 event; le16 value; }
_CONTROL = struct.Struct("<IHH")


class PortDevice(RingDevice):
    """The device of the port; ``connect`` gives it a host that listens.

    All that ``connect`` takes is called in the device's thread.  ``receive``, ``more_room`` and
    ``hang_up`` may be called from any thread, and from within those calls.
    """

    device_type = DeviceType.CONSOLE

    def __init__(self) -> None:
        features = Feature.VERSION_1 | Feature.INDIRECT_DESC | Feature.EVENT_IDX
        super().__init__(
            avail_features=features | Feature.RING_PACKED | ConsoleFeature.MULTIPORT,
            queue_max_sizes=(*[IDLE_QUEUE_SIZE] * 4, QUEUE_SIZE, QUEUE_SIZE),
        )
        self._on_data: Callable[[bytes], int] = len
        self._on_room: Callable[[], None] = lambda: None
        self._on_open: Callable[[bool], None] = lambda is_open: None
        self._is_connected = False
        self._lock = threading.Lock()  # of all below; no call of the host's is made with it
        self._must_add = self._must_name = False
        self._is_ready = False  # the driver has the port
        self._is_opened = False  # by the guest
        self._is_hung_up = False  # by the host, until the guest closes it
        self._is_stale = False  # opened on a machine that was saved, with another host listening
        self._told_driver = False  # that the host's side is open
        self._told_host = False  # that the guest's side is open
        self._has_closed = False  # since the host was told of the guest's side
        self._for_guest = bytearray()
        self._for_host = b""  # the rest of a chain, of which the host took a part

    # The host's side

    def connect(
        self,
        *,
        on_data: Callable[[bytes], int],
        on_room: Callable[[], None],
        on_open: Callable[[bool], None],
    ) -> None:
        """Listen to the port; once, before the guest runs.  Without it the port stays closed.

        ``on_open`` is told when the guest opens and closes the port.  ``on_data`` gets bytes while
        it is open, and returns how many it takes.  After fewer than all it is not called again
        before ``more_room``.  ``on_room`` is called when ``receive`` may take more.
        """
        self._on_data, self._on_room, self._on_open = on_data, on_room, on_open
        self._is_connected = True

    def receive(self, data: bytes) -> int:
        """Take bytes for the guest, as many as there is room for; return how many.

        None before ``on_open(True)`` and after the guest has closed the port.
        """
        with self._lock:
            if not self._told_host or self._has_closed or not self._is_open:
                return 0
            taken = data[: MAX_WAITING_BYTES - len(self._for_guest)]
            self._for_guest += taken
        if taken:
            self._slot.serve(RECEIVE)
        return len(taken)

    def more_room(self) -> None:
        """Have ``on_data`` called again: the host takes more."""
        self._slot.serve(TRANSMIT)

    def hang_up(self) -> None:
        """Close the host's side until the guest closes its own; nothing on its way arrives.

        ``on_open(False)`` follows, and ``on_open(True)`` if the guest opens the port again.
        """
        with self._lock:
            if not self._is_opened:
                return
            self._is_hung_up = True
            self._for_guest.clear()
        self._slot.serve(CONTROL_RECEIVE)
        self._slot.refresh()

    @property
    def _is_open(self) -> bool:
        """True if bytes go both ways.  Under the lock."""
        return self._is_opened and not self._is_hung_up and not self._is_stale

    @property
    def _is_host_open(self) -> bool:
        """The host's side, as the driver must know it.  Under the lock."""
        return self._is_connected and not self._is_hung_up

    # The device

    def set_acked_features(self, features: int) -> None:
        """See ``VirtioDevice.set_acked_features``; a driver must know of ports."""
        if not features & ConsoleFeature.MULTIPORT:
            raise GuestError("VIRTIO_CONSOLE_F_MULTIPORT was not accepted; there is no console")
        super().set_acked_features(features)

    def read_config(self, offset: int, length: int) -> bytes:
        """See ``VirtioDevice.read_config``."""
        return _CONFIG[offset : offset + length].ljust(length, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """See ``VirtioDevice.write_config``: nothing can be written."""

    def refresh(self) -> bool:
        """See ``VirtioDevice.refresh``: tell the host how the port stands.

        A port that was open when its machine was saved is hung up: this host does not know how far
        its guest and another host had come.
        """
        if self._is_stale:
            self.hang_up()
            self._is_stale = False
        self._tell_host()
        return False

    def reset(self) -> None:
        """See ``VirtioDevice.reset``; the port is closed."""
        super().reset()
        with self._lock:
            self._must_add = self._must_name = self._is_ready = self._told_driver = False
            self._is_stale = False
            self._set_opened(False)
        self._slot.refresh()

    def save(self) -> dict[str, object]:
        """See ``VirtioDevice.save``."""
        with self._lock:
            return {
                "common": super().save(), "must_add": self._must_add,
                "must_name": self._must_name, "is_ready": self._is_ready,
                "is_opened": self._is_opened, "is_hung_up": self._is_hung_up,
                "told_driver": self._told_driver, "for_guest": bytes(self._for_guest),
                "for_host": self._for_host,
            }

    def restore(self, data: object, memory: GuestMemory, interrupt: Interrupt) -> None:
        """See ``VirtioDevice.restore``; a port that is open is hung up by ``refresh``."""
        from pyvmm.state import Fields  # not on the boot path

        fields = Fields(self.name, data)
        common = fields.take("common")
        must_add, must_name = fields.boolean("must_add"), fields.boolean("must_name")
        is_ready, is_opened = fields.boolean("is_ready"), fields.boolean("is_opened")
        is_hung_up, told_driver = fields.boolean("is_hung_up"), fields.boolean("told_driver")
        for_guest = fields.octets("for_guest", 0, MAX_WAITING_BYTES)
        for_host = fields.octets("for_host", 0, MAX_CHAIN_BYTES)
        fields.end()
        super().restore(common, memory, interrupt)
        with self._lock:
            self._must_add, self._must_name = must_add, must_name
            self._is_ready, self._told_driver = is_ready, told_driver
            self._is_opened, self._is_hung_up = is_opened, is_hung_up
            self._is_stale = is_opened and not is_hung_up
            self._for_guest[:], self._for_host = for_guest, for_host

    def process_queue(self, index: int) -> float | None:
        """See ``VirtioDevice.process_queue``; empty buffers to receive into are no work."""
        self._tell_host()
        if index == TRANSMIT:
            # The driver says that it has opened the port before it transmits, but this thread may
            # see the two doorbells in the other order.
            if not self._told_host and super().process_queue(CONTROL_TRANSMIT) is not None:
                self._slot.serve(CONTROL_TRANSMIT)
            if not self._deliver(self._for_host):
                return None
        if not self._has_work(index):
            return None
        delay_s = super().process_queue(index)
        return delay_s if self._has_work(index) else None

    def _has_work(self, index: int) -> bool:
        """True unless chains of the queue have to wait for the host."""
        with self._lock:
            if index == CONTROL_RECEIVE:
                return self._next_message() is not None
            if index == RECEIVE:
                return bool(self._for_guest)
            if index == TRANSMIT:
                return not self._for_host
            return index != PORT_0_RECEIVE

    def _serve_ring(self, index: int, ring: Ring, memory: GuestMemory) -> float:
        """See ``RingDevice._serve_ring``."""
        chains = for_one_pass(ring.take_chains(), self._take_extra_work)
        if index == CONTROL_RECEIVE:
            while self._has_work(index) and (chain := next(chains, None)):
                ring.push(chain, self._send_message(chain, memory))
        elif index == RECEIVE:
            while self._has_work(index) and (chain := next(chains, None)):
                ring.push(chain, self._fill(chain, memory))
        elif index == CONTROL_TRANSMIT:
            for chain in chains:
                has_moved = self._take_message(_read(chain, memory, _CONTROL.size))
                ring.push(chain, 0)
                if has_moved:
                    break  # the port's own queue was served: that is enough for a pass
        else:
            for chain in chains:
                ring.push(chain, self._serve(chain, memory) if index == TRANSMIT else 0)
                if self._for_host:
                    break
        return 0.0

    def _serve(self, chain: Chain, memory: GuestMemory) -> int:
        """Give the bytes of a chain of the transmit queue to the host, and write none into it."""
        if self._told_host:  # else nobody gets them
            self._deliver(_read(chain, memory, MAX_CHAIN_BYTES))
        return 0

    def _deliver(self, data: bytes) -> bool:
        """Offer ``data`` to the host and keep what it leaves; False if it left some."""
        self._for_host = b""
        if data and self._told_host:
            self._for_host = data[self._on_data(data) :]
        return not self._for_host

    def _fill(self, chain: Chain, memory: GuestMemory) -> int:
        """Put bytes for the guest into ``chain``; return how many."""
        room = min(MAX_WAITING_BYTES, sum(length for _, length in chain.writable))
        with self._lock:
            written = _write(chain, memory, bytes(self._for_guest[:room]))
            del self._for_guest[:written]
        self._on_room()
        return written

    # Control messages

    def _next_message(self) -> bytes | None:
        """Return what the driver has to be told next, None if nothing.  Under the lock."""
        if self._must_add:
            return _CONTROL.pack(PORT, PortEvent.PORT_ADD, 1)
        if self._must_name:
            return _CONTROL.pack(PORT, PortEvent.PORT_NAME, 1) + PORT_NAME
        if self._is_ready and self._told_driver != self._is_host_open:
            return _CONTROL.pack(PORT, PortEvent.PORT_OPEN, self._is_host_open)
        return None

    def _send_message(self, chain: Chain, memory: GuestMemory) -> int:
        """Put the next control message into ``chain``; return its length.

        A chain without room for it gets what fits: a driver that gives such a one has told itself.
        """
        with self._lock:
            message = self._next_message() or b""
            if self._must_add:
                self._must_add = False
            elif self._must_name:
                self._must_name = False
            else:
                self._told_driver = self._is_host_open
        return _write(chain, memory, message)

    def _take_message(self, message: bytes) -> bool:
        """Do what a control message of the driver says; True if the port was opened or closed.

        Messages that are too short, or of another port, or not for a device are ignored.
        """
        if len(message) < _CONTROL.size:
            return False
        port, event, value = _CONTROL.unpack(message)
        if event == PortEvent.PORT_OPEN and port == PORT and self._is_ready:
            if not value and self._deliver(self._for_host):
                super().process_queue(TRANSMIT)  # what the guest sent before
            with self._lock:
                self._set_opened(bool(value))
            self._tell_host()
            if not value:
                super().process_queue(TRANSMIT)  # is for nobody
            self._slot.serve(CONTROL_RECEIVE)
            return True
        with self._lock:
            if event == PortEvent.DEVICE_READY:
                self._must_add = value == 1
            elif event == PortEvent.PORT_READY and port == PORT:
                self._must_name = self._is_ready = value == 1
                self._told_driver = False
        self._slot.serve(CONTROL_RECEIVE)
        return False

    def _set_opened(self, is_opened: bool) -> None:
        """The guest opens or closes the port, or opens it anew.  Under the lock."""
        self._has_closed = self._has_closed or self._is_opened
        self._is_opened = is_opened
        self._is_hung_up = self._is_stale = False
        self._for_guest.clear()
        self._for_host = b""

    def _tell_host(self) -> None:
        """Tell the host how the guest's side stands, if it has changed; on the device's thread."""
        with self._lock:
            must_close = self._told_host and (self._has_closed or not self._is_open)
            must_open = self._is_open and (must_close or not self._told_host)
            self._has_closed = False
            self._told_host = self._is_open
            if must_close:
                self._for_host = b""
        if must_close:
            self._on_open(False)
        if must_open:
            self._on_open(True)
            self._on_room()


def _read(chain: Chain, memory: GuestMemory, limit: int) -> bytes:
    """Return up to ``limit`` bytes of ``chain``, those before an address that is none."""
    data = bytearray()
    for gpa, length in chain.readable:
        try:
            data += memory.read(gpa, min(length, limit - len(data)))
        except GuestMemoryError:
            break
        if len(data) == limit:
            break
    return bytes(data)


def _write(chain: Chain, memory: GuestMemory, data: bytes) -> int:
    """Write of ``data`` what fits into ``chain``; return the number of bytes."""
    written = 0
    for gpa, length in chain.writable:
        piece = data[written : written + length]
        if not piece:
            break
        try:
            memory.write(gpa, piece)
        except GuestMemoryError:
            break  # the driver gave an address that is none, and gets nothing there
        written += len(piece)
    return written
