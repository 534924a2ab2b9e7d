"""The machine: ``build()`` reads from top to bottom like a recipe, ``Machine.run()`` cooks it."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from pyvmm.bus import Bus
from pyvmm.config import RunConfig
from pyvmm.console import Console, LineWatch, OutputBuffer
from pyvmm.devices.debug_exit import DebugExit
from pyvmm.devices.i8042 import I8042
from pyvmm.devices.serial import Serial
from pyvmm.errors import ConfigError
from pyvmm.io_loop import IoSource
from pyvmm.kvm.abi import KVM_CAP_TSC_DEADLINE_TIMER
from pyvmm.kvm.handles import Kvm, Vm
from pyvmm.memory import GuestMemory
from pyvmm.outcome import Kind, Outcome
from pyvmm.report import Reporter
from pyvmm.runner import Runner
from pyvmm.storage.open import open_backend
from pyvmm.vcpu_loop import VcpuLoop
from pyvmm.virtio.block import BlockConfig, BlockDevice
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.spec import Register as MmioRegister
from pyvmm.x86 import cpu, cpuid, layout
from pyvmm.x86.boot_params import write_boot_params
from pyvmm.x86.loader import load_initrd, load_kernel
from pyvmm.x86.mptable import write_mp_table

# What printk says has a time stamp, wherever on the line it starts (user space may have left an
# unfinished line); from a kernel without time stamps it is the whole line.
_STAMP = rb"\[ *\d+\.\d+\] "
_STAMPED = re.compile(_STAMP)
_START = rb"(?:.*" + _STAMP + rb"|^)"
_PANIC = re.compile(_START + rb"Kernel panic - not syncing(.*)")
_PANIC_END = re.compile(_START + rb"---\[ end Kernel panic")
_HALTED = re.compile(_START + rb"reboot: (?:System halted|Power down)")
_USER_SPACE = re.compile(rb"pyvmm-init: user space reached")
PANIC_GRACE_S = 2.0
"""How long after a panic's first line the guest may go on printing, if it does not reboot."""


def build(config: RunConfig, *, report: Reporter) -> Machine:
    """A machine ready to run.

    ConfigError for files and options that cannot work, HostError for a host that cannot; both
    before any vCPU has run, and with everything opened so far closed again.
    """
    with contextlib.ExitStack() as stack:
        memory = stack.enter_context(GuestMemory(layout.ram_ranges(config.memory_bytes)))
        kernel = load_kernel(memory, config.kernel)
        initrd = load_initrd(memory, config.initrd, kernel) if config.initrd else None
        write_mp_table(memory, cpus=1)
        write_boot_params(memory, kernel, config.kernel_command_line(), initrd)
        backends = [
            stack.enter_context(contextlib.closing(open_backend(disk.source, report=report)))
            for disk in config.disks
        ]
        console = stack.enter_context(contextlib.closing(_open_console(config)))

        kvm = stack.enter_context(Kvm())
        vm = stack.enter_context(kvm.create_vm())
        vm.set_tss_addr(layout.TSS)
        vm.set_identity_map_addr(layout.IDENTITY_MAP)
        vm.create_irqchip()
        vm.create_pit2()
        for slot, region in enumerate(memory.regions):
            vm.set_user_memory_region(slot, region.gpa, region.length, region.host_address)

        runner = stack.enter_context(contextlib.closing(Runner(report)))
        watch = ConsoleWatch(runner)
        output = OutputBuffer(console.output_fd, runner.wake, watch.feed)
        pio, mmio = Bus("PIO", 0), Bus("MMIO", 12)

        serial = Serial(
            output.write, lambda level: vm.irq_line(layout.SERIAL_IRQ, level), runner.input_room
        )
        pio.add(layout.SERIAL_PORT, Serial.LENGTH, serial)
        keyboard = I8042(lambda: runner.finish(Outcome(Kind.RESET)))
        pio.add(layout.I8042_DATA, 1, keyboard.data_port)
        pio.add(layout.I8042_COMMAND, 1, keyboard.command_port)
        debug_exit = DebugExit(lambda byte: runner.finish(Outcome(Kind.GUEST_STATUS, byte)))
        pio.add(layout.DEBUG_EXIT_PORT, DebugExit.LENGTH, debug_exit)

        workers, disks = [], []
        for index, (backend, disk) in enumerate(zip(backends, config.disks, strict=True)):
            device = BlockDevice(
                BlockConfig(
                    read_only=disk.read_only, serial=disk.serial, queues=disk.queues,
                    writeback=disk.writeback, rate_limit=disk.rate_limit,
                ),
                backend,
            )
            transport, sources = _attach(device, index, memory, vm, mmio, stack, report)
            workers.append((f"virtio{index}", sources))
            disks.append((device, transport))

        vcpu = stack.enter_context(vm.create_vcpu(0))
        tsc_deadline = bool(kvm.check_extension(KVM_CAP_TSC_DEADLINE_TIMER))
        vcpu.set_cpuid(
            cpuid.build(kvm.supported_cpuid(), config.cpu, 0, tsc_deadline=tsc_deadline)
        )
        cpu.setup_long_mode(memory, vcpu, kernel.entry, layout.BOOT_PARAMS)
        loop = VcpuLoop(
            vcpu, pio=pio, mmio=mmio, finish=runner.finish,
            describe=lambda: cpu.describe_vcpu(memory, vcpu),
        )

        def refresh() -> None:
            for device, transport in disks:
                if device.refresh_capacity():
                    transport.config_changed()

        def run() -> Outcome:
            console.begin()
            if config.timeout_s is not None:
                runner.finish_after(config.timeout_s, Outcome(Kind.TIMEOUT))
            outcome = runner.run(
                vcpus=[loop], workers=workers, console=console, output=output,
                receive=serial.receive, refresh=refresh,
            )
            return watch.judge(outcome)

        return Machine(run, watch, output, runner, stack.pop_all())


