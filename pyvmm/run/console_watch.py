"""What the guest says on its console, and what that makes of a run's end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pyvmm.console.output import LineWatch
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.startup.types import Protocol

_PANIC = b"Kernel panic - not syncing"
_END_MARK = b"---[ end "
_PANIC_END = _END_MARK + b"Kernel panic"
_HALTED = (b"reboot: System halted", b"reboot: Power down")
_USER_SPACE = b"pyvmm-init: user space reached"
_CANNOT_MOUNT = b"pyvmm-initramfs: cannot mount the root"
# init/main.c and init/do_mounts.c; "quiet" hides both.
_RUNS, _AS_INIT = b"Run ", b" as init process"
_WAITS_FOR_ROOT = b"Waiting for root device "
PANIC_GRACE_S = 2.0
"""How long after a panic's first line the guest may go on printing, if it does not reboot."""
SENT_LIMIT = 32 * 1024
"""How much of what one vCPU has sent is kept, at most; half of it at least."""


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
        self._sent: dict[int, bytearray] = {}
        self.has_printed = False
        self.waits_for_root = False
        self.reached_init = False
        self.user_space_seen_s: float | None = None

    def feed(self, data: bytes) -> None:
        """The next bytes of console output."""
        self.has_printed = True
        self._lines.feed(data)

    def tap(self, transmit: Callable[[bytes], None]) -> Callable[[bytes], None]:
        """``transmit``, for a UART with several vCPUs; it is called in the sender's thread.

        A panic does not wait until other CPUs have left the UART (Linux's ``oops_in_progress``):
        what they send to a terminal gets between the bytes of the panic's line.  Those of the one
        vCPU alone are whole lines.
        """
        sent, sender = self._sent, threading.get_ident

        def tapped(data: bytes) -> None:
            own = sent.get(sender())
            if own is None:
                own = sent[sender()] = bytearray()
            own += data
            if len(own) > SENT_LIMIT:
                del own[: -(SENT_LIMIT // 2)]
            transmit(data)

        return tapped

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
        """What a run's end means, given what the console said: a panic explains a reboot.

        Once all threads of the run are done.
        """
        if outcome.kind in (
            Kind.PANIC, Kind.RESET, Kind.SHUTDOWN, Kind.TRIPLE_FAULT, Kind.TIMEOUT
        ):
            if self._panic is None:
                self._panic = self._find_torn_panic()
            if self._panic is not None or self._reported:
                return Outcome(Kind.PANIC, detail=self._why)
        if outcome.kind is Kind.SHUTDOWN and not self.has_printed:
            # What a halted system says last it says itself; a kernel that died early says nothing.
            return outcome.replace(kind=Kind.SILENT_HALT)
        if outcome.kind is Kind.INTERNAL_ERROR:
            hint = (
                "\nif this happens with every kernel, this host's KVM is not complete: `pyvmm"
                " doctor` says so, and `pyvmm lab -- pyvmm run ...` runs the same where KVM is"
            )
            return outcome.replace(detail=outcome.detail + hint)
        return outcome

    def _on_line(self, line: bytes) -> None:
        self._has_stamps = self._has_stamps or len(texts(line)) > 1
        if self.user_space_seen_s is None and line.startswith(_USER_SPACE):
            self.user_space_seen_s = time.clock_gettime(time.CLOCK_BOOTTIME)
            self.reached_init = True
            return
        if line.startswith(_CANNOT_MOUNT):
            said = line.removeprefix(b"pyvmm-initramfs: ")
            self._mount_error = f" ({said.decode('ascii', 'replace')})"
            return
        for message in self._messages(line):
            if self._panic is None and (reason := _reason(message)) is not None:
                self._panic = reason
                self._runner.finish_after(PANIC_GRACE_S, Outcome(Kind.PANIC, detail=reason))
                return
            if message.startswith(_PANIC_END):
                if self._panic is None:  # its first line was torn
                    last = message.removeprefix(_END_MARK).removesuffix(b" ]---")
                    self._panic = _reason(last)
                self._runner.finish(Outcome(Kind.PANIC, detail=self._why))
                return
            if message.startswith(_HALTED):
                self._runner.watch_for_halt()
                return
            if not self.reached_init:
                if message.startswith(_RUNS) and message.endswith(_AS_INIT):
                    self.reached_init = True
                elif message.startswith(_WAITS_FOR_ROOT):
                    self.waits_for_root = True

    def _messages(self, line: bytes) -> list[bytes]:
        """What may be a message of printk on ``line``: if the kernel stamps what it says, what has
        no stamp is somebody quoting it."""
        *stamped, whole = texts(line)
        return stamped if self._has_stamps else [whole]

    def _find_torn_panic(self) -> str | None:
        """The panic that a vCPU has sent while others sent something else: see ``tap``."""
        found: list[str] = []

        def on_line(line: bytes) -> None:
            reasons = map(_reason, self._messages(line))
            found.extend(reason for reason in reasons if reason is not None)

        for sent in list(self._sent.values()) if len(self._sent) > 1 else ():
            LineWatch(on_line).feed(bytes(sent) + b"\n")
        return found[0] if found else None


def _reason(message: bytes) -> str | None:
    """What the kernel panicked over, if ``message`` says that it did."""
    if not message.startswith(_PANIC):
        return None
    return message.removeprefix(_PANIC).decode("ascii", "replace").lstrip(": ").strip()


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
