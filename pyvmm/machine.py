"""The machine: ``build()`` reads from top to bottom like a recipe, ``Machine.run()`` cooks it."""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

from pyvmm.board.agent import plug_agent_port
from pyvmm.board.board import Board
from pyvmm.board.consoles import Consoles, open_console
from pyvmm.board.cpus import check_cpus, make_loops
from pyvmm.board.disks import plug_disks
from pyvmm.board.ports import add_endings, add_ports
from pyvmm.config import RunConfig, VhostUserDiskConfig
from pyvmm.console.output import OutputBuffer
from pyvmm.console.place import Console
from pyvmm.console.watch import ConsoleWatch
from pyvmm.devices.boot_timer import BootTimer, Mark
from pyvmm.kvm.abi import KVM_CAP_READONLY_MEM
from pyvmm.kvm.handles import Kvm, Vm
from pyvmm.memory import GuestMemory
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.run.runner import Runner
from pyvmm.run.vcpu_loop import Exits, VcpuLoop
from pyvmm.run.verdict import Evidence, Verdict
from pyvmm.startup.types import TYPE_CHECKING
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.entropy.device import EntropyDevice
from pyvmm.x86 import layout

if TYPE_CHECKING:
    from uuid import UUID

    from pyvmm.board.booting import Boot
    from pyvmm.board.origin import Base, Origin
    from pyvmm.run.io_loop import Deadline
    from pyvmm.virtio.port.device import PortDevice
    from pyvmm.x86.image import Kernel


def build(
    config: RunConfig,
    *,
    report: Callable[[str], None],
    devices: Mapping[str, VirtioDevice] = MappingProxyType({}),
    origin: Origin | None = None,
) -> Machine:
    """Return a machine that is ready to run.

    ``devices`` are virtio devices of the caller's own, by name; the guest finds them behind
    pyvmm's.  They belong to the machine from now on, which closes them.

    With ``origin`` no kernel is loaded, and the guest is told of nothing: its RAM has all that.
    The machine is ready once ``restore`` has given it the rest of the snapshot.

    ConfigError for files and options that cannot work, HostError for a host that cannot; both
    before any vCPU has run, and with everything opened so far closed again.
    """
    with contextlib.ExitStack() as stack:
        _own(devices, stack)
        memory = stack.enter_context(_make_memory(config, devices.values(), origin))
        boot: Boot | None = None
        if origin is None:
            boot = _load(config, memory, report)
            kernel = boot.kernel
        else:
            kernel = origin.kernel
        runner = stack.enter_context(contextlib.closing(Runner(report)))
        verdict = Verdict(runner, is_linux=kernel.is_linux)
        watch = ConsoleWatch(verdict.hear)
        timer = BootTimer()

        board = Board(memory, stack, maps_pages=config.mmio == "mapped", report=report)
        board.add_part("console watch", watch)
        made = plug_disks(board, config, runner, stack, report)
        console = stack.enter_context(contextlib.closing(open_console(config)))
        output = OutputBuffer(
            console.output_fd, runner.wake, watch.feed,
            write=console.outlet.write if console.outlet else None,
        )
        consoles = Consoles(config, board, console, output, runner.input_room)
        board.plug(EntropyDevice(), "entropy", at_exit=True)
        agent_port = plug_agent_port(board, config)
        for name, device in devices.items():
            board.plug(device, name)
        add_ports(board, config, timer)
        add_endings(board, verdict, report)
        if boot:
            boot.describe(board)

        kvm = stack.enter_context(Kvm())
        check_cpus(kvm, config.cpus)
        vm = stack.enter_context(kvm.create_vm())
        vm.set_tss_addr(layout.TSS)
        vm.set_identity_map_addr(layout.IDENTITY_MAP)
        board.map_memory(vm, can_map_pages=_can_map_pages(config, kvm, report))
        vm.create_irqchip()
        vm.create_pit2()
        board.connect(vm)
        vcpus = [stack.enter_context(vm.create_vcpu(index)) for index in range(config.cpus)]
        consoles.add_serial_port(vm, vcpus, kvm.ring_page, watch, stack)
        cpuid = origin.cpuid if origin else None
        loops = make_loops(config, kvm, vm, vcpus, board, runner, consoles, cpuid)
        if boot:
            boot.set_up(vcpus[0])
        return Machine(
            config=config, kernel=kernel, board=board, vm=vm, runner=runner, loops=loops,
            timer=timer, watch=watch, verdict=verdict, console=console, output=output,
            consoles=consoles, made=made, agent_port=agent_port, own_devices=tuple(devices),
            needs_state=origin is not None, resources=stack.pop_all(),
        )


def _own(devices: Mapping[str, VirtioDevice], stack: contextlib.ExitStack) -> None:
    """Have ``stack`` close ``devices``; ValueError if one has a slot already."""
    if devices:
        from pyvmm.board.own_devices import own  # not on the boot path

        own(devices, stack)


