"""Reads the guest's console line by line, and tells what the lines mean.

The watch knows lines, not endings: ``run/verdict.py`` decides what a finding makes of a run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from pyvmm.console.output import LineWatch
from pyvmm.report import escape
from pyvmm.startup.types import Record, StrEnum

SENT_LIMIT = 32 * 1024
"""The most bytes kept of one vCPU's output; at least the last half of so many is kept."""


class Sign(StrEnum):
    """The meaning of a line of the console."""

    FIRST_OUTPUT = "the guest has printed something"
    GAVE_UP = "an early stage of the boot gave up"
    WAITS_FOR_ROOT = "the kernel waits for its root device"
    NO_ROOT = "our initramfs cannot mount the root"
    INIT_STARTS = "the kernel starts an init"
    USER_SPACE = "our init runs"
    PANIC = "the kernel panics"
    PANIC_ENDS = "a panic has printed all it has to say"
    RESTARTS = "user space has the kernel restart"
    HALTS = "user space has the kernel halt, or power off"


class Finding(Record, kw_only=False):
    """One thing the console said; ``text`` is the reason that the line gives, "" if none."""

    sign: Sign
    text: str = ""


_PANIC = b"Kernel panic - not syncing"
_END_MARK = b"---[ end "
_PANIC_END = _END_MARK + b"Kernel panic"
# kernel/reboot.c.  Emergencies all: "quiet" hides none of them.
_RESTARTS = b"reboot: Restarting system"
_HALTS = (b"reboot: System halted", b"reboot: Power down")
# guest/init and linux/stock_init.sh.
_USER_SPACE = b"pyvmm-init: user space reached"
_INITRAMFS = b"pyvmm-initramfs: "
_CANNOT_MOUNT = _INITRAMFS + b"cannot mount the root"
# init/main.c and init/do_mounts.c.  "quiet" hides both.
_RUNS, _AS_INIT = b"Run ", b" as init process"
_WAITS_FOR_ROOT = b"Waiting for root device "
_EARLY_HALT = b"-- System halted"
"""The end of ``error()`` in arch/x86/boot/compressed/error.c, below the reason; it ends no line."""
_EARLY_ENDS = (
    b"PANIC: early exception ",  # arch/x86/mm/extable.c
    b"No setup signature found",  # arch/x86/boot/header.S
    b"Unable to boot - please use a kernel",  # arch/x86/boot/main.c
    b"A20 gate not responding, unable to boot",  # arch/x86/boot/pm.c
)
"""Last lines of a stage before printk.  The CPU then halts for good."""


