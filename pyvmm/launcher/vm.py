"""``pyvmm.launch``: a virtual machine in a process of its own, and ``Vm``, which drives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from pyvmm.api.config import MachineConfig
from pyvmm.api.vcpus import Registers
from pyvmm.launcher.clones import Clones
from pyvmm.launcher.command import Command
from pyvmm.launcher.completed import Completed
from pyvmm.launcher.console import VmConsole
from pyvmm.launcher.limits import boot_timeout_s
from pyvmm.launcher.memory import VmMemory
from pyvmm.launcher.session import Session
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike
    from typing import BinaryIO
    from uuid import UUID

    from pyvmm.errors import PyvmmError
    from pyvmm.run.outcome import Outcome

    Argument = str | bytes | PathLike[str]

DEFAULT_TIMEOUT_S = 60.0
"""Time limit of a command, and of the wait for the agent."""
FILE_TIMEOUT_S = 300.0
"""Time limit of ``put``, ``get``, ``read`` and ``write``."""


def launch(
    config: MachineConfig,
    *,
    console_log: str | PathLike[str] | int | None = None,
    control: str | PathLike[str] | None = None,
    report: Callable[[str], None] | None = None,
) -> Vm:
    """Start the machine of ``config`` in a process of its own and return it, running.

    ``console_log`` is a file for all that the guest prints, emptied before, or a descriptor of
    one.  That process appends to it, so that others may, too.  ``control`` is a socket for other
    programs (``pyvmm ctl``).  ``report`` is called with lines about what is odd, from a thread of
    the Vm; by default they go to the logger ``pyvmm`` as warnings.

    ConfigError for files and options that cannot work, HostError for a host that cannot, TypeError
    for a disk that only this process has (``MemoryDisk``).
    """
    return Vm(Session.start(config, console_log=console_log, control=control, report=report))


class Vm:
    """A machine that runs in another process; ``launch`` makes it.

    A context manager: leaving it stops the machine, and nothing of it is left.  The machine also
    ends when this process does, however that ends.  All methods may be called from any thread.

    A call that waits for the guest raises as soon as the run is over: ``EndedError``, or the error
    given to ``fail``.  RuntimeError after ``close``, and for a call that would wait for its
    own thread, as ``run`` in a callback of the console would.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.console: VmConsole = session.console
        """The guest's output and a keyboard: see ``ConsoleHandle``."""
        self.memory = VmMemory(session)
        """The guest's RAM: ``vm.memory.read(gpa, length)``."""

    # The machine

    def wait(self, timeout_s: float | None = None) -> Outcome | None:
        """Return the outcome once the run is over; None if it is not after ``timeout_s`` seconds.
        """
        return self._session.state.told(self._session.wait(timeout_s))

    def stop(self) -> Outcome:
        """End the run if it has not ended, and return its outcome."""
        self._session.check_open("stop()")
        return self._session.state.told(self._session.stop())

    def finish(self) -> None:
        """Have the run end, without waiting for it: also in a callback."""
        self._session.finish()

    def pause(self, timeout_s: float = 30.0) -> bool:
        """Pause the guest: True once every vCPU is out of it."""
        return self._session.pause(timeout_s)

    def resume(self) -> None:
        """Let a paused guest go on."""
        self._session.call("resume")

    def refresh_disks(self) -> None:
        """Have the disks look how large their files are, and tell the guest if one has grown."""
        self._session.call("disks.refresh")

    def registers(self, vcpu: int = 0) -> Registers:
        """Return the registers of a vCPU while the machine is paused, or after its end."""
        return self._session.registers(vcpu)

    def snapshot(
        self, directory: str | PathLike[str] | None = None, *, live: bool = False,
        diff: bool = False,
    ) -> VmSnapshot:
        """Save the machine, which goes on, into the new ``directory``; see ``VmSnapshot.clone``.

        Without one it is a temporary directory, which goes when the snapshot is closed.  With
        ``live`` the guest runs on while its memory is written.  With ``diff`` only the pages are
        saved that differ from the snapshot of which this machine is a clone.

        SnapshotError for what cannot be saved, before the guest is paused: a disk that is written
        in place, for instance.
        """
        from pyvmm.launcher.saving import snapshot

        return VmSnapshot.of(snapshot(self._session, directory, live=live, diff=diff))

    def checkpoint(self) -> int:
        """Keep this moment in the memory of the machine's process; return its number."""
        from pyvmm.launcher.saving import checkpoint

        return checkpoint(self._session)

    def rewind(self, number: int | None = None) -> None:
        """Go back to checkpoint ``number``, or to the newest checkpoint or snapshot there is.

        A clone without either goes back to its own snapshot.  A guest that ran runs on from
        there.  One whose run has ended is paused then: ``outcome`` is None, and ``resume`` lets it
        go on.  Its agent is told; commands of before are lost.  The console's ``text`` keeps all.

        SnapshotError if there is nothing to go back to; EndedError if the machine's process has
        gone with the end of its run, because there was nothing to go back to.
        """
        from pyvmm.launcher.saving import rewind

        rewind(self._session, number)

    @property
    def clone_id(self) -> UUID | None:
        """The number of the clone that the guest is, new after each rewind; None for no clone."""
        return self._session.clone_id

    def close(self) -> None:
        """Stop the machine and free all that it has; idempotent."""
        self._session.close()

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if "_session" in self.__dict__:
            self._session.forget()

    # Facts

    @property
    def is_paused(self) -> bool:
        """True if a pause was asked for and not taken back."""
        return self._session.is_paused

    @property
    def outcome(self) -> Outcome | None:
        """The outcome, None before the end."""
        return self._session.state.told(self._session.state.outcome)

    @property
    def is_end_told(self) -> bool:
        """True once a call has told its caller that the run is over.

        It returned the outcome, or raised EndedError or the error given to ``fail``.
        """
        return self._session.state.is_end_told

    @property
    def pid(self) -> int:
        """The process that runs the machine."""
        return self._session.pid

    @property
    def evidence(self) -> Mapping[str, object]:
        """The evidence of the console and pvpanic, as ``Machine.evidence``; empty before the end.
        """
        return self._session.evidence

    @property
    def end_registers(self) -> Sequence[str]:
        """The registers of each vCPU at the end, a line each; empty before it."""
        return self._session.end_registers

    @property
    def failure(self) -> PyvmmError | None:
        """The error given to ``fail``; None without one."""
        return self._session.state.failure

    # For whoever judges the run

    def fail(self, error: PyvmmError) -> None:
        """Have every call that waits for the guest, now or later, raise ``error``; end the run.

        The first error counts.  It never waits: call it from any thread, also in a callback.
        ``wait``, ``stop``, ``close``, ``registers`` and ``memory`` go on as without it.
        """
        self._session.fail(error)

    def on_end(self, callback: Callable[[Outcome], object]) -> None:
        """Have ``callback`` called once with the outcome, before any waiting call learns of it.

        It may call ``fail``, and must not wait for the machine.  If the run is over already
        it is called at once, in this thread.
        """
        self._session.state.on_end(callback)

    def on_output(self, callback: Callable[[bytes], object]) -> None:
        """Have ``callback`` called with all that the guest prints, in order, as bytes.

        It gets all that has come so far at once, in this thread.  It must not wait.
        """
        self.console.on_output(callback)

    def settle(self, timeout_s: float = 5.0) -> None:
        """Return once the callbacks had all that the guest has printed up to now."""
        self._session.settle(timeout_s)

    # The guest, by its agent

    def wait_for_agent(self, timeout_s: float | None = None) -> None:
        """Return once the agent in the guest takes orders; AgentError if it does not in time.

        The default is 60 s, and 300 s in the lab.
        """
        self._session.wait_for_agent(boot_timeout_s() if timeout_s is None else timeout_s)

    def run(
        self,
        argv: Sequence[Argument],
        *,
        input: bytes | str | None = None,  # noqa: A002 - as subprocess.run has it
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        check: bool = False,
        stdout: BinaryIO | None = None,
        stderr: BinaryIO | None = None,
    ) -> Completed:
        """Run the program and arguments ``argv`` in the guest, and return how it ended.

        No shell is involved: for one write ``["sh", "-c", text]``.  ``env`` is added to the
        agent's environment (PATH, HOME, TERM).  After ``timeout_s`` seconds the command is killed,
        and the result has ``timed_out``.  Output goes to the binary files ``stdout`` and
        ``stderr``, or into the result: up to 64 MiB each, more kills the command and is
        OutputLimitError.  With ``check`` a failed command is a CommandError.
        """
        with self.begin(
            argv, input=input, env=env, cwd=cwd, timeout_s=timeout_s, has_input=False
        ) as command:
            completed = command.wait(stdout=stdout, stderr=stderr)
        return completed.check() if check else completed

    def begin(
        self,
        argv: Sequence[Argument],
        *,
        input: bytes | str | None = None,  # noqa: A002 - as subprocess.run has it
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        timeout_s: float | None = None,
        has_input: bool = True,
    ) -> Command:
        """Start a command as ``run`` does, and return it while it runs; several may at once.

        With ``input`` its standard input is these bytes, which ``Command.wait`` sends.  Else, with
        ``has_input``, ``Command.write`` sends some until ``close_input``.
        """
        return Command.begin(
            self._session, argv, input=input, env=env, cwd=cwd, timeout_s=timeout_s,
            has_input=has_input,
        )

    def put(
        self, source: str | PathLike[str], target: str, *, timeout_s: float = FILE_TIMEOUT_S
    ) -> None:
        """Copy a file or directory of this host to ``target`` in the guest, as ``cp -r`` would.

        A ``target`` that is a directory, or ends with ``/``, gets it under its own name.
        """
        from pyvmm.launcher.files import put

        put(self._session, source, target, timeout_s)

    def get(
        self, source: str, target: str | PathLike[str], *, timeout_s: float = FILE_TIMEOUT_S
    ) -> None:
        """Copy the guest's file or directory ``source`` to ``target`` here, as ``cp -r`` would.

        Nothing is written outside ``target``, whatever the guest sends.
        """
        from pyvmm.launcher.files import get

        get(self._session, source, target, timeout_s)

    def read(self, path: str, *, timeout_s: float = FILE_TIMEOUT_S) -> bytes:
        """Return the content of the guest's file ``path``; OutputLimitError over 64 MiB."""
        from pyvmm.launcher.files import read

        return read(self._session, path, timeout_s)

    def write(
        self, path: str, data: bytes | str, mode: int = 0o644, *,
        timeout_s: float = FILE_TIMEOUT_S,
    ) -> None:
        """Make ``data`` the content of the guest's file ``path``; a new file gets ``mode``."""
        from pyvmm.launcher.files import write

        write(self._session, path, data, mode, timeout_s)


