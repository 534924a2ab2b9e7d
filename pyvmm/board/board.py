"""The board: the buses of a machine, and the slots that virtio devices are plugged into."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import time
from collections.abc import Callable

from pyvmm.board.bus import Bus
from pyvmm.board.slot import Slot, eventfd
from pyvmm.board.vmgenid import VmGenId
from pyvmm.errors import ConfigError
from pyvmm.kvm.handles import Vm
from pyvmm.memory import PAGE_SIZE, GuestMemory
from pyvmm.run.io_loop import LAST_WAIT_S, IoSource
from pyvmm.run.vcpu_loop import MMIO_GRANULE_BITS
from pyvmm.startup.types import TYPE_CHECKING
from pyvmm.virtio.device import VirtioDevice
from pyvmm.x86 import layout

if TYPE_CHECKING:
    from pyvmm.board.state import Chip, Part


PAGES_SLOT = 8
"""KVM's memory slot for the register pages; those below are RAM."""


class Board:
    """``pio``, ``mmio`` and ``slots``, in the order in which the guest finds them.

    ``parts`` are all others that have a state, by name; ``vmgenid`` is one of them.

    Devices are plugged in first; no KVM is needed for that.  Then ``describe`` tells the guest of
    them.  ``map_memory`` comes before KVM's interrupt chips: afterwards each change of memory waits
    until KVM has freed what they left behind on its own I/O bus, 5 to 8 ms (Linux 6.18).
    ``connect`` comes after them.

    ``stack`` closes all that is on the board; ``report`` takes lines for the user.
    ``maps_pages`` asks for register pages that are mapped (``slot`` has what that means).
    """

    def __init__(
        self, memory: GuestMemory, stack: contextlib.ExitStack, *, maps_pages: bool,
        report: Callable[[str], None],
    ) -> None:
        self.memory = memory
        self.pio, self.mmio = Bus("PIO", 0), Bus("MMIO", MMIO_GRANULE_BITS)
        self.slots: list[Slot] = []
        self.parts: dict[str, Part] = {}
        self._stack = stack
        self._maps_pages = maps_pages
        self._report = report
        self._extra_sources: list[tuple[str, IoSource]] = []
        self._is_hurried = False
        # All in one piece of memory, because each piece is a slot of KVM's, and each slot that is
        # set waits until no vCPU of the host looks at the old ones: 1 to 8 ms.
        self._pages = mmap.mmap(-1, layout.MAX_VIRTIO_DEVICES * PAGE_SIZE)
        stack.callback(self._pages.close)
        self.vmgenid = VmGenId(memory)
        self.add_part("VM generation ID", self.vmgenid)

    def plug(self, device: VirtioDevice, name: str = "", *, at_exit: bool = False) -> Slot:
        """Give ``device`` the next slot, which owns it from now on, and return the slot.

        ``name`` is that of its thread and of its lines to the user, "virtio" and the slot's number
        unless given.  With ``at_exit`` the vCPU that writes a notification serves it, which is for
        devices that never wait; else the device's thread does.

        ConfigError if there is no interrupt line left, ValueError if ``name`` is taken.
        """
        index = len(self.slots)
        if index == layout.MAX_VIRTIO_DEVICES:
            raise ConfigError(
                f"device {name or type(device).__name__}",
                f"is one too many: this machine has lines for {index} virtio devices",
            )
        name = name or f"virtio{index}"
        if any(slot.name == name for slot in self.slots):
            raise ValueError(f"two devices are named {name!r}: each needs a name of its own")
        page = self._page(index)
        try:
            slot = Slot(
                index, device, name, self.memory, page=page,
                keep_used=self._maps_pages, at_exit=at_exit, report=self._report,
            )
        except BaseException:
            page.release()
            raise
        self._stack.callback(slot.close)
        self._stack.callback(self.hurry)  # before the first of them is closed
        self.mmio.add(slot.base, layout.VIRTIO_MMIO_STRIDE, slot.transport)
        self.slots.append(slot)
        return slot

    def add_source(self, thread: str, source: IoSource) -> None:
        """Have the thread called ``thread``, a slot's or one of its own, serve ``source`` too."""
        self._extra_sources.append((thread, source))

    def add_port(self, name: str, base: int, chip: Chip) -> None:
        """Give ``chip`` its ports from ``base``; its state is saved as ``name``.

        ValueError if the name or one of the ports is taken.
        """
        self.add_part(name, chip)
        self.pio.add(base, chip.LENGTH, chip)

    def add_part(self, name: str, part: Part) -> None:
        """Have the state of ``part`` saved as ``name``; ValueError if that is taken."""
        if name in self.parts:
            raise ValueError(f"two parts are named {name!r}: each needs a name of its own")
        self.parts[name] = part

    @property
    def workers(self) -> list[tuple[str, list[IoSource]]]:
        """The threads by name, each with what it has to serve."""
        threads = {slot.name: list(slot.sources) for slot in self.slots}
        for name, source in self._extra_sources:
            threads.setdefault(name, []).append(source)
        return list(threads.items())

    def map_memory(self, vm: Vm, *, can_map_pages: bool) -> None:
        """Give ``vm`` all memory: RAM, and the register pages if they are to be mapped.

        Without ``can_map_pages`` every access to a register is an exit.  The used buffer bits stay
        set all the same, which costs a driver nothing.
        """
        self._maps_pages = self._maps_pages and can_map_pages
        for number, region in enumerate(self.memory.regions):
            vm.set_user_memory_region(number, region.gpa, region.length, region.host_address)
        if self._maps_pages and self.slots:
            size = len(self.slots) * PAGE_SIZE
            address = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))
            vm.set_user_memory_region(PAGES_SLOT, self.slots[0].base, size, address, read_only=True)

    def _page(self, index: int) -> memoryview:
        """Return the register page of slot ``index``."""
        at = index * PAGE_SIZE
        return memoryview(self._pages)[at : at + PAGE_SIZE]

    def connect(self, vm: Vm) -> None:
        """Connect every slot with the interrupt chips of ``vm``."""
        ignored_ack_fd = eventfd(self._stack) if self._maps_pages else None
        for slot in self.slots:
            slot.connect(vm, ignored_ack_fd)
        self.vmgenid.connect(vm)

    def refresh(self) -> None:
        """Have every device look at the host again, on its own thread; from any thread."""
        for slot in self.slots:
            slot.refresh()

    def save(self) -> dict[str, object]:
        """Return the states of all parts and slots (docs/architecture.md, "State"); StateError."""
        from pyvmm.board import state  # not on the boot path

        return state.save_board(self)

    def restore(self, data: object) -> None:
        """Give each part and slot its state, by name; StateError.

        If ``data`` is refused, some of them may have taken theirs.
        """
        from pyvmm.board import state

        state.restore_board(self, data)

    def calm(self) -> None:
        """Let all who serve devices take their time again: another run begins."""
        self._is_hurried = False
        for slot in self.slots:
            slot.device.hurry(float("inf"))

    def hurry(self) -> None:
        """Give all who serve devices, together, LAST_WAIT_S from the first call on.

        To be called when the run ends; from any thread.
        """
        if self._is_hurried:
            return
        self._is_hurried = True
        until_s = time.monotonic() + LAST_WAIT_S
        with contextlib.ExitStack() as stack:  # each is told, whatever another raises
            for slot in reversed(self.slots):
                stack.callback(slot.device.hurry, until_s)
