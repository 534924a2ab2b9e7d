"""The machine: ``build()`` reads from top to bottom like a recipe, ``Machine.run()`` cooks it."""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import time
from collections.abc import Callable, Sequence

from pyvmm.board.bus import Bus
from pyvmm.board.disks import START_S, Disk, LastWait, open_disk
from pyvmm.board.polled_uart import PolledUart
from pyvmm.board.slot import Slot, eventfd
from pyvmm.config import RunConfig, VhostUserDiskConfig
from pyvmm.console.output import OutputBuffer
from pyvmm.console.place import Console
from pyvmm.devices.boot_timer import BootTimer, Mark
from pyvmm.devices.debug_exit import DebugExit
from pyvmm.devices.i8042 import I8042
from pyvmm.devices.pci_host import PciHost
from pyvmm.devices.power import Power
from pyvmm.devices.pvpanic import PvPanic
from pyvmm.devices.rtc import Rtc
from pyvmm.devices.serial import Serial
from pyvmm.errors import ConfigError
from pyvmm.kvm.abi import (
    KVM_CAP_MAX_VCPUS,
    KVM_CAP_READONLY_MEM,
    KVM_CAP_TSC_DEADLINE_TIMER,
)
from pyvmm.kvm.handles import Kvm
from pyvmm.memory import GuestMemory
from pyvmm.report import Reporter
from pyvmm.run.console_watch import ConsoleWatch
from pyvmm.run.io_loop import IoSource
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.run.runner import Runner
from pyvmm.run.session import run_session
from pyvmm.run.signals import REFRESH_SIGNAL, RESIZE_SIGNAL
from pyvmm.run.vcpu_loop import MMIO_GRANULE_BITS, Exits, VcpuLoop
from pyvmm.startup.types import TYPE_CHECKING
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.entropy.device import EntropyDevice
from pyvmm.x86 import cpu, cpuid, layout
from pyvmm.x86.acpi import RESET_VALUE, S5_SLEEP_TYPE, VirtioMmioDevice, write_acpi_tables
from pyvmm.x86.image import Kernel
from pyvmm.x86.loader import load_initrd, load_kernel, write_boot_info
from pyvmm.x86.mptable import write_mp_table
from pyvmm.x86.reset_vector import write_reset_vector

if TYPE_CHECKING:
    from typing import Any



