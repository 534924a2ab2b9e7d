"""``pyvmm run --snapshot DIR``: one snapshot of a run, taken when the guest is warm.

The guest says so at the warm port, a line of its console does, or a person types Ctrl-A s.  A
thread of its own takes the snapshot, because the run's threads may not wait for each other.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from pyvmm.console.line_match import LineMatch, line_pattern
from pyvmm.devices.warm_port import WarmPort
from pyvmm.errors import ConfigError, PyvmmError, SnapshotError
from pyvmm.machine import Machine
from pyvmm.report import end_line
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.snapshot.files.layout import TEMPORARY
from pyvmm.startup.types import TYPE_CHECKING, Protocol, Record
from pyvmm.x86 import layout

if TYPE_CHECKING:
    import re
    from types import SimpleNamespace

HOLD_S = 2.0
"""The longest time that a vCPU waits at the warm port for the pause of a snapshot."""
POLL_S = 0.0005


class Taken(Protocol):
    """A snapshot that is whole; ``pyvmm.snapshot`` has them."""

    def close(self) -> None:
        """Free what it holds in this process."""


class WarmPlan(Record):
    """The options: ``directory`` is made; ``pattern`` is of --snapshot-at, None without it.

    With ``exits`` the run ends once the snapshot is there.  With ``live`` the guest goes on while
    its RAM is written.
    """

    directory: str
    pattern: re.Pattern[bytes] | None = None
    exits: bool = False
    live: bool = False


def plan_from(args: SimpleNamespace) -> WarmPlan:
    """Return the plan of the options in ``args``; ConfigError names the option."""
    if args.snapshot is None:
        for option in "--snapshot-at", "--snapshot-exit", "--snapshot-live":
            if getattr(args, option.removeprefix("--").replace("-", "_")):
                raise ConfigError(option, "goes with --snapshot DIR: add that, or leave it out")
    directory = args.snapshot
    option = f"--snapshot {directory}"
    if not directory or "\0" in directory:
        raise ConfigError("--snapshot", "names no directory")
    if os.path.lexists(directory):
        raise SnapshotError(option, "exists, and no snapshot is overwritten; name a new directory")
    if os.path.abspath(directory).endswith(TEMPORARY):
        raise SnapshotError(
            option, f"ends in {TEMPORARY}, as unfinished snapshots do; name another directory"
        )
    parent = os.path.dirname(os.path.abspath(directory))
    if not os.path.isdir(parent):
        raise SnapshotError(option, f"there is no directory {parent}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise SnapshotError(option, f"directory {parent} cannot be written")
    if args.snapshot_exit and args.snapshot_live:
        raise ConfigError(
            "--snapshot-live", "has the guest go on meanwhile, and --snapshot-exit ends it: leave "
            "out one of them"
        )
    pattern = None
    if args.snapshot_at is not None:
        pattern = line_pattern("--snapshot-at", args.snapshot_at)
    return WarmPlan(
        directory=directory, pattern=pattern, exits=bool(args.snapshot_exit),
        live=bool(args.snapshot_live),
    )


class WarmSnapshot:
    """The snapshot of one run of ``machine``, taken once at most.  Any thread may use it.

    ``take`` is ``snapshot.capture.take``; ``report`` gets a line about how it went.
    """

    def __init__(
        self, plan: WarmPlan, machine: Machine, report: Callable[[str], None],
        take: Callable[..., Taken],
    ) -> None:
        self._plan = plan
        self._machine = machine
        self._report = report
        self._take = take
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._has_written = False
        self._has_failed = False
        self._was_warm = False

    def plug(self) -> None:
        """Have the guest's port and console begin the snapshot; before the run."""
        port = WarmPort(self._on_port)
        self._machine.board.pio.add(layout.WARM_PORT, port.LENGTH, port)
        if self._plan.pattern is not None:
            match = LineMatch(self._plan.pattern, self._on_line)
            self._machine.output.add_observer(match.feed)

    @property
    def is_taking(self) -> bool:
        """True while a snapshot is being taken."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    def on_key(self) -> None:
        """Begin the snapshot because a person asks for it, again if it has failed."""
        if not self._begin():
            text = "is being taken" if self.is_taking else "is taken already"
            self._machine.output.say(f"\nsnapshot {self._plan.directory}: {text}\n")

    def end(self, outcome: Outcome) -> int:
        """Wait until nothing is being taken; return the run's exit status, which had ``outcome``.

        The machine must not be closed before.
        """
        if self._thread is not None:
            self._thread.join()
        if not (self._has_written or self._has_failed):
            self._report(
                f"snapshot {self._plan.directory}: none was taken, because the run ended before "
                "the guest was warm"
            )
        if self._plan.exits and not self._has_written:
            return outcome.exit_status or Outcome(Kind.HOST_ERROR).exit_status
        return outcome.exit_status

    # Triggers

    def _on_port(self) -> None:
        """Hold the vCPU that wrote to the port until it is to pause: not an instruction later."""
        if not self._begin_once():
            return
        runner = self._machine.runner
        until_s = time.monotonic() + HOLD_S
        while self.is_taking and not runner.is_paused and time.monotonic() < until_s:
            time.sleep(POLL_S)
        # This waits for the lock that whoever pauses holds until every vCPU was told.
        runner.has_resting_vcpus  # noqa: B018

    def _on_line(self) -> None:
        self._begin_once()

    def _begin_once(self) -> bool:
        """Begin the snapshot for the guest's sake, which may ask as often as it likes."""
        was_warm, self._was_warm = self._was_warm, True
        return not was_warm and self._begin()

    def _begin(self) -> bool:
        """Have a thread take the snapshot; return False if it is there, or under way."""
        with self._lock:
            if self._has_written or self.is_taking:
                return False
            self._thread = threading.Thread(target=self._run, name="snapshot", daemon=True)
            try:
                self._thread.start()
            except RuntimeError as error:  # no thread is left to this user
                self._thread = None
                self._fail(str(error))
            return True

    # Its thread

    def _run(self) -> None:
        started_s = time.monotonic()
        runner = self._machine.runner
        if self._plan.exits:
            runner.begin_pause()  # nothing of the guest goes on behind its snapshot
        try:
            self._take(self._machine, self._plan.directory, live=self._plan.live).close()
        except Exception as error:  # a defect of ours, too, is a line, and the guest goes on
            self._fail(_reason(error, self._plan.directory))
            return
        took_ms = (time.monotonic() - started_s) * 1e3
        self._has_written = True
        directory = self._plan.directory
        self._tell(
            f"snapshot {directory}: {_held(directory)} in {took_ms:.0f} ms; "
            f"pyvmm restore {directory} goes on from there"
        )
        if self._plan.exits:
            runner.finish(Outcome(Kind.STOPPED, detail="its snapshot is taken"))

    def _tell(self, line: str) -> None:
        """Report ``line``, on a line of its own if the guest's prompt is on a terminal."""
        output = self._machine.output
        if not output.line_ended:
            end_line()
            output.line_ended = True  # else the end of the run would begin another line
        self._report(line)

    def _fail(self, reason: str) -> None:
        self._has_failed = True
        goes_on = "" if self._plan.exits else "; the guest goes on"
        self._tell(f"snapshot {self._plan.directory}: was not taken: {reason}{goes_on}")
        if self._plan.exits:
            self._machine.runner.finish(Outcome(Kind.STOPPED, detail="its snapshot has failed"))


