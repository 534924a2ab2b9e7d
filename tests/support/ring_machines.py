"""Both homes of our block device, for a driver that does not care: behind the registers of
virtio-mmio, and behind ``pyvmm export``.

The clock stands still unless ``wait`` moves it.  A notification is served when ``turn`` is called,
as by an I/O thread, unless ``notify`` is told to have it served at once.
"""

from __future__ import annotations

import ast
import os
import random
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from pyvmm.memory import GuestMemory
from pyvmm.storage.backend import BlockBackend
from pyvmm.vhost_user.protocol import (
    MEM_REGION,
    MEM_TABLE,
    SINGLE_MEM_REGION,
    VRING_STATE,
    MemoryRegion,
    Request,
)
from pyvmm.virtio.block import BlockConfig, BlockDevice
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.rate_limit import RateLimit
from pyvmm.virtio.spec import Feature, Register, Status
from tests.support.patience import patient
from tests.support.vhost_rig import RAM_BYTES, USER_BASE, Doorbell, ExportRig, ScriptedFrontend
from tests.support.virtio_driver import RAM_BASE, BlockDriver, Registers

REGION_BYTES = RAM_BYTES // 2
FAR_BASE = 1 << 32
"""Where the second region of RAM is; queues are in the first."""
_FAR_USER = USER_BASE + (1 << 40)


class Machine(Protocol):
    """What both have.  ``interruptions`` are the ways in which a ring may be stopped and go on;
    nothing that was offered is lost by one."""

    memory: GuestMemory
    registers: Registers
    see: Callable[[], None]
    """Called where the driver has to look at its rings in the middle of an interruption."""
    interruptions: Sequence[Callable[[BlockDriver], None]]
    has_ring_reset: bool
    has_bases: bool
    """Whether a ring may begin anywhere."""

    @property
    def offered(self) -> int:
        """The features that a driver may choose from."""

    def boot(self, drivers: Sequence[BlockDriver], features: int) -> None:
        """From reset to queues that run."""

    def reset_queue(self, driver: BlockDriver) -> None:
        """Virtqueue reset; ``set_up`` starts the queue again."""

    def set_up(self, driver: BlockDriver) -> None:
        """Start a queue that was reset, or not yet set up."""

    def reset(self) -> None:
        """Device reset."""

    def notify(self, index: int, *, at_once: bool) -> None:
        """The driver's notification."""

    def turn(self) -> None:
        """Serve what is due, once."""

    def wait(self) -> bool:
        """Move the clock to when something is due; False if nothing will be."""

    def interrupted(self, index: int) -> bool:
        """Whether there was an interrupt of queue ``index`` since the last call."""

    def limit(self, limit: RateLimit) -> None:
        """Set the rate limit."""

    def check(self) -> None:
        """AssertionError if the device has complained of the driver."""

    def close(self) -> None: ...


class _Forward:
    """The registers of the machine's transport, whichever it is now."""

    def __init__(self, machine: MmioMachine) -> None:
        self._machine = machine

    def read(self, offset: int, size: int) -> int:
        return self._machine._transport.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._machine._transport.write(offset, size, value)


