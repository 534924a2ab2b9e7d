"""The console device (virtio 1.2, 5.3 "Console Device"): one port, many bytes a notification.

A UART costs an exit or two for every byte.  Here Linux's hvc driver hands over up to 16 bytes of
a message at a time, and a program's output by the page.

Input is held back from a driver that has only just begun to run.  Linux offers receive buffers
first and lists its port afterwards, and what comes in between it throws away
(drivers/char/virtio_console.c, in_intr).  A port that transmits is there, or will be in a moment.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable

from pyvmm.errors import GuestMemoryError
from pyvmm.memory import GuestMemory
from pyvmm.virtio.device import PASS_BYTES as PASS_WORK
from pyvmm.virtio.device import Interrupt, RingDevice, for_one_pass
from pyvmm.virtio.ring.queue import Chain, Ring
from pyvmm.virtio.spec import ConsoleFeature, DeviceType, Feature

RECEIVE_QUEUE, TRANSMIT_QUEUE = 0, 1
QUEUE_SIZE = 64
MAX_CHAIN_BYTES = 64 << 10
"""Of one chain no more is shown: a guest cannot make us keep its memory in ours."""
PASS_BYTES = 64 << 10
"""After so many shown, a pass takes no further chain: whoever serves it may wait for the terminal,
and the transport's lock with it."""
_SHOWN_WORK = PASS_WORK // PASS_BYTES
"""Bytes moved in any other pass that a byte shown counts for."""
MAX_TYPED_BYTES = 4096
HOLD_S = 0.05
"""Input waits for so long after the first output: another CPU may send it in the driver's name, a
moment before the port is listed."""
MAX_HOLD_S = 5.0
"""So long it waits for a driver that sends nothing: some only read."""

# struct virtio_console_config { le16 cols; le16 rows; le32 max_nr_ports; le32 emerg_wr; }
_CONFIG = struct.Struct("<HHII")
_EMERG_WR_OFFSET = 8


