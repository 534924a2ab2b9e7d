"""A Vm without a machine: a test says what its guest prints and does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

from pyvmm.api.config import MachineConfig
from pyvmm.errors import PyvmmError
from pyvmm.launcher.completed import Completed
from pyvmm.launcher.errors import EndedError
from pyvmm.launcher.vm import Vm
from pyvmm.run.outcome import Kind, Outcome

STAMP = b"[    1.000000] "


class StandInCommand:
    """A command that does what the test's function says, and ends with its result."""

    def __init__(self, vm: StandInVm, argv: tuple[str, ...]) -> None:
        self._vm = vm
        self._argv = argv

    def __enter__(self) -> StandInCommand:
        return self

    def __exit__(self, *_exc: object) -> None:
        pass

    def wait(self, *, stdout: BinaryIO, stderr: BinaryIO) -> Completed:
        """Run the function of the test."""
        done = self._vm.act(self._argv, stdout, stderr)
        self._vm.check()
        return done.replace(argv=self._argv)


class StandInConsole:
    """The console's text."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.lost_bytes = 0

    @property
    def text(self) -> str:
        """All that was printed."""
        return self.data.decode("utf-8", "replace")


class StandInVm:
    """Takes the place of ``launcher.vm.Vm``.

    ``boot`` is called with this when the agent is awaited (or at once, if the test has no command),
    ``act`` with the command and its two streams.
    """

    def __init__(
        self,
        *,
        boot: Callable[[StandInVm], object] = lambda vm: None,
        act: Callable[[tuple[str, ...], BinaryIO, BinaryIO], Completed] | None = None,
        log: bytes = b"",
        files: dict[str, bytes] | None = None,
        has_agent: bool = True,
        reports: tuple[str, ...] = (),
    ) -> None:
        self._reports = reports
        self._boot = boot
        self.act = act or (lambda argv, out, err: Completed(argv=argv, status=0))
        self._log = log
        self.files = {} if files is None else files
        self._has_agent = has_agent
        self._observers: list[Callable[[bytes], object]] = []
        self._ends: list[Callable[[Outcome], object]] = []
        self.console = StandInConsole()
        self.failure: PyvmmError | None = None
        self.outcome: Outcome | None = None
        self.is_paused = False
        self.is_closed = False
        self.config: MachineConfig
        self.console_log: str | None = None

    def launch(
        self, config: MachineConfig, *, console_log: str | None = None,
        report: Callable[[str], object],
    ) -> Vm:
        """``pyvmm.launch``, with the lines of ``reports`` from the machine's process."""
        for line in self._reports:
            report(line)
        self.config, self.console_log = config, console_log
        return cast(Vm, self)

    def __enter__(self) -> StandInVm:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.is_closed = True

    # For the test

    def says(self, *lines: str | bytes) -> None:
        """Have the guest print lines."""
        for line in lines:
            self.prints((line.encode() if isinstance(line, str) else line) + b"\r\n")

    def prints(self, data: bytes) -> None:
        """Have the guest print."""
        self.console.data += data
        if self.console_log is not None:
            with Path(self.console_log).open("ab") as file:
                file.write(data)
        for observe in self._observers:
            observe(data)

    def ends(self, outcome: Outcome) -> None:
        """End the run."""
        if self.outcome is None:
            self.outcome = outcome
            for callback in self._ends:
                callback(outcome)

    def check(self) -> None:
        """Raise as a call that waits does."""
        if self.failure is not None:
            raise self.failure
        if self.outcome is not None:
            raise EndedError(f"ended: {self.outcome}", self.outcome)

    # A Vm's

    def on_output(self, callback: Callable[[bytes], object]) -> None:
        """See Vm."""
        if self.console.data:
            callback(bytes(self.console.data))
        self._observers.append(callback)
        if not self._has_agent and len(self._observers) == 3:
            self._boot(self)

    def on_end(self, callback: Callable[[Outcome], object]) -> None:
        """See Vm."""
        self._ends.append(callback)

    def fail(self, error: PyvmmError) -> None:
        """See Vm."""
        self.failure = self.failure or error
        self.ends(Outcome(Kind.STOPPED))

    def wait(self, timeout_s: float | None = None) -> Outcome | None:
        """See Vm."""
        return self.outcome

    def stop(self) -> Outcome:
        """See Vm."""
        self.ends(Outcome(Kind.STOPPED))
        assert self.outcome is not None
        return self.outcome

    def pause(self, timeout_s: float = 30.0) -> bool:
        """See Vm."""
        self.is_paused = True
        return True

    def resume(self) -> None:
        """See Vm."""
        self.is_paused = False

    def registers(self, vcpu: int = 0) -> str:
        """See Vm."""
        return " ".join(["rax 0x1", *(f"r{number} 0xffffffff81000000" for number in range(8, 13))])

    def wait_for_agent(self, timeout_s: float = 60.0) -> None:
        """See Vm."""
        self._boot(self)
        self.check()

    def begin(self, argv: list[str], **_options: object) -> StandInCommand:
        """See Vm."""
        self.check()
        return StandInCommand(self, tuple(argv))

    def put(self, source: str, target: str) -> None:
        """See Vm."""
        self.check()
        self.files[target] = Path(source).read_bytes()

    def get(self, source: str, target: str) -> None:
        """See Vm."""
        self.check()
        if source not in self.files:
            raise PyvmmError(f"{source}: No such file or directory")
        Path(target).write_bytes(self.files[source])

    def read(self, path: str, timeout_s: float = 300.0) -> bytes:
        """See Vm."""
        self.check()
        return self._log