def _open_console(config: RunConfig) -> Console:
    """The console; ConfigError if it is a file that the run reads or serves."""
    files = [os.fspath(config.kernel)]
    for disk in config.disks:
        files += [disk.source.location, disk.source.overlay, disk.source.faults]
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


def _attach(
    device: BlockDevice,
    index: int,
    memory: GuestMemory,
    vm: Vm,
    mmio: Bus,
    stack: contextlib.ExitStack,
    report: Reporter,
) -> tuple[MmioTransport, Sequence[IoSource]]:
    """Put ``device`` into virtio-mmio slot ``index``; its transport and doorbells.

    The driver's QueueNotify writes end in the kernel as ioeventfds, our interrupts start there as
    an irqfd: neither needs an exit to user space.
    """
    base, gsi = layout.virtio_slot(index)
    irq_fd = _eventfd(stack)
    vm.irqfd(irq_fd, gsi)
    doorbells = [_eventfd(stack) for _ in device.queue_max_sizes]
    transport = MmioTransport(
        device, memory, lambda: os.eventfd_write(irq_fd, 1),
        report=lambda line: report(f"virtio{index}: {line}"),
        # What a trapped QueueNotify leaves undone goes to the disk's thread.
        defer=lambda queue: os.eventfd_write(doorbells[queue], 1),
    )
    stack.callback(transport.close)
    mmio.add(base, layout.VIRTIO_MMIO_STRIDE, transport)
    sources = []
    for queue, doorbell in enumerate(doorbells):
        vm.ioeventfd(doorbell, base + MmioRegister.QUEUE_NOTIFY, 4, datamatch=queue)
        sources.append(IoSource(doorbell, functools.partial(transport.service, queue)))
    return transport, sources


def _eventfd(stack: contextlib.ExitStack) -> int:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    stack.callback(os.close, fd)
    return fd


class Ender(Protocol):
    """What ConsoleWatch needs of the Runner."""

    def finish(self, outcome: Outcome) -> None:
        """See ``Runner.finish``."""

    def finish_after(self, delay_s: float, outcome: Outcome) -> None:
        """See ``Runner.finish_after``."""

    def watch_for_halt(self) -> None:
        """See ``Runner.watch_for_halt``."""


class ConsoleWatch:
    """Reads along on the guest's console: a panic, a halt, user space.

    ``user_space_seen_s`` is when the guest's init said hello, on CLOCK_BOOTTIME, or None.
    """

    def __init__(self, runner: Ender) -> None:
        self._runner = runner
        self._lines = LineWatch(self._on_line)
        self._panic: str | None = None
        self._has_stamps = False
        self.user_space_seen_s: float | None = None

    def feed(self, data: bytes) -> None:
        """The next bytes of console output."""
        self._lines.feed(data)

    def judge(self, outcome: Outcome) -> Outcome:
        """What a run's end means, given what the console said: a panic explains a reboot."""
        if self._panic is not None and outcome.kind in (
            Kind.RESET, Kind.SHUTDOWN, Kind.TRIPLE_FAULT, Kind.TIMEOUT
        ):
            return Outcome(Kind.PANIC, detail=self._panic)
        if outcome.kind is Kind.INTERNAL_ERROR:
            hint = (
                "\nif this happens with every kernel, this host's KVM is not complete: `pyvmm"
                " doctor` says so, and `pyvmm lab -- pyvmm run ...` runs the same where KVM is"
            )
            return replace(outcome, detail=outcome.detail + hint)
        return outcome

    def _on_line(self, line: bytes) -> None:
        stamped = _STAMPED.search(line) is not None
        self._has_stamps = self._has_stamps or stamped
        if self.user_space_seen_s is None and _USER_SPACE.match(line):
            self.user_space_seen_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        elif self._has_stamps and not stamped:
            return  # this kernel stamps its messages, so this is somebody quoting one
        elif self._panic is None and (found := _PANIC.match(line)):
            self._panic = found[1].decode("ascii", "replace").lstrip(": ").strip()
            self._runner.finish_after(PANIC_GRACE_S, Outcome(Kind.PANIC, detail=self._panic))
        elif self._panic is not None and _PANIC_END.match(line):
            self._runner.finish(Outcome(Kind.PANIC, detail=self._panic))
        elif _HALTED.match(line):
            self._runner.watch_for_halt()


class Machine:
    """A built machine: ``run()`` once, then ``close()``; a context manager."""

    def __init__(
        self,
        run: Callable[[], Outcome],
        watch: ConsoleWatch,
        output: OutputBuffer,
        runner: Runner,
        resources: contextlib.ExitStack,
    ) -> None:
        self._run = run
        self._watch = watch
        self._output = output
        self._runner = runner
        self._resources = resources

    def run(self) -> Outcome:
        """Run the guest to its end, in the calling thread, which must be the main thread."""
        return self._run()

    @property
    def user_space_seen_s(self) -> float | None:
        """When the guest's init said that it runs, on CLOCK_BOOTTIME; None if it never did."""
        return self._watch.user_space_seen_s

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