def build(config: RunConfig, *, report: Reporter) -> Machine:
    """A machine ready to run.

    ConfigError for files and options that cannot work, HostError for a host that cannot; both
    before any vCPU has run, and with everything opened so far closed again.
    """
    with contextlib.ExitStack() as stack:
        shared = any(isinstance(disk, VhostUserDiskConfig) for disk in config.disks)
        ranges = layout.ram_ranges(config.memory_bytes)
        memory = stack.enter_context(GuestMemory(ranges, shared=shared))
        kernel = load_kernel(memory, config.kernel)
        initrd = load_initrd(memory, config.initrd, kernel) if config.initrd is not None else None
        write_mp_table(memory, cpus=config.cpus)
        places = [layout.virtio_slot(index) for index in range(config.virtio_devices)]
        # A kernel with ACPI knows interrupt lines by it alone: without it is without all of it.
        rsdp = 0 if config.discovery == "cmdline" else write_acpi_tables(
            memory, vcpu_count=config.cpus, rtc=config.rtc == "utc",
            devices=[VirtioMmioDevice(base=base, length=layout.VIRTIO_MMIO_STRIDE, gsi=gsi)
                     for base, gsi in places],
        )
        write_reset_vector(memory)
        cmdline = config.kernel_command_line(kernel.cmdline_limit)
        write_boot_info(memory, kernel, cmdline, initrd, rsdp=rsdp)
        runner = stack.enter_context(contextlib.closing(Runner(report)))
        made = contextlib.ExitStack()
        until_s = time.monotonic() + min(START_S, config.timeout_s or START_S)
        disks = [
            open_disk(disk, index, runner, stack, report, until_s, made)
            for index, disk in enumerate(config.disks)
        ]
        last_wait = LastWait(disks)
        console = stack.enter_context(contextlib.closing(_open_console(config)))

        kvm = stack.enter_context(Kvm())
        _check_cpus(kvm, config.cpus)
        vm = stack.enter_context(kvm.create_vm())
        vm.set_tss_addr(layout.TSS)
        vm.set_identity_map_addr(layout.IDENTITY_MAP)
        # All memory, here and of the slots, before the chips: afterwards each change of it waits
        # until KVM has freed what they left behind on its own I/O bus, 5 to 8 ms (Linux 6.18).
        for number, region in enumerate(memory.regions):
            vm.set_user_memory_region(number, region.gpa, region.length, region.host_address)

        watch = ConsoleWatch(runner)
        output = OutputBuffer(console.output_fd, runner.wake, watch.feed)
        pio, mmio = Bus("PIO", 0), Bus("MMIO", MMIO_GRANULE_BITS)

        hvc0 = None
        if config.has_virtio_console:
            from pyvmm.board.hvc0 import Hvc0
            hvc0 = Hvc0(output.write, runner.input_room, stack,
                        terminal_size=lambda: console.size, is_chosen=config.console_is_virtio)
        show = hvc0.show_serial if hvc0 else output.write
        serial = Serial(
            show if config.cpus == 1 else watch.tap(show),
            lambda level: vm.irq_line(layout.SERIAL_IRQ, level), runner.input_room
        )
        timer = BootTimer()
        pio.add(layout.BOOT_TIMER_PORT, BootTimer.LENGTH, timer)
        pio.add(layout.PCI_PORT, PciHost.LENGTH, PciHost())
        _add_endings(pio, runner, watch, report)
        if config.rtc == "utc":
            pio.add(layout.RTC_INDEX, Rtc.LENGTH, Rtc())

        swallow = _swallow(config, kvm, stack, report)
        slots: list[Slot] = []

        def attach(device: VirtioDevice, **how: Any) -> None:
            slots.append(Slot(len(slots), device, memory=memory, vm=vm, mmio=mmio, report=report,
                              swallow=swallow, **how))
            stack.callback(slots[-1].close)

        for disk in disks:
            attach(disk.device, irq_fd=disk.irq_fd, doorbells=disk.doorbells,
                   at_exit=config.serve == "exit" and disk.watch is None,
                   watch=disk.watch)
            stack.callback(last_wait)
        if hvc0:
            attach(hvc0.device, irq_fd=eventfd(stack), at_exit=True,
                   doorbells=(hvc0.typed_fd, eventfd(stack)))
        attach(EntropyDevice(), irq_fd=eventfd(stack), at_exit=True,
               doorbells=(eventfd(stack),))
        vm.create_irqchip()
        vm.create_pit2()
        for slot in slots:
            slot.connect()

        tsc_deadline = bool(kvm.check_extension(KVM_CAP_TSC_DEADLINE_TIMER))
        loops: list[VcpuLoop] = []
        vcpus = [stack.enter_context(vm.create_vcpu(index)) for index in range(config.cpus)]
        polled_fd = eventfd(stack)
        uart = PolledUart(
            # Gathered, nobody knows which vCPU sent what, as ConsoleWatch does to tell lines apart.
            serial, ring=vcpus[0].coalesced_ring(kvm.ring_page) if config.cpus == 1 else None,
            gather=functools.partial(vm.gather_port, layout.SERIAL_PORT),
            begin=functools.partial(os.eventfd_write, polled_fd, 1),
        )
        pio.add(layout.SERIAL_PORT, Serial.LENGTH, uart)

        def at_end() -> None:
            uart.flush()
            if hvc0:
                hvc0.finish()

        for index, vcpu in enumerate(vcpus):
            vcpu.set_cpuid(cpuid.build(
                kvm.supported_cpuid(), config.cpu, index,
                vcpu_count=config.cpus, tsc_deadline=tsc_deadline,
                memory_end=sum(layout.ram_ranges(config.memory_bytes)[-1]),
            ))
            loops.append(VcpuLoop(
                vcpu, pio=pio, mmio=mmio, finish=runner.finish, machine=loops,
                describe=functools.partial(cpu.describe_vcpu, memory, vcpu),
                at_end=at_end, can_be_woken=vm.can_wake,
            ))
        # The others wait, in the kernel, for the first one's INIT and SIPI.
        cpu.setup_boot(memory, loops[0].vcpu, kernel)

        # Looking at a disk may wait for the disk: that is for its thread, not for the main one.
        looks = [eventfd(stack) for _ in disks]

        def refresh() -> None:
            for fd in looks:
                os.eventfd_write(fd, 1)

        def run() -> Outcome:
            made.pop_all()
            console.begin()
            if config.timeout_s is not None:
                runner.finish_after(config.timeout_s, Outcome(Kind.TIMEOUT))
            workers = [
                (f"virtio{index}",
                 [*slot.sources, IoSource(fd, functools.partial(_look, disk, slot))])
                for index, (disk, slot, fd) in enumerate(zip(disks, slots, looks, strict=False))
            ]
            # Not on this thread: it moves the console's bytes, for which the device may wait.
            console_sources = [IoSource(polled_fd, uart.tick)]
            notices: dict[int, Callable[[], None]] = {REFRESH_SIGNAL: refresh}
            if hvc0:
                notices[RESIZE_SIGNAL] = hvc0.resize
                slot = slots[len(disks)]
                resize_news = IoSource(hvc0.resized_fd, slot.transport.config_changed)
                console_sources += [*slot.sources, resize_news]
            workers.append(("console", console_sources))
            # A thread of its own, since the console's may wait for a terminal that takes nothing.
            workers.append(("entropy", slots[-1].sources))
            outcome = run_session(
                runner, vcpus=loops, workers=workers, console=console, output=output,
                notices=notices,
                receive=hvc0.receive if hvc0 and config.console_is_virtio else serial.receive,
                at_end=[last_wait],
            )
            return watch.judge(outcome)

        return Machine(kernel, run, watch, output, runner, loops, timer, stack.pop_all())