class MmioMachine:
    """The device behind the registers of virtio-mmio."""

    has_ring_reset, has_bases = True, False

    def __init__(
        self,
        config: BlockConfig,
        backend: BlockBackend,
        device_type: type[BlockDevice],
        rng: random.Random,
    ) -> None:
        self.now_s = 100.0
        self._rng = rng
        self.see: Callable[[], None] = lambda: None
        self.memory = GuestMemory.over(bytearray(REGION_BYTES), RAM_BASE)
        self.memory.add(FAR_BASE, bytearray(REGION_BYTES))
        self._device_type, self._config, self._backend = device_type, config, backend
        self._due_s: dict[int, float] = {}
        self._irqs = 0
        self._seen_irqs = [0] * config.queues
        self._reports: list[str] = []
        self._build()
        self.registers: Registers = _Forward(self)
        self.interruptions: Sequence[Callable[[BlockDriver], None]] = (self._save_and_restore,)

    def _build(self) -> None:
        self._device = self._device_type(
            self._config, self._backend, clock=lambda: self.now_s
        )
        self._transport = MmioTransport(
            self._device, self.memory, self._interrupt, report=self._reports.append,
            defer=self._defer,
        )  # fmt: skip

    def _save_and_restore(self, driver: BlockDriver) -> None:
        """Save the device, build another, have it take the state and go on."""
        state, page = self._transport.save(), bytes(self._transport.page)
        ram = [bytes(region.view) for region in self.memory.regions]
        self._transport.close()
        self._due_s.clear()
        irqs = self._irqs
        self._build()
        self._transport.restore(ast.literal_eval(repr(state)))  # plain data, or this fails
        assert self._transport.save() == state
        assert bytes(self._transport.page) == page
        assert [bytes(region.view) for region in self.memory.regions] == ram
        assert self._irqs == irqs
        assert not self._due_s
        for index in range(self._config.queues):  # a doorbell rung before may be lost
            self._defer(index)

    def _interrupt(self) -> None:
        self._irqs += 1

    def _defer(self, index: int) -> None:
        self._due_s[index] = self.now_s

    @property
    def offered(self) -> int:
        return self._device.avail_features

    def boot(self, drivers: Sequence[BlockDriver], features: int) -> None:
        if not drivers[0].negotiate(features):
            raise AssertionError("FEATURES_OK was refused")
        for driver in drivers:
            driver.setup_queue()
        drivers[0].set(Register.STATUS, 15)

    def reset_queue(self, driver: BlockDriver) -> None:
        driver.set(Register.QUEUE_SEL, driver.index)
        if self._rng.random() < 0.3:
            driver.set(Register.QUEUE_READY, 0)  # stopped first, which changes nothing
        driver.set(Register.QUEUE_RESET, 1)
        assert driver.reg(Register.QUEUE_RESET) == driver.reg(Register.QUEUE_READY) == 0

    def set_up(self, driver: BlockDriver) -> None:
        driver.setup_queue()

    def reset(self) -> None:
        self.registers.write(Register.STATUS, 4, 0)
        assert self.registers.read(Register.STATUS, 4) == 0

    def notify(self, index: int, *, at_once: bool) -> None:
        if at_once:
            self.registers.write(Register.QUEUE_NOTIFY, 4, index)
        else:
            self._defer(index)

    def turn(self) -> None:
        for index, due_s in list(self._due_s.items()):
            if due_s <= self.now_s:
                del self._due_s[index]
                delay_s = self._transport.service(index)
                if delay_s is not None:
                    due_s = self.now_s + delay_s
                    self._due_s[index] = min(due_s, self._due_s.get(index, due_s))

    def wait(self) -> bool:
        if not self._due_s:
            return False
        self.now_s = max(self.now_s, min(self._due_s.values()))
        return True

    def interrupted(self, index: int) -> bool:
        before, self._seen_irqs[index] = self._seen_irqs[index], self._irqs
        return self._irqs > before

    def limit(self, limit: RateLimit) -> None:
        self._device.set_rate_limit(limit)

    def check(self) -> None:
        assert self._reports == []
        assert not self.registers.read(Register.STATUS, 4) & Status.DEVICE_NEEDS_RESET

    def close(self) -> None:
        self._transport.close()


class _TwoRegions(ScriptedFrontend):
    """A front end whose RAM is in two regions."""

    def __init__(self, rig: ExportRig) -> None:
        super().__init__(rig)
        whole = memoryview(self.map)
        self.memory.close()
        self.memory = GuestMemory.empty()
        self.memory.add(RAM_BASE, whole[:REGION_BYTES])
        self.memory.add(FAR_BASE, whole[REGION_BYTES:])
        whole.release()
        self.regions = [
            MemoryRegion(RAM_BASE, REGION_BYTES, USER_BASE, 0),
            MemoryRegion(FAR_BASE, REGION_BYTES, _FAR_USER, REGION_BYTES),
        ]

    def share(self) -> None:
        """Give the RAM."""
        for region in self.regions:
            packed = SINGLE_MEM_REGION.pack(*region)
            assert self.ack(Request.ADD_MEM_REG, packed, [self.ram_fd]) == 0

    def kick_quietly(self, index: int) -> None:
        """Write the kick eventfd; the server is told when it next looks."""
        os.eventfd_write(self.kick_fds[index], 1)

    def connect_again(self) -> None:
        """Close the connection and make another one."""
        self.hang_up()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(patient(2))
        self.socket.connect(self.rig.path)
        self.rig.turn()