class ConsoleWatch:
    """Calls ``on_finding`` for each finding on the guest's console, in order.

    ``feed`` and ``end`` belong to one thread.
    """

    def __init__(self, on_finding: Callable[[Finding], None]) -> None:
        self._on_finding = on_finding
        self._lines = LineWatch(self._on_line)
        self._has_printed = False
        self._has_stamps = False
        self._has_panicked = False
        self._last_words = b""
        """The last line that was not blank."""
        self._has_told_unfinished = False
        self._sent: dict[int, bytearray] = {}

    def save(self) -> dict[str, object]:
        """Return how far it has read (docs/architecture.md, "State")."""
        return {
            "has_printed": self._has_printed, "has_stamps": self._has_stamps,
            "has_panicked": self._has_panicked, "last_words": self._last_words,
            "has_told_unfinished": self._has_told_unfinished,
            "unfinished": self._lines.unfinished,
        }

    def restore(self, data: object) -> None:
        """Take what ``save`` returned; StateError.  No vCPU's own bytes are known then."""
        from pyvmm.state import Fields  # not on the boot path

        fields = Fields("console watch", data)
        signs = {
            name: fields.boolean(name) for name in
            ("has_printed", "has_stamps", "has_panicked", "has_told_unfinished")
        }
        last_words = fields.octets("last_words", 0, LineWatch.LIMIT)
        unfinished = fields.octets("unfinished", 0, LineWatch.LIMIT)
        fields.end()
        self._has_printed, self._has_stamps = signs["has_printed"], signs["has_stamps"]
        self._has_panicked = signs["has_panicked"]
        self._has_told_unfinished = signs["has_told_unfinished"]
        self._last_words, self._lines.unfinished = last_words, unfinished
        self._sent.clear()

    @property
    def unfinished(self) -> bytes:
        """The start of the line that has no end yet."""
        return self._lines.unfinished

    def feed(self, data: bytes) -> None:
        """Take the next bytes of console output."""
        if not self._has_printed:
            self._has_printed = True
            self._on_finding(Finding(Sign.FIRST_OUTPUT))
        self._lines.feed(data)
        # An early stage ends in the middle of a line, so nobody ever sees that line's end.
        if not self._has_told_unfinished and _is_early_halt(self._lines.unfinished):
            self._has_told_unfinished = True
            self._gave_up(self._last_words)

    def end(self) -> None:
        """Take an unfinished line as finished, and find a panic that other vCPUs wrote into.

        Call it once all threads of the run are done.
        """
        if self._lines.unfinished:
            self._lines.feed(b"\n")
        if not self._has_panicked and len(self._sent) > 1:
            self._find_torn_panic()

    def tap(self, transmit: Callable[[bytes], None]) -> Callable[[bytes], None]:
        """Return ``transmit`` for a UART with several vCPUs; call it in the sender's thread.

        A panic does not wait until other CPUs have left the UART (Linux's ``oops_in_progress``):
        what they send to a terminal gets between the bytes of the panic's line.  Each vCPU's own
        bytes, kept apart, still form whole lines.
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

    def _on_line(self, line: bytes) -> None:
        was_told, self._has_told_unfinished = self._has_told_unfinished, False
        self._has_stamps = self._has_stamps or len(texts(line)) > 1
        if _is_early_halt(line):
            if not was_told:
                self._gave_up(self._last_words)
        elif line.startswith(_EARLY_ENDS):
            self._gave_up(line)
        elif line.startswith(_USER_SPACE):
            self._on_finding(Finding(Sign.USER_SPACE))
        elif line.startswith(_CANNOT_MOUNT):
            self._on_finding(Finding(Sign.NO_ROOT, _text(line.removeprefix(_INITRAMFS))))
        else:
            found = next(filter(None, map(_meaning, self._messages(line))), None)
            if found is not None:
                self._has_panicked = self._has_panicked or found.sign is Sign.PANIC
                self._on_finding(found)
        if words := line.strip():
            self._last_words = words

    def _gave_up(self, reason: bytes) -> None:
        self._on_finding(Finding(Sign.GAVE_UP, _text(reason)))

    def _messages(self, line: bytes) -> list[bytes]:
        """Return what may be a message of printk on ``line``.

        Once the kernel prints time stamps, a line without one is user space quoting the kernel.
        """
        *stamped, whole = texts(line)
        return stamped if self._has_stamps else [whole]

    def _find_torn_panic(self) -> None:
        """Look for a panic in each vCPU's own bytes: see ``tap``."""
        found: list[Finding] = []

        def on_line(line: bytes) -> None:
            meanings = map(_meaning, self._messages(line))
            found.extend(one for one in meanings if one is not None and one.sign is Sign.PANIC)

        for sent in list(self._sent.values()):
            LineWatch(on_line).feed(bytes(sent) + b"\n")
        if found:
            self._on_finding(found[0])


def _meaning(message: bytes) -> Finding | None:
    """Return what ``message`` of printk means for the run; None if nothing."""
    if message.startswith(_PANIC):
        return Finding(Sign.PANIC, _panic_reason(message))
    if message.startswith(_PANIC_END):
        last = message.removeprefix(_END_MARK).removesuffix(b" ]---")
        return Finding(Sign.PANIC_ENDS, _panic_reason(last))
    if message.startswith(_HALTS):
        return Finding(Sign.HALTS)
    if message.startswith(_RESTARTS):
        return Finding(Sign.RESTARTS)
    if message.startswith(_RUNS) and message.endswith(_AS_INIT):
        return Finding(Sign.INIT_STARTS)
    if message.startswith(_WAITS_FOR_ROOT):
        return Finding(Sign.WAITS_FOR_ROOT)
    return None


def _panic_reason(message: bytes) -> str:
    return _text(message.removeprefix(_PANIC).lstrip(b": "))


def _text(line: bytes) -> str:
    # Escaped here, because a script may print an outcome as it is.
    return escape(line.decode("ascii", "replace").strip())


def _is_early_halt(line: bytes) -> bool:
    return line.lstrip(b" ").startswith(_EARLY_HALT)


def texts(line: bytes) -> list[bytes]:
    """Return what may be a message of printk on ``line``: behind each time stamp, the last one
    first, and then the whole line.

    A stamp is ``[   12.345678] ``, wherever it begins: user space may have left a line unfinished.
    With CONFIG_PRINTK_CALLER it is ``[   12.345678][    T1] ``, or ``C0`` for a CPU.
    """
    found = []
    end = len(line)
    while (end := line.rfind(b"] ", 0, end)) >= 0:
        before, bracket, stamp = line[:end].rpartition(b"[")
        if before[-1:] == b"]" and stamp.lstrip(b" ")[:1] in (b"T", b"C"):
            _, bracket, stamp = before[:-1].rpartition(b"[")
        seconds, point, fraction = stamp.lstrip(b" ").partition(b".")
        if bracket and seconds.isdigit() and point and fraction.isdigit():
            found.append(line[end + 2 :])
    return [*found, line]