def _check_cpus(kvm: Kvm, cpus: int) -> None:
    """ConfigError if this KVM gives no VM so many vCPUs."""
    # Documentation/virt/kvm/api.rst, 4.7: without the capability, what a KVM has always had.
    limit = kvm.check_extension(KVM_CAP_MAX_VCPUS) or 4
    if cpus > limit:
        raise ConfigError(f"--cpus {cpus}", f"this host's KVM allows at most {limit}")


def _open_console(config: RunConfig) -> Console:
    """The console; ConfigError if it is a file that the run reads or serves."""
    files = [os.fspath(config.kernel)]
    for disk in config.disks:
        files += disk.files
    if config.initrd is not None:
        files.append(os.fspath(config.initrd))
    if config.console not in ("stdio", "none"):
        for path in files:
            with contextlib.suppress(OSError, ValueError):
                if os.path.samefile(config.console, path):
                    raise ConfigError(
                        f"--console {config.console}",
                        f"is {path}, which this run uses; name another file",
                    )
    return Console.open(config.console)


def _add_endings(pio: Bus, runner: Runner, watch: ConsoleWatch, report: Reporter) -> None:
    """The ports by which a guest ends the run, or says why it is about to."""
    def ends_in(kind: Kind) -> Callable[[], None]:
        return lambda: runner.finish(Outcome(kind))

    keyboard = I8042(ends_in(Kind.RESET))
    pio.add(layout.I8042_DATA, 1, keyboard.data_port)
    pio.add(layout.I8042_COMMAND, 1, keyboard.command_port)
    power = Power(
        s5_sleep_type=S5_SLEEP_TYPE, reset_value=RESET_VALUE,
        on_power_off=ends_in(Kind.POWER_OFF), on_reset=ends_in(Kind.RESET),
    )
    pio.add(layout.SLEEP_CONTROL_PORT, Power.LENGTH, power)
    pio.add(layout.PVPANIC_PORT, PvPanic.LENGTH, PvPanic(
        watch.panic_reported, lambda: report("the guest has panicked; its crash kernel takes over")
    ))
    debug_exit = DebugExit(lambda byte: runner.finish(Outcome(Kind.GUEST_STATUS, byte)))
    pio.add(layout.DEBUG_EXIT_PORT, DebugExit.LENGTH, debug_exit)


