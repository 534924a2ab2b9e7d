"""What the guest says on its console, and what that makes of a run's end."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from typing import Protocol

from pyvmm.console import LineWatch
from pyvmm.outcome import Kind, Outcome

# What printk says has a time stamp, wherever on the line it starts (user space may have left an
# unfinished line); from a kernel without time stamps it is the whole line.
_STAMP = rb"\[ *\d+\.\d+\] "
_STAMPED = re.compile(_STAMP)
_START = rb"(?:.*" + _STAMP + rb"|^)"
_PANIC = re.compile(_START + rb"Kernel panic - not syncing(.*)")
_PANIC_END = re.compile(_START + rb"---\[ end Kernel panic")
_HALTED = re.compile(_START + rb"reboot: (?:System halted|Power down)")
_USER_SPACE = re.compile(rb"pyvmm-init: user space reached")
_CANNOT_MOUNT = re.compile(rb"pyvmm-initramfs: (cannot mount the root.*)")
PANIC_GRACE_S = 2.0
"""How long after a panic's first line the guest may go on printing, if it does not reboot."""


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
        self._reported = False
        self._mount_error = ""
        self.has_printed = False
        self.user_space_seen_s: float | None = None

    def feed(self, data: bytes) -> None:
        """The next bytes of console output."""
        self.has_printed = True
        self._lines.feed(data)

    def panic_reported(self) -> None:
        """The guest told pvpanic that it panicked: what it printed before says why.

        From any thread.  It has a while to reboot or to print more.
        """
        self._reported = True
        self._runner.finish_after(PANIC_GRACE_S, Outcome(Kind.PANIC, detail=self._why))

    @property
    def _why(self) -> str:
        """The panic's first line, and what our initramfs had to say before."""
        return (self._panic or "reported through pvpanic") + self._mount_error

    def judge(self, outcome: Outcome) -> Outcome:
        """What a run's end means, given what the console said: a panic explains a reboot."""
        if (self._panic is not None or self._reported) and outcome.kind in (
            Kind.PANIC, Kind.RESET, Kind.SHUTDOWN, Kind.TRIPLE_FAULT, Kind.TIMEOUT
        ):
            return Outcome(Kind.PANIC, detail=self._why)
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
        elif found := _CANNOT_MOUNT.match(line):
            self._mount_error = f" ({found[1].decode('ascii', 'replace')})"
        elif self._has_stamps and not stamped:
            return  # this kernel stamps its messages, so this is somebody quoting one
        elif self._panic is None and (found := _PANIC.match(line)):
            self._panic = found[1].decode("ascii", "replace").lstrip(": ").strip()
            self._runner.finish_after(PANIC_GRACE_S, Outcome(Kind.PANIC, detail=self._panic))
        elif self._panic is not None and _PANIC_END.match(line):
            self._runner.finish(Outcome(Kind.PANIC, detail=self._panic))
        elif _HALTED.match(line):
            self._runner.watch_for_halt()
