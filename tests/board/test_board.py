"""Devices on a board without KVM: what a slot owns, and what the guest is told of it."""

from __future__ import annotations

import contextlib
import os
import re
import select
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from pyvmm.board.board import Board
from pyvmm.board.describe import describe
from pyvmm.config import RunConfig
from pyvmm.errors import ConfigError
from pyvmm.memory import GuestMemory
from pyvmm.run.io_loop import IoLoop, IoSource
from pyvmm.virtio.device import Plug, RingDevice
from pyvmm.virtio.entropy.device import EntropyDevice
from pyvmm.virtio.ring.queue import Chain
from pyvmm.virtio.spec import Feature, InterruptBit, Register
from pyvmm.x86 import layout
from pyvmm.x86.loader import load_kernel
from tests.support.kernels import elf
from tests.support.patience import patient
from tests.support.vhost_user_peers import open_fds
from tests.support.virtio_driver import VirtioDriver, readable, writable

RAM_BYTES = 8 << 20
DRIVER_RAM = 4 << 20


class CountingDevice(RingDevice):
    """Writes into each chain, and shows in its configuration space, how much was put into ``tank``.

    Lives in this test alone: no file of pyvmm knows of it.  ``tank`` is a pipe of the device's own.
    """

    device_type: ClassVar[int] = 63

    def __init__(self) -> None:
        super().__init__(avail_features=Feature.VERSION_1, queue_max_sizes=(8, 8))
        self.outlet, self.tank = os.pipe()
        os.set_blocking(self.outlet, False)
        self.level = self.shown = 0
        self.threads: set[str] = set()
        self.until_s: float | None = None
        self.closed = 0

    def plug(self, slot: Plug) -> Sequence[IoSource]:
        super().plug(slot)
        return [IoSource(self.outlet, self._take, edge_triggered=False)]

    def _take(self) -> None:
        """The tank's source: tell the driver, and answer what waits in queue 1."""
        self.threads.add(threading.current_thread().name)
        self.level += len(os.read(self.outlet, 64))
        self._slot.refresh()
        self._slot.serve(1)

    def refresh(self) -> bool:
        self.threads.add(threading.current_thread().name)
        before, self.shown = self.shown, self.level
        return self.shown != before

    def hurry(self, until_s: float) -> None:
        self.until_s = until_s

    def close(self) -> None:
        self.closed += 1
        if self.closed == 1:
            os.close(self.outlet)
            os.close(self.tank)

    def read_config(self, offset: int, length: int) -> bytes:
        return self.shown.to_bytes(4, "little")[offset : offset + length].ljust(length, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        pass

    def process_queue(self, index: int) -> float | None:
        if index == 1 and not self.level:
            return None  # the driver's buffers wait for something to report
        return super().process_queue(index)

    def _serve(self, chain: Chain, memory: GuestMemory) -> int:
        self.threads.add(threading.current_thread().name)
        memory.write(chain.writable[0][0], bytes([self.level]))
        return 1


class ServedDevice(EntropyDevice):
    """One whose queues another process serves."""

    is_served_elsewhere = True


class Rig:
    """A board, and what it says."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.memory = stack.enter_context(GuestMemory([(0, RAM_BYTES)]))
        self.reports: list[str] = []
        self.board = Board(self.memory, stack, maps_pages=True, report=self.reports.append)

    def describe(self, folder: Path, **options: str) -> None:
        kernel = folder / "guest.elf"
        kernel.write_bytes(elf())
        config = RunConfig(kernel=kernel, **options)  # type: ignore[arg-type]
        describe(self.board, config, load_kernel(self.memory, kernel), None)

    @property
    def told(self) -> list[tuple[int, int]]:
        """``(base, GSI)`` of the devices on the command line."""
        line = self.memory.read(layout.CMDLINE, 4096).partition(b"\0")[0].decode()
        return [
            (int(base, 16), int(gsi))
            for base, gsi in re.findall(r"virtio_mmio\.device=4K@(0x[0-9a-f]+):(\d+)", line)
        ]

    @property
    def told_by_acpi(self) -> list[int]:
        """The bases of the LNRO0005 in the tables: Memory32Fixed, of 4 KiB each."""
        tables = self.memory.read(layout.ACPI_TABLES, layout.ACPI_TABLES_END - layout.ACPI_TABLES)
        found = re.findall(rb"LNRO0005.*?\x86\x09\x00\x01(....)\x00\x10\x00\x00", tables, re.DOTALL)
        return [int.from_bytes(base, "little") for base in found]


@pytest.fixture
def rig() -> Iterator[Rig]:
    before = open_fds()
    with contextlib.ExitStack() as stack:
        yield Rig(stack)
    assert open_fds() == before


class Window:
    """The registers at ``base``, as a guest reaches them: through the bus."""

    def __init__(self, board: Board, base: int) -> None:
        self._bus, self._base = board.mmio, base

    def read(self, offset: int, size: int) -> int:
        return self._bus.read(self._base + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._bus.write(self._base + offset, size, value)


@contextlib.contextmanager
def serving(board: Board) -> Iterator[None]:
    """The threads of ``board``, as the runner starts them."""
    loops = [(name, IoLoop(sources)) for name, sources in board.workers]
    threads = [threading.Thread(target=loop.run, name=name) for name, loop in loops]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for _, loop in loops:
            loop.stop()
        for thread in threads:
            thread.join()


def interrupted(fd: int) -> bool:
    """True once ``fd``, an ``irq_fd``, was written."""
    ready, _, _ = select.select([fd], [], [], patient(10))
    if ready:
        os.eventfd_read(fd)
    return bool(ready)


def test_a_device_of_a_test_is_found_where_the_guest_was_told_and_is_served(
    rig: Rig, tmp_path: Path
) -> None:
    device = CountingDevice()
    rig.board.plug(EntropyDevice(), "entropy")
    slot = rig.board.plug(device, "tank")
    rig.describe(tmp_path)
    base, gsi = rig.told[-1]
    assert (base, gsi) == (slot.base, slot.gsi)
    registers = Window(rig.board, base)
    assert registers.read(Register.DEVICE_ID, 4) == 63
    first = VirtioDriver(registers, rig.memory, bottom=DRIVER_RAM)
    second = VirtioDriver(registers, rig.memory, index=1, bottom=DRIVER_RAM + (1 << 20))
    with serving(rig.board):
        assert first.negotiate()
        first.setup_queue(size=8)
        second.setup_queue(size=8)
        first.set(Register.STATUS, 15)
        # A doorbell: the thread of the device's name serves queue 0.
        answer = first.alloc(1, 1)
        first.place([readable(first.put(b"?"), 1), writable(answer, 1)])
        os.eventfd_write(slot.doorbells[0], 1)
        assert interrupted(slot.irq_fd)
        assert len(first.reap()) == 1
        # A descriptor of the device's own: it has its slot serve queue 1 and look at the host.
        level = second.alloc(1, 1)
        second.place([writable(level, 1)])
        os.write(device.tank, b"three")
        while not registers.read(Register.INTERRUPT_STATUS, 4) & InterruptBit.CONFIG_CHANGE:
            assert interrupted(slot.irq_fd)
        while not rig.memory.read_int(second.used + 2, 2):
            assert interrupted(slot.irq_fd)
        assert rig.memory.read(level, 1) == b"\5"
        assert registers.read(Register.CONFIG, 4) == 5
    assert device.threads == {"tank"}
    assert rig.reports == []


def test_each_device_is_announced_in_its_order_and_has_its_own_thread_and_interrupt(
    rig: Rig, tmp_path: Path
) -> None:
    """The board's reason: one more device was once a slot that nobody announced or served."""
    slots = [rig.board.plug(EntropyDevice(), name) for name in ("entropy", "more", "")]
    rig.describe(tmp_path)
    assert rig.told == [(slot.base, slot.gsi) for slot in slots]
    assert rig.told_by_acpi == [slot.base for slot in slots]
    assert [name for name, _ in rig.board.workers] == ["entropy", "more", "virtio2"]
    fds = [source.fd for _, sources in rig.board.workers for source in sources]
    fds += [slot.irq_fd for slot in slots]
    assert len(set(fds)) == len(fds) == 3 * 3  # a queue, a look at the host, an interrupt
    assert len({slot.gsi for slot in slots}) == 3


@pytest.mark.parametrize(("discovery", "by_line", "by_acpi"), [
    ("both", 2, 2), ("acpi", 0, 2), ("cmdline", 2, 0),
])
def test_both_ways_tell_of_the_slots_there_are(
    rig: Rig, tmp_path: Path, discovery: str, by_line: int, by_acpi: int
) -> None:
    for _ in range(2):
        rig.board.plug(EntropyDevice())
    rig.describe(tmp_path, discovery=discovery)
    assert (len(rig.told), len(rig.told_by_acpi)) == (by_line, by_acpi)


def test_an_empty_board_announces_nothing(rig: Rig, tmp_path: Path) -> None:
    rig.describe(tmp_path)
    assert (rig.told, rig.told_by_acpi, rig.board.workers) == ([], [], [])


def test_the_guest_is_told_of_a_clock_if_one_is_on_the_board(rig: Rig, tmp_path: Path) -> None:
    rtc_id = b"\x08_HID\x0c\x41\xd0\x0b\x00"  # 8.1.3: PNP0B00
    rig.describe(tmp_path)
    room = layout.ACPI_TABLES_END - layout.ACPI_TABLES
    assert rtc_id not in rig.memory.read(layout.ACPI_TABLES, room)
    rig.board.pio.add(layout.RTC_INDEX, 2, Window(rig.board, 0))
    rig.describe(tmp_path)
    assert rtc_id in rig.memory.read(layout.ACPI_TABLES, room)


def test_devices_come_to_an_end_with_the_interrupt_lines(rig: Rig, tmp_path: Path) -> None:
    for _ in range(layout.MAX_VIRTIO_DEVICES):
        rig.board.plug(EntropyDevice())
    with pytest.raises(ConfigError) as caught:
        rig.board.plug(EntropyDevice(), "last")
    assert str(caught.value) == (
        "device last: is one too many: this machine has lines for 16 virtio devices"
    )
    assert len(rig.board.slots) == layout.MAX_VIRTIO_DEVICES
    rig.describe(tmp_path)
    assert len(rig.told_by_acpi) == len(rig.told) == layout.MAX_VIRTIO_DEVICES


def test_a_name_is_taken_once(rig: Rig) -> None:
    rig.board.plug(EntropyDevice(), "entropy")
    with pytest.raises(ValueError, match="two devices are named 'entropy'"):
        rig.board.plug(EntropyDevice(), "entropy")
    assert len(rig.board.slots) == 1


def test_two_devices_at_one_place_are_one_exception_that_names_both(rig: Rig) -> None:
    rig.board.plug(EntropyDevice())
    with pytest.raises(ValueError, match=r"MMIO 0xd0000000\+0x2000 cannot be a Window: "
                       r"0xd0000000\+0x1000 is taken by a MmioTransport"):
        rig.board.mmio.add(layout.VIRTIO_MMIO, 0x2000, Window(rig.board, 0))


def test_a_command_line_too_long_with_its_devices_is_a_config_error(
    rig: Rig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--append"):
        rig.describe(tmp_path, append="x" * layout.CMDLINE_MAX)


def test_more_sources_join_a_slots_thread_or_get_one_of_their_own(rig: Rig) -> None:
    rig.board.plug(EntropyDevice(), "entropy")
    for fd, thread in enumerate(("entropy", "clock", "clock"), start=1000):
        rig.board.add_source(thread, IoSource(fd, lambda: None))
    (first, own), (second, more) = rig.board.workers
    assert (first, second) == ("entropy", "clock")
    assert own[-1].fd == 1000
    assert [source.fd for source in more] == [1001, 1002]


def test_a_device_that_is_served_elsewhere_leaves_its_doorbells_alone(rig: Rig) -> None:
    slot = rig.board.plug(ServedDevice(), "served", at_exit=True)
    assert not {source.fd for source in slot.sources} & set(slot.doorbells)
    driver = VirtioDriver(slot.transport, rig.memory, bottom=DRIVER_RAM)
    driver.start()
    assert driver.reg(Register.INTERRUPT_STATUS) == InterruptBit.USED_BUFFER, "it is kept"


def test_a_report_names_the_slot(rig: Rig) -> None:
    slot = rig.board.plug(CountingDevice(), "tank")
    driver = VirtioDriver(slot.transport, rig.memory, bottom=DRIVER_RAM)
    assert not driver.negotiate(features=0)
    (line,) = rig.reports
    assert line.startswith("tank: virtio type 63 device: FEATURES_OK refused: ")


def test_the_end_is_hurried_once_and_closes_each_device_once(rig: Rig) -> None:
    device = CountingDevice()
    slot = rig.board.plug(device, "tank")
    rig.board.hurry()
    until_s = device.until_s
    assert until_s is not None
    rig.board.hurry()
    assert device.until_s == until_s
    slot.close()
    slot.close()
    assert device.closed == 1


def test_a_board_that_is_not_hurried_hurries_before_it_closes() -> None:
    device = CountingDevice()
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: ended.append((device.until_s, device.closed)))
        ended: list[tuple[float | None, int]] = []
        rig = Rig(stack)
        rig.board.plug(EntropyDevice())
        rig.board.plug(device)
    ((until_s, closed),) = ended
    assert until_s is not None
    assert closed == 1


def test_a_device_that_cannot_be_plugged_in_is_closed(rig: Rig) -> None:
    class Refusing(CountingDevice):
        def plug(self, slot: Plug) -> Sequence[IoSource]:
            raise OSError("no tap")

    device = Refusing()
    with pytest.raises(OSError, match="no tap"):
        rig.board.plug(device)
    assert device.closed == 1
    assert rig.board.slots == []
