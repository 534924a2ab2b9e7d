"""``pyvmm run --snapshot DIR``: one snapshot of a run, taken when the guest is warm.

The guest says so at the warm port, a line of its console does, or a person types Ctrl-A s.  A
thread of its own takes the snapshot, because the run's threads may not wait for each other.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import threading
import time
from collections.abc import Callable

from pyvmm.console.line_match import LineMatch, line_pattern
from pyvmm.devices.warm_port import WarmPort
from pyvmm.errors import ConfigError, PyvmmError, SnapshotError
from pyvmm.machine import Machine
from pyvmm.report import terminal_outlet
from pyvmm.run.entered import EnteredThread
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.snapshot.files.layout import TEMPORARY
from pyvmm.startup.types import TYPE_CHECKING, Protocol, Record
from pyvmm.x86 import layout

if TYPE_CHECKING:
    import re
    from types import SimpleNamespace

    from pyvmm.snapshot.files.making import MakeWriter

HOLD_S = 30.0
"""The longest time that a vCPU waits at the warm port for the pause of a snapshot: the process that
makes the directory may have to start first (``attendant/``), on a busy host."""
POLL_S = 0.0005


class Taken(Protocol):
    """A snapshot that is whole; ``pyvmm.snapshot`` has them."""

    held_bytes: int
    """The bytes that its files take on their disk."""

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

    ``take`` is ``snapshot.capture.take``; ``report`` gets a line about how it went.  The thread
    that takes it is there from ``start`` to ``end``, because a jailed process makes none later.
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
        self._thread = EnteredThread("snapshot", "snapshot", self._run)
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        """For the thread: True, take it; False, the run has ended."""
        self._line_end = terminal_outlet()
        self.is_taking = False
        """True while a snapshot is being taken."""
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

    def start(self, enter: Callable[[str], None] | None = None) -> None:
        """Make the thread that takes it, which first confines itself by ``enter``; HostError."""
        self._thread.start(enter)
        self._thread.wait()

    def descriptors(self) -> dict[int, str]:
        """Return the descriptors that a jailed process must keep open for it, each with a name."""
        return {} if self._line_end is None else self._line_end.descriptors()

    def on_key(self) -> None:
        """Begin the snapshot because a person asks for it, again if it has failed."""
        if not self._begin():
            text = "is being taken" if self.is_taking else "is taken already"
            self._machine.output.say(f"\nsnapshot {self._plan.directory}: {text}\n")

    def end(self, outcome: Outcome) -> int:
        """Wait until nothing is being taken; return the run's exit status, which had ``outcome``.

        The machine must not be closed before.
        """
        self._wanted.put(False)
        self._thread.join()
        if self._line_end is not None:
            self._line_end.close()
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
            self.is_taking = True
            self._wanted.put(True)
            return True

    # Its thread

    def _run(self) -> None:
        while self._wanted.get():
            try:
                self._take_it()
            finally:
                self.is_taking = False

    def _take_it(self) -> None:
        started_s = time.monotonic()
        runner = self._machine.runner
        if self._plan.exits:
            runner.begin_pause()  # nothing of the guest goes on behind its snapshot
        try:
            taken = self._take(self._machine, self._plan.directory, live=self._plan.live)
            taken.close()
        except Exception as error:  # a defect of ours, too, is a line, and the guest goes on
            self._fail(_reason(error, self._plan.directory))
            return
        took_ms = (time.monotonic() - started_s) * 1e3
        self._has_written = True
        directory = self._plan.directory
        self._tell(
            f"snapshot {directory}: {_shown(taken.held_bytes)} in {took_ms:.0f} ms; "
            f"pyvmm restore {directory} goes on from there"
        )
        if self._plan.exits:
            runner.finish(Outcome(Kind.STOPPED, detail="its snapshot is taken"))

    def _tell(self, line: str) -> None:
        """Report ``line``, on a line of its own if the guest's prompt is on a terminal."""
        output = self._machine.output
        if not output.line_ended:
            if self._line_end is not None:
                with contextlib.suppress(OSError):
                    self._line_end.write(b"\n")
            output.line_ended = True  # else the end of the run would begin another line
        self._report(line)

    def _fail(self, reason: str) -> None:
        self._has_failed = True
        goes_on = "" if self._plan.exits else "; the guest goes on"
        self._tell(f"snapshot {self._plan.directory}: was not taken: {reason}{goes_on}")
        if self._plan.exits:
            self._machine.runner.finish(Outcome(Kind.STOPPED, detail="its snapshot has failed"))


def prepare(args: SimpleNamespace) -> Callable[..., WarmSnapshot]:
    """Return the function that gives a built machine its snapshot to take; ConfigError.

    It takes the machine, whoever reports lines, and whoever makes the directory's writer; None:
    this process does.  It raises SnapshotError if the machine has something that cannot be saved.
    """
    plan = plan_from(args)
    # Not while the guest waits: importing this takes longer than the pause of a snapshot.
    from pyvmm.snapshot.capture import check, take

    def plug(
        machine: Machine, report: Callable[[str], None], make_writer: MakeWriter | None = None
    ) -> WarmSnapshot:
        check(machine, plan.directory)
        take_it = take if make_writer is None else functools.partial(take, make_writer=make_writer)
        warm = WarmSnapshot(plan, machine, report, take_it)
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


def _shown(total: int) -> str:
    """Return ``total`` bytes as a person reads them: ``12 MiB``."""
    if total < 10 << 20:
        return f"{-(-total >> 10)} KiB"
    return f"{total >> 20} MiB"