class ConsoleDevice(RingDevice):
    """A console whose output goes to ``transmit``, on the thread that serves the queue.

    Input is given to ``receive``; ``on_room`` is called when there is room for some again.
    ``size`` returns the terminal's ``(columns, rows)``, (0, 0) if there is none.  ``on_reset`` is
    called when the driver is gone.
    """

    device_type = DeviceType.CONSOLE

    def __init__(
        self,
        transmit: Callable[[bytes], None],
        on_room: Callable[[], None],
        *,
        size: Callable[[], tuple[int, int]] = lambda: (0, 0),
        on_reset: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        features = Feature.VERSION_1 | Feature.INDIRECT_DESC | Feature.EVENT_IDX
        super().__init__(
            avail_features=features | ConsoleFeature.SIZE | ConsoleFeature.EMERG_WRITE,
            queue_max_sizes=(QUEUE_SIZE, QUEUE_SIZE),
        )
        self._transmit = transmit
        self._on_room = on_room
        self._on_reset = on_reset
        self._ask_size = size
        self._size = size()
        self._must_tell_size = False
        self._shown_bytes = 0
        # Typed on one thread, taken on another.
        self._lock = threading.Lock()
        self._typed = bytearray()
        self._clock = clock
        self._has_sent = False  # since it was activated
        self._open_s = 0.0  # when the driver may have input

    def receive(self, data: bytes) -> int:
        """Take typed bytes, as many as there is room for; return how many.

        From any thread.  Nothing is taken before the driver runs.
        """
        if not self.is_activated:
            return 0
        with self._lock:
            taken = data[: MAX_TYPED_BYTES - len(self._typed)]
            self._typed += taken
        self._slot.serve(RECEIVE_QUEUE)
        return len(taken)

    def refresh(self) -> bool:
        """See ``VirtioDevice.refresh``: the terminal may have another size.

        True too for a driver that has just begun: Linux's looks at the size only when told.
        """
        before, self._size = self._size, self._ask_size()
        if self._must_tell_size:
            self._must_tell_size = False
            return True
        return before != self._size

    def read_config(self, offset: int, length: int) -> bytes:
        """See ``VirtioDevice.read_config``."""
        columns, rows = self._size
        space = _CONFIG.pack(columns & 0xFFFF, rows & 0xFFFF, 1, 0)
        return space[offset : offset + length].ljust(length, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """Show one character without any queue, even before DRIVER_OK (5.3.4 "Emergency
        write")."""
        if offset == _EMERG_WR_OFFSET:
            self._transmit(data[:1])

    def reset(self) -> None:
        """See ``VirtioDevice.reset``; what was typed and not yet read stays."""
        super().reset()
        self._on_reset()

    def activate(self, memory: GuestMemory, interrupt: Interrupt) -> None:
        """See ``VirtioDevice.activate``; from now on input is taken.

        Bytes that no earlier driver has read, before a reset, are for this one.
        """
        super().activate(memory, interrupt)
        self._has_sent = False
        self._open_s = self._clock() + MAX_HOLD_S
        self._on_room()
        self._must_tell_size = True
        self._slot.refresh()
        self._slot.serve(RECEIVE_QUEUE)

    def save(self) -> dict[str, object]:
        """See ``VirtioDevice.save``."""
        columns, rows = self._size
        held_ms = round((self._open_s - self._clock()) * 1000) if self.is_activated else 0
        with self._lock:
            return {
                "common": super().save(), "columns": columns & 0xFFFF, "rows": rows & 0xFFFF,
                "must_tell_size": self._must_tell_size, "typed": bytes(self._typed),
                "has_sent": self._has_sent, "input_held_ms": max(0, held_ms),
            }

    def restore(self, data: object, memory: GuestMemory, interrupt: Interrupt) -> None:
        """See ``VirtioDevice.restore``.

        The size is the one that the driver knows: ``refresh`` tells it of the terminal's own.
        """
        from pyvmm.state import Fields  # not on the boot path

        fields = Fields(self.name, data)
        common, typed = fields.take("common"), fields.octets("typed", 0, MAX_TYPED_BYTES)
        size = fields.integer("columns", 0, 0xFFFF), fields.integer("rows", 0, 0xFFFF)
        must_tell_size, has_sent = fields.boolean("must_tell_size"), fields.boolean("has_sent")
        held_ms = fields.integer("input_held_ms", 0, int(MAX_HOLD_S * 1000))
        fields.end()
        super().restore(common, memory, interrupt)
        with self._lock:
            self._typed[:] = typed
        self._size, self._must_tell_size, self._has_sent = size, must_tell_size, has_sent
        self._open_s = self._clock() + held_ms / 1000
        if self.is_activated:
            self._on_room()

    def process_queue(self, index: int) -> float | None:
        """See ``VirtioDevice.process_queue``; empty buffers to receive into are no work."""
        if index == RECEIVE_QUEUE:
            if not self._typed:
                return None
            held_s = self._open_s - self._clock()
            if held_s > 0.0:
                return min(held_s, HOLD_S)
        delay_s = super().process_queue(index)
        return delay_s if index != RECEIVE_QUEUE or self._typed else None

    def _serve_ring(self, index: int, ring: Ring, memory: GuestMemory) -> float:
        """See ``RingDevice._serve_ring``; the receive queue's chains wait for something typed."""
        chains = for_one_pass(ring.take_chains(), self._take_extra_work)
        if index != RECEIVE_QUEUE:
            if not self._has_sent:
                self._has_sent = True
                self._open_s = min(self._open_s, self._clock() + HOLD_S)
            for chain in chains:
                ring.push(chain, self._serve(chain, memory))
            return 0.0
        while self._typed and (room := next(chains, None)):
            ring.push(room, self._fill(room, memory))
        return 0.0

    def _take_extra_work(self) -> int:
        """See ``RingDevice._take_extra_work``: to show text takes longer than to move it."""
        shown_bytes, self._shown_bytes = self._shown_bytes, 0
        return shown_bytes * _SHOWN_WORK

    def _fill(self, chain: Chain, memory: GuestMemory) -> int:
        """Put typed bytes into ``chain``; return how many."""
        written = 0
        for gpa, length in chain.writable:
            with self._lock:
                if not (piece := bytes(self._typed[:length])):
                    break
                try:
                    memory.write(gpa, piece)
                except GuestMemoryError:
                    break  # the driver gave an address that is none, and gets nothing there
                del self._typed[: len(piece)]
            written += len(piece)
        self._on_room()
        return written

    def _serve(self, chain: Chain, memory: GuestMemory) -> int:
        """Show the bytes of a chain of the transmit queue, all at once, and write none into it.

        Showing one byte costs as much as showing many."""
        data = bytearray()
        for gpa, length in chain.readable:
            try:
                data += memory.read(gpa, min(length, MAX_CHAIN_BYTES - len(data)))
            except GuestMemoryError:
                break
            if len(data) == MAX_CHAIN_BYTES:
                break
        if data:
            self._transmit(bytes(data))
            self._shown_bytes += len(data)
        return 0