def _load(config: RunConfig, memory: GuestMemory, report: Callable[[str], None]) -> Boot:
    from pyvmm.board.booting import Boot  # not for a machine of a snapshot

    return Boot(config, memory, report)


def _make_memory(
    config: RunConfig, devices: Iterable[VirtioDevice], origin: Origin | None
) -> GuestMemory:
    """Return the guest's RAM: memory that can be shared if another process serves a device."""
    if origin is not None:
        return GuestMemory(layout.ram_ranges(config.memory_bytes), image=origin.image)
    shared = any(isinstance(disk, VhostUserDiskConfig) for disk in config.disks)
    shared = shared or any(device.is_served_elsewhere for device in devices)
    return GuestMemory(layout.ram_ranges(config.memory_bytes), shared=shared)



def _can_map_pages(config: RunConfig, kvm: Kvm, report: Callable[[str], None]) -> bool:
    """True if KVM can map register pages; a line says so if ``config`` asks for more."""
    can = bool(kvm.check_extension(KVM_CAP_READONLY_MEM))
    if config.mmio == "mapped" and not can:
        report("this KVM has no read-only memory (KVM_CAP_READONLY_MEM): registers are trapped")
    return can


class Machine:
    """A built machine: ``run()`` once, then ``close()``; a context manager."""

    def __init__(
        self,
        *,
        config: RunConfig,
        kernel: Kernel,
        board: Board,
        vm: Vm,
        runner: Runner,
        loops: Sequence[VcpuLoop],
        timer: BootTimer,
        watch: ConsoleWatch,
        verdict: Verdict,
        console: Console,
        output: OutputBuffer,
        consoles: Consoles,
        made: contextlib.ExitStack,
        agent_port: PortDevice | None,
        own_devices: tuple[str, ...],
        needs_state: bool,
        resources: contextlib.ExitStack,
    ) -> None:
        self.config = config
        self.kernel = kernel
        self.board = board
        self.vm = vm
        self.own_devices = own_devices
        """The names of the virtio devices that a script brought."""
        self.timeout_s = config.timeout_s
        """The run's limit of time in seconds, None for none; until it starts."""
        self._is_clone = False
        self.base: Base | None = None
        """The snapshot over which RAM is mapped, which ``close`` gives up; None for none."""
        self.newest: Base | None = None
        """The one to go back to, which ``close`` gives up as well; None for none."""
        self.checkpoints: Base | None = None
        """The moments that ``snapshot/checkpoints.py`` keeps, which ``close`` frees."""
        self.runner = runner
        self.loops = loops
        self._timer = timer
        self.watch = watch
        self.verdict = verdict
        self.console = console
        self.output = output
        self.consoles = consoles
        self.agent_port = agent_port
        self._made = made
        self._resources = resources
        self._has_begun = threading.Lock()  # taken once, never released
        # Re-entrant: a handler of a signal that arrives under it may call wait() or close().
        self.lock = threading.RLock()
        """Held while the machine is saved, rewound, judged or closed."""
        self.moments = threading.RLock()
        """Held until a live snapshot is written, too; taken before ``lock``: ``snapshot/still``."""
        self.moment = ""
        self._time_limit: Deadline | None = None
        self._outcome: Outcome | None = None
        # None: not all parts have a state.
        self._is_restored: bool | None = None if needs_state else False

    @property
    def clone_id(self) -> UUID | None:
        """The clone that the guest is: fresh for each one and each rewind, None before both."""
        return self.board.vmgenid.value if self._is_clone else None

    def renew_clone_id(self) -> None:
        """Make the guest another clone; ``catch_up`` tells it.  Its RAM must be in place."""
        self.board.vmgenid.renew()
        self._is_clone = True

    def run(self) -> Outcome:
        """Run the guest to its end, in the calling thread; once, and instead of ``start``."""
        self._begin()
        self._run_by(self.runner.run)
        outcome = self.wait()
        assert outcome is not None  # without a limit of time
        return outcome

    def start(self) -> None:
        """Start the guest, in threads of its own; once."""
        self._begin()
        self._run_by(self.runner.start)

    def run_again(self) -> None:
        """Start a run that is over anew, paused, once ``put_back`` has given it a state."""
        with self.lock:
            self.board.calm()
            self._run_by(self.runner.run_again)
            self._outcome = None

    def _run_by(self, run: Callable[..., object]) -> None:
        run(
            vcpus=self.loops, workers=self.board.workers, console=self.console,
            output=self.output, at_end=[self.board.hurry],
        )

    def wait(self, timeout_s: float | None = None) -> Outcome | None:
        """Return the outcome once the run is over, None after ``timeout_s`` seconds.

        RuntimeError in a thread of the run, which would wait for itself.
        """
        outcome = self.runner.wait(timeout_s)
        return None if outcome is None else self._judge(outcome)

    def _judge(self, outcome: Outcome) -> Outcome:
        with self.lock:
            if not self.runner.is_over:
                return outcome  # and rewound meanwhile
            if self._outcome is None:
                self.watch.end()
                self._outcome = self.verdict.judge(outcome, self._runs_program)
            return self._outcome

    def stop(self, outcome: Outcome) -> Outcome | None:
        """End the run with ``outcome`` unless it has ended; wait, and return what it came to.

        None if the run never began.  RuntimeError in a thread of the run.
        """
        ended = self.runner.stop(outcome)
        return None if ended is None else self._judge(ended)

    def _begin(self) -> None:
        if self._is_restored is None:
            raise RuntimeError("restore() has failed: give the machine another state first")
        if not self._has_begun.acquire(blocking=False):
            raise RuntimeError("a machine runs once: build another one")
        self._made.pop_all()
        self.console.begin()
        self.verdict.doubt_silence(self.runner.report)
        if self._is_restored:
            self.catch_up()
        self.limit_time()

    def limit_time(self) -> None:
        """Have the run end after ``timeout_s``, if there is one, from now on."""
        if self._time_limit is not None:
            self._time_limit.cancel()
        if self.timeout_s is not None:
            self._time_limit = self.runner.finish_after(
                self.timeout_s, Outcome(Kind.TIMEOUT)
            )

    def _runs_program(self) -> bool:
        from pyvmm.x86 import cpu  # a machine of a snapshot needs it only now

        vcpus = (loop.vcpu for loop in self.loops)
        return bool(self._timer.marks) or any(map(cpu.runs_program, vcpus))

    def pause(self, timeout_s: float | None = None) -> bool:
        """Pause the guest, from another thread than the one in ``run``: see ``Runner.pause``."""
        return self.runner.pause(timeout_s)

    def quiesce(self, timeout_s: float | None = None) -> bool:
        """Pause the guest and park its devices' threads: see ``Runner.quiesce``."""
        return self.runner.quiesce(timeout_s)

    def resume(self) -> None:
        """Let a paused or quiesced guest go on, from any thread: see ``Runner.resume``."""
        self.runner.resume()

    def save(self) -> dict[str, object]:
        """Return the state of all but RAM (docs/architecture.md, "State"); StateError.

        RuntimeError unless the machine is quiesced, or has not started; it must remain so until
        this returns.
        """
        from pyvmm.board.state import save_machine

        runner = self.runner if self._has_begun.locked() else None
        return save_machine(self.loops, self.vm, self.board, runner)

    def restore(self, data: object, *, clock: str = "keep") -> None:
        """Take what ``save`` of a machine of the same configuration returned; StateError.

        ``clock`` is "keep" or "now": see ``board.state.restore_machine``.
        RAM is the caller's to copy, before this.  RuntimeError once the machine has started.  A
        machine whose state was refused does not start, but may be given another one.
        """
        from pyvmm.board.state import restore_machine

        if self._has_begun.locked():
            raise RuntimeError("restore() comes before start() and run()")
        self._is_restored = None
        restore_machine(self.loops, self.vm, self.board, None, data, clock=clock)
        self._is_restored = True

    def put_back(self, data: object) -> None:
        """Take a state again that this machine has had, also once it has started; StateError.

        RAM and disks are the caller's, before this.  RuntimeError unless the machine is quiesced
        or has ended; ``catch_up`` comes right before it goes on.
        """
        from pyvmm.board.state import restore_machine

        restore_machine(self.loops, self.vm, self.board, self.runner, data)

    def catch_up(self) -> None:
        """Do what no state has, right before a restored guest goes on."""
        from pyvmm.board.state import catch_up

        catch_up(self.loops, self.board, self.consoles)
        self.verdict.go_on()

    @property
    def is_paused(self) -> bool:
        """True if a pause was asked for and not taken back."""
        return self.runner.is_paused

    @property
    def evidence(self) -> Evidence:
        """All that is known of the guest: how far it came, what it said of its end."""
        return self.verdict.evidence

    @property
    def marks(self) -> tuple[Mark, ...]:
        """The bytes that the guest wrote to the boot timer, and when."""
        return self._timer.marks

    @property
    def exits(self) -> Exits:
        """How often the guest was left for user space, all vCPUs together, once it has run."""
        return functools.reduce(operator.add, (loop.exits for loop in self.loops), Exits())

    @property
    def console_line_ended(self) -> bool:
        """True if the console's last byte ended a line, so that ours may follow."""
        return self.output.line_ended

    def close(self) -> None:
        """Release the VM, its memory, disks and console; idempotent."""
        # A thread stuck in a system call still uses them; they then live as long as the process.
        with self.lock:
            if self.runner.stopped:
                kept = self.checkpoints, self.base, self.newest
                self.checkpoints = self.base = self.newest = None
                self._resources.close()
                for moments in kept:
                    if moments is not None:
                        moments.close()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