class VmSnapshot:
    """The snapshot in the directory ``path``; ``Vm.snapshot`` makes one, or open an old one.

    Each clone is a process of its own, so one that breaks harms no other.  A process that has all
    modules loaded forks them: a clone then costs a fraction of a start.  ``disks`` are other
    places of the snapshot's disks, by number.

    A context manager: leaving it ends that process, and removes the directory if the snapshot was
    made without one.  Clones that still run go on.  All methods may be called from any thread.

    SnapshotError, at the first clone, if the directory cannot be used.
    """

    def __init__(
        self, path: str | PathLike[str], *,
        disks: Mapping[int, str | PathLike[str]] | None = None,
    ) -> None:
        self._clones = Clones(path, disks=disks)

    @classmethod
    def of(cls, clones: Clones) -> VmSnapshot:
        """Return the snapshot that ``clones`` are of."""
        snapshot = cls.__new__(cls)
        snapshot._clones = clones
        return snapshot

    @property
    def path(self) -> str:
        """The snapshot's directory."""
        return self._clones.path

    def clone(
        self,
        *,
        clock: str = "keep",
        timeout_s: float | None = None,
        console_log: str | PathLike[str] | int | None = None,
        control: str | PathLike[str] | None = None,
        report: Callable[[str], None] | None = None,
    ) -> Vm:
        """Return a new machine that goes on where the snapshot was made, running.

        With ``clock="now"`` the guest's date is the host's; with ``"keep"`` it goes on from the
        snapshot's.  After ``timeout_s`` seconds the run ends.  The rest is as for ``launch``.

        SnapshotError if the snapshot cannot be used here, HostError for a host that cannot.
        """
        return Vm(self._clones.start(
            clock=clock, timeout_s=timeout_s, console_log=console_log, control=control,
            report=report,
        ))

    def close(self) -> None:
        """End the process that makes clones, and remove a temporary directory; idempotent."""
        self._clones.close()

    def __enter__(self) -> VmSnapshot:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
