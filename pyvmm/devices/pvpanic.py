"""pvpanic, the ISA kind: a port where a panicking guest says so (QEMU, docs/specs/pvpanic)."""

from __future__ import annotations

from collections.abc import Callable

from pyvmm.devices.byte_device import ByteDevice
from pyvmm.startup.types import IntFlag


class Event(IntFlag):
    """The bits of the port, as in Linux's include/uapi/misc/pvpanic.h."""

    PANICKED = 1 << 0
    """A panic that the host must handle."""
    CRASH_LOADED = 1 << 1
    """A panic that the guest handles itself: a crash kernel takes over."""


EVENTS = Event.PANICKED | Event.CRASH_LOADED


class PvPanic(ByteDevice):
    """One port: reads tell which events are understood, a write reports some of them.

    ``on_panic`` and ``on_crash_loaded`` are each called at their first event only, because a
    repeated report has nothing new to say.  They run in the thread of the vCPU that reports.  Linux
    reports after it has printed the panic and the stack, before it reboots or halts.
    """

    LENGTH = 1

    def __init__(
        self, on_panic: Callable[[], None], on_crash_loaded: Callable[[], None] = lambda: None
    ) -> None:
        self._handlers = {Event.PANICKED: on_panic, Event.CRASH_LOADED: on_crash_loaded}

    def save(self) -> dict[str, object]:
        """Return the events that were reported, which have no handler any more."""
        return {"reported": sum(event for event in Event if event not in self._handlers)}

    def restore(self, data: object) -> None:
        """Take what ``save`` returned; StateError."""
        from pyvmm.state import Fields  # not on the boot path

        fields = Fields("pvpanic", data)
        reported = fields.integer("reported", 0, EVENTS)
        fields.end()
        for event in Event:
            if reported & event:
                self._handlers.pop(event, None)

    def read_byte(self, offset: int) -> int:
        """Return the events that are understood here; Linux uses only these."""
        return EVENTS

    def write_byte(self, offset: int, value: int) -> None:
        """Report the events in ``value``; bits without a meaning are ignored."""
        for event in Event:
            if value & event and (handler := self._handlers.pop(event, None)):
                handler()