class ExportMachine:
    """The device behind ``pyvmm export``, and a front end of it."""

    has_ring_reset, has_bases = False, True

    def __init__(
        self,
        config: BlockConfig,
        backend: BlockBackend,
        device_type: type[BlockDevice],
        path: Path,
        rng: random.Random,
    ) -> None:
        self._rng = rng
        self._rig = ExportRig(path, config=config, backend=backend, device_type=device_type)
        self._frontend = _TwoRegions(self._rig)
        self.memory = self._frontend.memory
        self.registers: Registers = Doorbell(self._frontend)
        self._drivers: dict[int, BlockDriver] = {}
        self.see: Callable[[], None] = lambda: None
        self.interruptions: Sequence[Callable[[BlockDriver], None]] = (
            self._stop_and_go_on, self._disable_and_enable, self._replace_memory,
            self._connect_again, self._restart_server, self._kick_anew,
        )  # fmt: skip

    @property
    def offered(self) -> int:
        return self._rig.devices[-1].avail_features & ~int(Feature.RING_RESET)

    def boot(self, drivers: Sequence[BlockDriver], features: int) -> None:
        self._frontend.negotiate(features)
        if not self._drivers:
            self._frontend.share()
        for driver in drivers:
            self.set_up(driver)

    def set_up(self, driver: BlockDriver) -> None:
        self._drivers[driver.index] = driver
        self._frontend.set_up(driver, driver.base)
        self._frontend.run(driver.index)

    def reset_queue(self, driver: BlockDriver) -> None:
        self._frontend.stop(driver.index)

    def reset(self) -> None:
        self._frontend.send(Request.RESET_DEVICE)

    def notify(self, index: int, *, at_once: bool) -> None:
        if at_once:
            self._frontend.kick(index)
        else:
            self._frontend.kick_quietly(index)

    def turn(self) -> None:
        self._rig.turn()

    def wait(self) -> bool:
        if self._rig.delay_s is None:
            return False
        self._rig.now_s += self._rig.delay_s
        return True

    def interrupted(self, index: int) -> bool:
        return self._frontend.calls(index) > 0

    def limit(self, limit: RateLimit) -> None:
        self._rig.devices[-1].set_rate_limit(limit)

    def check(self) -> None:
        assert self._rig.reports == []

    def close(self) -> None:
        self._rig.server.close()
        self._frontend.close()

    # Interruptions

    def _stop_and_go_on(self, driver: BlockDriver) -> None:
        """GET_VRING_BASE and SET_VRING_BASE, the latter also with the lower half alone."""
        base = self._frontend.stop(driver.index)
        if self._rng.random() < 0.3:
            base &= 0xFFFF
        self._frontend.set_up(driver, base)
        self._frontend.run(driver.index)

    def _disable_and_enable(self, driver: BlockDriver) -> None:
        for enable in (0, 1):
            state = VRING_STATE.pack(driver.index, enable)
            assert self._frontend.ack(Request.SET_VRING_ENABLE, state) == 0

    def _kick_anew(self, driver: BlockDriver) -> None:
        """A second SET_VRING_KICK, which starts the ring where it is."""
        self._frontend.run(driver.index)

    def _replace_memory(self, driver: BlockDriver) -> None:
        regions = self._frontend.regions
        table = MEM_TABLE.pack(len(regions), 0)
        table += b"".join(MEM_REGION.pack(*region) for region in regions)
        fds = [self._frontend.ram_fd] * len(regions)
        assert self._frontend.ack(Request.SET_MEM_TABLE, table, fds) == 0

    def _connect_again(self, driver: BlockDriver) -> None:
        """The front end hangs up without a word and comes again, as after its own restart."""
        self._frontend.connect_again()
        self._go_on()

    def _restart_server(self, driver: BlockDriver) -> None:
        """The export ends and another one begins: nobody says where the rings stand."""
        self._rig.restart()
        self._frontend.connect_again()
        self._go_on()

    def _go_on(self) -> None:
        """All rings where the driver finds them used up to: all of it is told there."""
        self._frontend.negotiate(self._frontend.features)
        self._frontend.share()
        self.see()
        for driver in self._drivers.values():
            self._frontend.set_up(driver, driver.base)
            self._frontend.run(driver.index)
