"""Hooks: functions of a script that watch, answer or refuse what a guest does (docs/api.md).

None of them costs anything until it is installed.  A bus's table, a disk's backend and the
function that enters a vCPU are then replaced by others that ask the hook.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from pyvmm.api.hook_calls import Hook, HookCalls, Refusal, check_hook
from pyvmm.api.hooked_bus import Access, put_hook
from pyvmm.api.hooked_exits import hooked_enter
from pyvmm.board.board import Board
from pyvmm.board.polled_uart import PolledUart
from pyvmm.errors import ConfigError
from pyvmm.kvm.exits import Exit
from pyvmm.run.runner import Runner
from pyvmm.run.vcpu_loop import MMIO_GRANULE_BITS, VcpuLoop
from pyvmm.startup.types import TYPE_CHECKING, Protocol
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.spec import DeviceType
from pyvmm.x86 import layout

if TYPE_CHECKING:
    from pyvmm.api.hooked_disk import DiskRequest, HookedBackend
    from pyvmm.storage.backend import BlockBackend

MAX_MMIO_BYTES = 1 << 30
"""The longest range of addresses for one hook: its pages are entered in a table one by one."""


class Hookable(Protocol):
    """The parts of a machine that hooks are put into: see ``pyvmm.machine.Machine``."""

    @property
    def board(self) -> Board:
        """The buses and slots."""

    @property
    def loops(self) -> Sequence[VcpuLoop]:
        """The vCPUs."""

    @property
    def runner(self) -> Runner:
        """The end of the run."""


class Hooks:
    """The hooks of ``machine``, which was built and need not have started.

    Several hooks on one place are asked in the order in which they were installed; the first
    answer that is not None counts, and the others are not asked.  A hook runs in the thread that
    it watches, and the guest waits for it.  One that raises ends the run with an outcome of the
    kind HOST_ERROR, which names the hook and has its traceback.  Waiting for the machine in a hook
    would be waiting for itself: ``wait``, ``pause`` and ``stop`` raise RuntimeError there.
    """

    def __init__(self, machine: Hookable) -> None:
        self._machine = machine
        self._calls = HookCalls(machine.runner.finish)
        self._lock = threading.Lock()
        self._exit_hooks: list[Hook] = []
        self._disks: dict[str, HookedBackend] = {}

    def on_port(
        self, ports: int | range, hook: Callable[[Access], int | Refusal | None]
    ) -> None:
        """Have ``hook`` asked at each access to one of ``ports``, whether or not a device is there.

        None goes on as if there were no hook.  An int is the answer of a read, or is written
        instead.  REFUSE: nobody is there.  An access of several bytes belongs to its first port.
        At any time, also while the guest runs.

        The interrupt chips and the timer (ports 0x20, 0x21, 0x40 to 0x43, 0x61, 0xa0, 0xa1, 0x4d0,
        0x4d1) are in KVM: accesses to them make no exit, and no hook sees them.

        TypeError or ValueError for anything but ports from 0 to 0xffff and a function.
        """
        places = _places("on_port", "a port", ports, 1 << 16)
        check_hook("on_port", hook)
        with self._lock:
            if layout.SERIAL_PORT in places:
                self._show_every_write()
            pio = self._machine.board.pio
            put_hook(pio, places, places, hook, "on_port", self._calls, self._vcpu_index)

    def on_mmio(
        self, addresses: int | range, hook: Callable[[Access], int | Refusal | None]
    ) -> None:
        """Have ``hook`` asked at each access to one of ``addresses``, guest physical ones.

        Answers are those of ``on_port``.  An access belongs to its first address.  At any time,
        also while the guest runs.

        A virtio device's register page is memory to a guest that reads it: ``mmio="trapped"``
        shows reads, and acknowledged interrupts.  A device that a thread of its own serves gets its
        notifications from KVM: ``serve="exit"`` shows those of disks.

        ValueError if RAM is among the addresses, which makes no exits, or more than 1 GiB of them.
        """
        places = _places("on_mmio", "an address", addresses, 1 << 64)
        check_hook("on_mmio", hook)
        low, high = min(places[0], places[-1]), max(places[0], places[-1])
        if high - low >= MAX_MMIO_BYTES:
            raise ValueError(f"on_mmio: {low:#x} to {high:#x} is more than 1 GiB of addresses")
        for region in self._machine.board.memory.regions:
            if low < region.end and region.gpa <= high:
                raise ValueError(
                    f"on_mmio: {low:#x} to {high:#x} has RAM in it ({region.gpa:#x} to "
                    f"{region.end - 1:#x}), and accesses to RAM make no exit"
                )
        pages = range(low >> MMIO_GRANULE_BITS, (high >> MMIO_GRANULE_BITS) + 1)
        with self._lock:
            mmio = self._machine.board.mmio
            put_hook(mmio, pages, places, hook, "on_mmio", self._calls, self._vcpu_index)

    def on_exit(self, hook: Callable[[int, Exit], int | Refusal | None]) -> None:
        """Have ``hook(vcpu_index, exit)`` asked at each exit of every vCPU, before all else.

        ``exit`` is one of ``pyvmm.kvm.exits``.  For port and memory accesses the answers are those
        of ``on_port``; if there are several items (INS, OUTS), the int is each of them.  A device,
        and its ``on_port`` or ``on_mmio`` hooks, see no exit that was answered, but they see the
        int that is written instead.  All other exits can only be watched.

        A kick, by which another thread brings a vCPU out of the guest, is no exit.  RuntimeError
        once the machine has started.
        """
        check_hook("on_exit", hook)
        self._refuse_if_begun("on_exit")
        with self._lock:
            self._show_every_write()
            if not self._exit_hooks:
                for index, loop in enumerate(self._machine.loops):
                    loop.enter = hooked_enter(loop, index, self._exit_hooks, self._calls)
            self._exit_hooks.append(hook)

    def on_request(
        self, disk: int | str, hook: Callable[[DiskRequest], bytes | Refusal | None]
    ) -> None:
        """Have ``hook`` asked about each request of the guest to ``disk``.

        ``disk`` is the index of a disk, or its name: the first is 0, ``virtio0`` or ``vda``.  None
        goes on as if there were no hook.  Bytes are the answer of a read, or are written instead:
        as many as ``request.length``.  REFUSE, or an OSError that the hook raises, gives the guest
        an I/O error.  Requests are no longer merged then, so that each is seen.

        RuntimeError once the machine has started.  ConfigError for a disk that another process
        serves: its requests never come here.
        """
        check_hook("on_request", hook)
        self._refuse_if_begun("on_request")
        name, device = self._find_disk(disk)
        from pyvmm.api.hooked_disk import HookedBackend
        from pyvmm.virtio.block import BlockDevice

        if device.is_served_elsewhere or not isinstance(device, BlockDevice):
            raise ConfigError(
                f"on_request({disk!r})",
                "another process serves this disk, and its requests never come here; on_request "
                "is for disks that pyvmm serves",
            )
        with self._lock:
            if name not in self._disks:
                def wrap(backend: BlockBackend) -> HookedBackend:
                    self._disks[name] = HookedBackend(backend, self._calls)
                    return self._disks[name]

                device.put_before_backend(wrap)
            self._disks[name].hooks += (hook,)

    def begin_anew(self) -> None:
        """Call hooks again, after one that raised: the machine was rewound."""
        self._calls.begin_anew()

    def run_hook(self, name: str, hook: Callable[..., object], value: object) -> None:
        """Call ``hook(value)``, which the method ``name`` has installed; any answer will do."""
        self._calls.ask(name, (hook,), (value,), lambda answer: answer)

    def _refuse_if_begun(self, method: str) -> None:
        if self._machine.runner.has_begun:
            raise RuntimeError(f"{method}() comes before the start: this machine has started")

    def _find_disk(self, disk: object) -> tuple[str, VirtioDevice]:
        all_slots = self._machine.board.slots
        slots = [slot for slot in all_slots if slot.device.device_type == DeviceType.BLOCK]
        if isinstance(disk, bool) or not isinstance(disk, (int, str)):
            raise TypeError(
                f"on_request takes a disk's index or name, not {type(disk).__name__}"
            )
        for index, slot in enumerate(slots):
            if disk in (index, slot.name, f"vd{chr(ord('a') + index)}"):
                return slot.name, slot.device
        names = ", ".join(f"{index} ({slot.name})" for index, slot in enumerate(slots))
        raise ValueError(f"on_request: there is no disk {disk!r}; there are: {names or 'none'}")

    def _show_every_write(self) -> None:
        """Have KVM gather no writes to the serial port, which would make no exits."""
        entry = self._machine.board.pio.find(layout.SERIAL_PORT)
        if entry is not None and isinstance(entry[2], PolledUart):
            entry[2].stop_gathering()

    def _vcpu_index(self) -> int:
        """Return the index of the vCPU whose thread calls."""
        ident = threading.get_ident()
        for index, loop in enumerate(self._machine.loops):
            if loop.thread_ident == ident:
                return index
        return 0


def _places(method: str, what: str, places: object, end: int) -> range:
    """Return the int or range ``places`` as a range that lies in 0 to ``end``."""
    if isinstance(places, int) and not isinstance(places, bool):
        places = range(places, places + 1)
    if not isinstance(places, range):
        raise TypeError(
            f"{method} takes {what} or a range of them, not {type(places).__name__}"
        )
    if not places:
        raise ValueError(f"{method}: {places} is empty")
    for place in (places[0], places[-1]):
        if not 0 <= place < end:
            raise ValueError(f"{method}: {place:#x} is outside 0 to {end - 1:#x}")
    return places