def _look(disk: Disk, slot: Slot) -> None:
    """See whether ``disk`` has grown, and tell its driver."""
    if disk.device.refresh_capacity():
        slot.transport.config_changed()


def _swallow(
    config: RunConfig, kvm: Kvm, stack: contextlib.ExitStack, report: Reporter
) -> int | None:
    """The eventfd that makes register pages mapped ones; None if they are to be trapped."""
    if config.mmio == "trapped":
        return None
    if not kvm.check_extension(KVM_CAP_READONLY_MEM):
        report("this KVM has no read-only memory (KVM_CAP_READONLY_MEM): registers are trapped")
        return None
    return eventfd(stack)


class Machine:
    """A built machine: ``run()`` once, then ``close()``; a context manager."""

    def __init__(
        self,
        kernel: Kernel,
        run: Callable[[], Outcome],
        watch: ConsoleWatch,
        output: OutputBuffer,
        runner: Runner,
        loops: Sequence[VcpuLoop],
        timer: BootTimer,
        resources: contextlib.ExitStack,
    ) -> None:
        self.kernel = kernel
        self._run = run
        self._watch = watch
        self._output = output
        self._runner = runner
        self._loops = loops
        self._timer = timer
        self._resources = resources

    def run(self) -> Outcome:
        """Run the guest to its end, in the calling thread, which must be the main thread."""
        return self._run()

    def pause(self, timeout_s: float | None = None) -> bool:
        """Pause the guest, from another thread than the one in ``run``: see ``Runner.pause``."""
        return self._runner.pause(timeout_s)

    def quiesce(self, timeout_s: float | None = None) -> bool:
        """Pause the guest and park its devices' threads: see ``Runner.quiesce``."""
        return self._runner.quiesce(timeout_s)

    def resume(self) -> None:
        """Let a paused or quiesced guest go on, from any thread: see ``Runner.resume``."""
        self._runner.resume()

    @property
    def is_paused(self) -> bool:
        """Whether a pause was asked for and not taken back."""
        return self._runner.is_paused

    @property
    def user_space_seen_s(self) -> float | None:
        """When the guest's init said that it runs, on CLOCK_BOOTTIME; None if it never did."""
        return self._watch.user_space_seen_s

    @property
    def has_printed(self) -> bool:
        """Whether anything came out of the guest's console."""
        return self._watch.has_printed

    @property
    def waits_for_root(self) -> bool:
        """Whether the kernel said that it waits for its root."""
        return self._watch.waits_for_root

    @property
    def reached_init(self) -> bool:
        """Whether the kernel said that it starts a program, or the guest's init that it runs."""
        return self._watch.reached_init

    @property
    def marks(self) -> tuple[Mark, ...]:
        """What the guest wrote to the boot timer."""
        return self._timer.marks

    @property
    def exits(self) -> Exits:
        """How often the guest was left for user space, all vCPUs together, once it has run."""
        return functools.reduce(operator.add, (loop.exits for loop in self._loops), Exits())

    @property
    def console_line_ended(self) -> bool:
        """Whether the console's last byte ended a line, so that ours may follow."""
        return self._output.line_ended

    def close(self) -> None:
        """Release the VM, its memory, disks and console; idempotent."""
        # A thread stuck in a system call still uses them; they then live as long as the process.
        if self._runner.stopped:
            self._resources.close()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