def prepare(
    args: SimpleNamespace,
) -> Callable[[Machine, Callable[[str], None]], WarmSnapshot]:
    """Return the function that gives a built machine its snapshot to take; ConfigError.

    That function raises SnapshotError if the machine has something that cannot be saved.
    """
    plan = plan_from(args)
    # Not while the guest waits: importing this takes longer than the pause of a snapshot.
    from pyvmm.snapshot.capture import check, take

    def plug(machine: Machine, report: Callable[[str], None]) -> WarmSnapshot:
        check(machine, plan.directory)
        warm = WarmSnapshot(plan, machine, report, take)
        warm.plug()
        return warm

    return plug


def _reason(error: Exception, directory: str) -> str:
    """Return the text of ``error``, without the directory that the line begins with."""
    if isinstance(error, SnapshotError) and error.subject == directory:
        return error.problem
    if isinstance(error, (OSError, PyvmmError, RuntimeError)):
        return str(error)
    return f"internal error: {type(error).__name__}: {error}"


def _held(directory: str) -> str:
    """Return how much the files in ``directory`` take on their disk: ``12 MiB``."""
    total = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            total += entry.stat(follow_symlinks=False).st_blocks * 512
    if total < 10 << 20:
        return f"{-(-total >> 10)} KiB"
    return f"{total >> 20} MiB"
