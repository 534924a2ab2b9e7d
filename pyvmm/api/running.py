"""A virtual machine for scripts and tests, in this process: all of it but what keeps moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from pyvmm import machine as built
from pyvmm.api.config import MachineConfig
from pyvmm.api.console import ConsoleHandle
from pyvmm.api.hooks import Hooks
from pyvmm.api.lifetime import Lifetime
from pyvmm.api.memory import MemoryHandle
from pyvmm.api.vcpus import VcpuHandle
from pyvmm.open_files import EnoughFiles
from pyvmm.report import escape
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.run.vcpu_loop import Exits
from pyvmm.startup.types import TYPE_CHECKING
from pyvmm.virtio.device import VirtioDevice

if TYPE_CHECKING:
    from typing import Self

    from pyvmm.api.hook_calls import Refusal
    from pyvmm.api.hooked_bus import Access
    from pyvmm.api.hooked_disk import DiskRequest
    from pyvmm.kvm.exits import Exit
    from pyvmm.run.verdict import Evidence


class RunningMachine:
    """``pyvmm.Machine`` without snapshots and checkpoints: it runs once, from start to end."""

    def __init__(
        self,
        config: MachineConfig,
        *,
        report: Callable[[str], None] | None = None,
        devices: Mapping[str, VirtioDevice] = MappingProxyType({}),
    ) -> None:
        if not isinstance(config, MachineConfig):
            raise TypeError(f"Machine takes a MachineConfig, not {type(config).__name__}")
        if report is not None and not callable(report):
            raise TypeError(f"report must be a function of a text, not {type(report).__name__}")
        check_devices(devices)
        self._report = report or log_line
        self._is_built = False
        with EnoughFiles():
            self._take(built.build(config.run_config(), report=self._tell, devices=devices))

    def _take(self, machine: built.Machine) -> None:
        """Become the face of ``machine``, which was just built."""
        self._machine = machine
        runner = machine.runner
        self._lifetime = Lifetime(runner, "the machine")
        self._hooks = Hooks(self._machine)
        self._is_built = True
        self.memory = MemoryHandle(self._machine.board.memory)
        """The guest's RAM: see ``MemoryHandle``."""
        self.vcpus = tuple(VcpuHandle(loop, runner) for loop in self._machine.loops)
        """The vCPUs, whose registers can be read and set while the machine is paused."""
        self.console = ConsoleHandle(
            refuse_own_threads=runner.refuse_own_threads, wake=runner.wake,
            run_hook=self._hooks.run_hook,
            has_begun=lambda: runner.has_begun,
        )
        """The guest's output and a keyboard: see ``ConsoleHandle``."""
        self._machine.output.add_observer(self.console.feed)
        self._attach()

    # Running

    def start(self) -> None:
        """Start the guest in threads of its own, and return at once."""
        with EnoughFiles(), self._lifetime.starting():
            self._machine.start()

    def wait(self, timeout_s: float | None = None) -> Outcome | None:
        """Return the outcome once the run is over; None if it is not after ``timeout_s`` seconds.
        """
        self._lifetime.check_open("wait()")
        if not self._machine.runner.has_begun:
            raise RuntimeError("wait(): the machine was not started")
        return self._machine.wait(timeout_s)

    def run(self) -> Outcome:
        """Start the guest, wait for its end and return the outcome."""
        self.start()
        outcome = self.wait()
        assert outcome is not None  # without a limit of time
        return outcome

    def stop(self) -> Outcome | None:
        """End the run if it has not ended, and return its outcome; None if it never began."""
        self._lifetime.check_open("stop()")
        return self._end() if self._lifetime.has_begun("stop()") else None

    def finish(self) -> None:
        """Have the run end, without waiting for it: also in a hook."""
        self._lifetime.check_open("finish()")
        self._machine.runner.finish(Outcome(Kind.STOPPED))

    def pause(self, timeout_s: float | None = None) -> bool:
        """Pause the guest: True once every vCPU is out of it; see ``Runner.pause``."""
        self._lifetime.check_open("pause()")
        return self._machine.pause(timeout_s)

    def quiesce(self, timeout_s: float | None = None) -> bool:
        """Pause the guest and its devices, so that nothing of the machine moves."""
        self._lifetime.check_open("quiesce()")
        return self._machine.quiesce(timeout_s)

    def resume(self) -> None:
        """Let a paused or quiesced guest go on."""
        self._lifetime.check_open("resume()")
        self._machine.resume()

    def refresh_disks(self) -> None:
        """Have the disks look how large their files are, and tell the guest if one has grown."""
        self._lifetime.check_open("refresh_disks()")
        self._machine.board.refresh()

    def close(self) -> None:
        """Stop the machine and free all that it has; idempotent."""
        self._lifetime.close(self._end, self._machine.close)
        self.console.close()

    def __del__(self) -> None:
        if "_lifetime" in self.__dict__:
            self._lifetime.forget(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # Hooks

    def on_port(self, ports: int | range, hook: Callable[[Access], int | Refusal | None]) -> None:
        """Have ``hook`` watch, answer or refuse accesses to ``ports``: see ``Hooks.on_port``."""
        self._lifetime.check_open("on_port()")
        self._hooks.on_port(ports, hook)

    def on_mmio(
        self, addresses: int | range, hook: Callable[[Access], int | Refusal | None]
    ) -> None:
        """Have ``hook`` watch, answer or refuse accesses to ``addresses``: see ``Hooks.on_mmio``.
        """
        self._lifetime.check_open("on_mmio()")
        self._hooks.on_mmio(addresses, hook)

    def on_exit(self, hook: Callable[[int, Exit], int | Refusal | None]) -> None:
        """Have ``hook`` asked at every exit of every vCPU: see ``Hooks.on_exit``."""
        self._lifetime.check_open("on_exit()")
        self._hooks.on_exit(hook)

    def on_request(
        self, disk: int | str, hook: Callable[[DiskRequest], bytes | Refusal | None]
    ) -> None:
        """Have ``hook`` asked about each request to ``disk``: see ``Hooks.on_request``."""
        self._lifetime.check_open("on_request()")
        self._hooks.on_request(disk, hook)

    # Facts

    @property
    def is_paused(self) -> bool:
        """True if a pause was asked for and not taken back."""
        return self._machine.is_paused

    @property
    def outcome(self) -> Outcome | None:
        """The outcome, None before the end."""
        return self._machine.wait(0.0) if self._machine.runner.has_begun else None

    @property
    def exits(self) -> Exits:
        """How often the guest was left for this process, by reason; once it has run."""
        return self._machine.exits

    @property
    def evidence(self) -> Evidence:
        """The evidence so far, of the console and pvpanic: a panic, an init that started."""
        return self._machine.evidence

    # Parts

    def _attach(self) -> None:
        """Have the runner of a run that is about to begin tell us what we need."""
        self._machine.runner.on_wake(self._hand_over)
        self._machine.runner.when_over(self.console.end)

    def _attach_anew(self, begins_anew: bool) -> None:
        """Look at a guest that was rewound, in a new run if ``begins_anew``."""
        self.console.begin_anew(self._machine.watch.unfinished)
        self._hooks.begin_anew()
        if begins_anew:
            self._attach()

    def _hand_over(self) -> None:
        """Offer typed bytes to the guest, in the thread that keeps house."""
        runner = self._machine.runner
        if not runner.is_quiesced:
            # Set before asking: room that comes after the answer makes another wake-up.
            runner.input_waits = True
            runner.input_waits = self.console.hand_over(self._machine.consoles.receive)

    def _tell(self, line: str) -> None:
        if self._is_built:
            self._hooks.run_hook("report", self._report, line)
        else:
            self._report(line)

    def _end(self) -> Outcome | None:
        return self._machine.stop(Outcome(Kind.STOPPED))


def check_devices(devices: object) -> None:
    """Raise TypeError unless ``devices`` are virtio devices by name."""
    if not isinstance(devices, Mapping):
        raise TypeError(
            f"devices are virtio devices by name, {{\"echo\": EchoDevice()}}, "
            f"not {type(devices).__name__}"
        )
    for name, device in devices.items():
        if not isinstance(name, str):
            raise TypeError(f"the name of a device must be str, not {type(name).__name__}")
        if not isinstance(device, VirtioDevice):
            what = f"the class {device.__name__}" if isinstance(device, type) else (
                type(device).__name__
            )
            raise TypeError(f"device {name}: must be a VirtioDevice, not {what}")


def log_line(line: str) -> None:
    import logging

    logging.getLogger("pyvmm").warning("%s", escape(line))
