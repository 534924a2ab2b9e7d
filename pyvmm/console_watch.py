"""What the guest says on its console, and what that makes of a run's end."""

from __future__ import annotations

import time

from pyvmm.console import LineWatch
from pyvmm.lean import Protocol
from pyvmm.outcome import Kind, Outcome

_PANIC = b"Kernel panic - not syncing"
_PANIC_END = b"---[ end Kernel panic"
_HALTED = (b"reboot: System halted", b"reboot: Power down")
_USER_SPACE = b"pyvmm-init: user space reached"
_CANNOT_MOUNT = b"pyvmm-initramfs: cannot mount the root"
# init/main.c and init/do_mounts.c; "quiet" hides both.
_RUNS, _AS_INIT = b"Run ", b" as init process"
_WAITS_FOR_ROOT = b"Waiting for root device "
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
    ``reached_init`` is whether the kernel said that it starts one, ``waits_for_root`` whether it
    said that it waits for its root (``rootwait``).
    """

    def __init__(self, runner: Ender) -> None:
        self._runner = runner
        self._lines = LineWatch(self._on_line)
        self._panic: str | None = None
        self._has_stamps = False
        self._reported = False
        self._mount_error = ""
        self.has_printed = False
        self.waits_for_root = False
        self.reached_init = False
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
            return outcome.replace(detail=outcome.detail + hint)
        return outcome

    def _on_line(self, line: bytes) -> None:
        *messages, whole = texts(line)
        self._has_stamps = self._has_stamps or bool(messages)
        if self.user_space_seen_s is None and line.startswith(_USER_SPACE):
            self.user_space_seen_s = time.clock_gettime(time.CLOCK_BOOTTIME)
            self.reached_init = True
            return
        if line.startswith(_CANNOT_MOUNT):
            said = line.removeprefix(b"pyvmm-initramfs: ")
            self._mount_error = f" ({said.decode('ascii', 'replace')})"
            return
        if not self._has_stamps:
            messages = [whole]  # else this is somebody quoting a kernel that stamps what it says
        for message in messages:
            if self._panic is None and message.startswith(_PANIC):
                said = message.removeprefix(_PANIC)
                self._panic = said.decode("ascii", "replace").lstrip(": ").strip()
                self._runner.finish_after(PANIC_GRACE_S, Outcome(Kind.PANIC, detail=self._panic))
                return
            if self._panic is not None and message.startswith(_PANIC_END):
                self._runner.finish(Outcome(Kind.PANIC, detail=self._panic))
                return
            if message.startswith(_HALTED):
                self._runner.watch_for_halt()
                return
            if not self.reached_init:
                if message.startswith(_RUNS) and message.endswith(_AS_INIT):
                    self.reached_init = True
                elif message.startswith(_WAITS_FOR_ROOT):
                    self.waits_for_root = True


def texts(line: bytes) -> list[bytes]:
    """What may be a message of printk on ``line``: behind each time stamp, the last one first,
    and then the whole line.

    A stamp is ``[   12.345678] ``, wherever it begins: user space may have left a line unfinished.
    """
    found = []
    end = len(line)
    while (end := line.rfind(b"] ", 0, end)) >= 0:
        _, bracket, stamp = line[:end].rpartition(b"[")
        seconds, point, fraction = stamp.lstrip(b" ").partition(b".")
        if bracket and seconds.isdigit() and point and fraction.isdigit():
            found.append(line[end + 2 :])
    return [*found, line]
