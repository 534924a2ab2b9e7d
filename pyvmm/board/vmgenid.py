"""The VM generation ID: 16 bytes by which a guest learns that it is a clone.

Microsoft's "Virtual Machine Generation ID".  A kernel that knows it adds the bytes to its random
numbers when it starts, and reseeds them at once when it is told that the bytes have changed.
Without that two clones of one guest give the same "random" bytes: the state of the generator was
in the RAM that both got.

The ID is in guest RAM (``layout.VMGENID_GPA``).  The news comes as an edge on
``layout.GED_GSI``, the line of ACPI's generic event device.  An edge needs no acknowledgement, so
the guest never leaves for it.
"""

from __future__ import annotations

import os

from pyvmm.kvm.handles import Vm
from pyvmm.memory import GuestMemory
from pyvmm.startup.types import TYPE_CHECKING
from pyvmm.x86 import layout

if TYPE_CHECKING:
    from uuid import UUID

_ID_BYTES = 16


class VmGenId:
    """The generation ID of a machine whose RAM is ``memory``: random, until ``set``.

    The guest sees it once ``show`` was called, which is only for guests that get ACPI's tables.
    Like all RAM it is the guest's to overwrite, which harms only the guest.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._bytes = os.urandom(_ID_BYTES)
        self._is_shown = False
        self._is_news = False
        self._vm: Vm | None = None

    @property
    def value(self) -> UUID:
        """The ID, read as Linux and Windows read those bytes."""
        from uuid import UUID  # not on the boot path

        return UUID(bytes_le=self._bytes)

    def show(self) -> None:
        """Put the ID into RAM, where ACPI's tables say that it is."""
        self._is_shown = True
        self._write()

    def connect(self, vm: Vm) -> None:
        """Take the interrupt line of ``vm``."""
        self._vm = vm

    def set(self, value: UUID) -> None:
        """Give a restored machine the ID ``value``; ``notify`` tells the guest.

        The guest must be quiesced or not started, and its RAM in place.
        """
        self._take(value.bytes_le)

    def renew(self) -> None:
        """Give the machine a new, random ID: see ``set``."""
        octets = bytearray(os.urandom(_ID_BYTES))
        octets[7] = octets[7] & 0x0F | 0x40  # RFC 9562, 5.4: version 4, with the first words
        octets[8] = octets[8] & 0x3F | 0x80  # in the order of ``bytes_le``
        self._take(bytes(octets))

    def notify(self) -> None:
        """Interrupt the guest if ``set`` has changed the ID since; once for each change."""
        if self._is_news and self._is_shown and self._vm is not None:
            self._vm.irq_line(layout.GED_GSI, True)
            self._vm.irq_line(layout.GED_GSI, False)
        self._is_news = False

    def save(self) -> dict[str, object]:
        """Return the state."""
        return {"id": self._bytes, "is_shown": self._is_shown}

    def restore(self, data: object) -> None:
        """Take what ``save`` returned, without a word to the guest; StateError.

        RAM has the ID already: it is the caller's to restore.
        """
        from pyvmm.state import Fields  # not on the boot path

        fields = Fields("VM generation ID", data)
        octets = fields.octets("id", _ID_BYTES, _ID_BYTES)
        is_shown = fields.boolean("is_shown")
        fields.end()
        self._bytes, self._is_shown, self._is_news = octets, is_shown, False

    def _take(self, octets: bytes) -> None:
        self._is_news = octets != self._bytes
        self._bytes = octets
        if self._is_shown:
            self._write()

    def _write(self) -> None:
        self._memory.write(layout.VMGENID_GPA, self._bytes)
