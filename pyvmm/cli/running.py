"""A machine at a command line: from its making to the exit status; for ``run`` and ``restore``."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time

import pyvmm
from pyvmm.config import RunConfig
from pyvmm.report import Reporter, end_line, say
from pyvmm.run.outcome import MAX_GUEST_STATUS, Kind, Outcome
from pyvmm.startup.commands import Option
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import SimpleNamespace

    from pyvmm.cli.warm import WarmSnapshot
    from pyvmm.control.run_control import RunControl
    from pyvmm.machine import Machine
    from pyvmm.startup.bundle import Bundle

CONTROL_OPTIONS = (
    Option(name="--control", metavar="SOCKET",
           help="let pyvmm ctl and other programs of this user drive the machine at a Unix "
           "socket (docs/control.md)"),
    Option(name="--control-fd", metavar="N",
           help="the same for the process at the other end of connected socket N, which is "
           "inherited; its end stops the machine"),
)
VERBOSE_OPTION = Option(
    name="--verbose", short="-v",
    help="say how the run went, on standard error; -vv: tracebacks of errors too",
)
STATUSES = """\
  0-119  what the guest reported through I/O port 0xf4 (119 for anything larger); 0 too when it
         rebooted, powered off or halted on purpose
  121    kernel panic; a kernel that gave up, halted or rebooted before it started an init; a
         halt without a word printed
  122    triple fault        123    KVM internal error
  124    timeout               125    bad option, bad file or unusable host
  128+n  stopped by signal n
"""
"""The exit statuses, for ``--help``."""
_QUIET = (Kind.GUEST_STATUS, Kind.RESET, Kind.SHUTDOWN, Kind.POWER_OFF, Kind.QUIT, Kind.STOPPED)


def has_control(args: SimpleNamespace) -> bool:
    """True if the options in ``args`` let other programs drive the machine."""
    return args.control is not None or args.control_fd is not None


def with_control(args: SimpleNamespace, run: Callable[[RunControl | None], int]) -> int:
    """Return ``run(control)``, with the control that the options in ``args`` ask for, if any."""
    if not has_control(args):
        return run(None)
    from pyvmm.control.run_control import RunControl

    with RunControl(args.control, args.control_fd, pyvmm.__version__) as control:
        try:
            return run(control)
        except Exception as error:
            control.failed(error)
            raise


class Running:
    """One run of a machine.

    With ``sets_clock`` the guest's agent sets its date to the host's.
    ``started_s`` is the time at which the process was started.  Modules come from ``bundle``
    until the guest runs.
    """

    def __init__(
        self, *, verbose: bool, timing: bool, started_s: float, bundle: Bundle,
        control: RunControl | None, sets_clock: bool = False,
    ) -> None:
        self._verbose = verbose
        self._timing = timing
        self._started_s = started_s
        self._bundle = bundle
        self._control = control
        self._sets_clock = sets_clock

    def run(
        self,
        make: Callable[[Reporter], tuple[Machine, RunConfig]],
        tell: Callable[[Machine, Reporter], None],
        warm: Callable[[Machine, Callable[[str], None]], WarmSnapshot] | None = None,
    ) -> int:
        """Run the machine that ``make`` returns to its end; return the exit status.

        ``tell`` reports lines about it, before it runs.  ``warm`` gives it a snapshot to take
        (``cli/warm.py``).
        """
        from pyvmm.cli.session import run_at_terminal  # not for a mistake in the options

        with contextlib.closing(Reporter(sys.stderr)) as report, contextlib.ExitStack() as stack:
            machine, config = make(report)
            stack.enter_context(machine)
            tell(machine, report)
            if self._control is not None:
                self._control.attach(
                    machine, config, report, sets_clock=self._sets_clock
                )
            snapshot = None if warm is None else warm(machine, report)
            guest_start_s = time.clock_gettime(time.CLOCK_BOOTTIME)
            self._bundle.__exit__()
            gc.freeze()  # the present objects stay: no collection need look at them
            gc.enable()  # cli.main disabled the collector, and says why
            outcome = run_at_terminal(machine, snapshot)
            if self._control is not None:
                outcome = _end_control(self._control, machine, outcome)
            status = outcome.exit_status if snapshot is None else snapshot.end(outcome)
            end_s = time.clock_gettime(time.CLOCK_BOOTTIME)
            missing = self._bundle.left_out()
        gc.unfreeze()
        if not machine.console_line_ended:
            end_line()
        for line in self._lines(machine, outcome, status, guest_start_s, end_s):
            say(line)
        # Last, because explaining may take seconds: whoever does not wait has seen the rest.
        if machine.evidence.wants_explanation(outcome):
            # The outcome stands, even if no descriptor is left to read a remedy with.
            with contextlib.suppress(OSError, ImportError):
                for line in _explain(config, outcome, machine):
                    say(line)
        self._bundle.update(missing)
        return status

    def _lines(
        self, machine: Machine, outcome: Outcome, status: int, guest_start_s: float, end_s: float
    ) -> list[str]:
        """Return what there is to say of a run that ended with ``outcome``."""
        lines = []
        if self._timing:
            from pyvmm.devices.boot_timer import timing_lines

            lines += timing_lines(
                machine.marks, process_start_s=self._started_s, guest_start_s=guest_start_s,
                end_s=end_s,
            )
        user_space_s = machine.evidence.user_space_seen_s
        if self._verbose and user_space_s is not None:
            lines.append(f"user space after {user_space_s - self._started_s:.2f} s")
        if self._verbose or outcome.kind not in _QUIET or outcome.value > MAX_GUEST_STATUS:
            lines += _lines_of(outcome)
        if self._verbose:
            lines.append(f"exits: {machine.exits}")
            lines.append(f"ran {end_s - self._started_s:.2f} s, exit status {status}")
        return lines


def _end_control(control: RunControl, machine: Machine, outcome: Outcome) -> Outcome:
    """Tell all clients of the end with ``outcome``; return that of the run's last end.

    A client may rewind the machine: then its run goes on, in threads of its own.
    """
    while control.end(outcome):
        last = machine.wait()
        assert last is not None  # without a limit of time
        outcome = last
    return outcome


def _lines_of(outcome: Outcome) -> list[str]:
    """Return the lines that tell of ``outcome``: several if its detail is registers."""
    text = str(outcome)
    if outcome.kind in (Kind.TRIPLE_FAULT, Kind.INTERNAL_ERROR):  # our own line ends
        return text.split("\n")
    return [text]


def _explain(config: RunConfig, outcome: Outcome, machine: Machine) -> list[str]:
    from pyvmm.cli import explain
    from pyvmm.cli.first_look import has_known_configuration

    return explain.after(
        config, outcome, machine.evidence,
        is_known=has_known_configuration(config.kernel, machine.kernel.version),
        is_linux=machine.kernel.is_linux, version=machine.kernel.version,
    )


def process_start_s() -> float:
    """Return when this process was started (before the interpreter was), on CLOCK_BOOTTIME."""
    try:
        fd = os.open("/proc/self/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            stat = os.read(fd, 4096)
        finally:
            os.close(fd)
        # proc(5): field 22, starttime in clock ticks; fields are counted after the last ')'.
        ticks = int(stat.rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return ticks / os.sysconf("SC_CLK_TCK")
