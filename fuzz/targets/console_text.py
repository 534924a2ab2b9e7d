"""Guest output: the watch for panics and halts, lines of any length, in any pieces"""

from __future__ import annotations

from fuzz.checks import check_printable
from fuzz.source import Source
from fuzz.target import Target
from pyvmm.console.queries import QueryWatch
from pyvmm.console.typed import EscapeFilter
from pyvmm.report import escape
from pyvmm.run.console_watch import SENT_LIMIT, ConsoleWatch
from pyvmm.run.outcome import Kind, Outcome

_MOST_FACTOR = 64


class _Ended:
    """Stands for the run: what the watch wants of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def finish(self, outcome: Outcome) -> None:
        """See ``Ender.finish``."""
        self._say("finish", outcome)

    def finish_after(self, delay_s: float, outcome: Outcome) -> None:
        """See ``Ender.finish_after``."""
        assert delay_s > 0
        self._say("after", outcome)

    def watch_for_halt(self) -> None:
        """See ``Ender.watch_for_halt``."""
        self.calls.append("halt")

    def _say(self, what: str, outcome: Outcome) -> None:
        self.calls.append(f"{what} {outcome.kind} {outcome.detail}")


class ConsoleTarget(Target):
    """The watch sees the same however the guest's bytes are cut, and never raises.

    A case is: how the bytes are cut, how often the last part is repeated, the bytes.
    """

    max_bytes = 4096
    words = (
        b"Kernel panic - not syncing: ", b"---[ end Kernel panic", b"reboot: System halted",
        b"reboot: Power down", b"pyvmm-init: user space reached", b"[    1.234567] ", b"\n", b"\r",
        b"pyvmm-initramfs: cannot mount the root", b"Run /sbin/init as init process",
        b"Waiting for root device ", b"\x1b[6n", b"\x1b]0;", b" ]---", b"] [", b"-- System halted",
    )

    def seeds(self) -> list[bytes]:
        """Return a boot, a panic and a halt."""
        lines = b"".join(b"[    0.%06d] %s\n" % (number, word)
                         for number, word in enumerate(self.words))
        return [b"\x05\0\0" + lines, b"\x40\0\0" + self.words[0] + b"VFS\n", b"\0\0\0" + lines]

    def run(self, data: bytes) -> None:
        """Print ``data``."""
        source = Source(data)
        step, times = 1 + source.bits(8), source.bits(8)
        printed = source.rest()
        printed += printed[-step:] * (times % _MOST_FACTOR)
        whole, pieces = _Ended(), _Ended()
        watch, other = ConsoleWatch(whole), ConsoleWatch(pieces)
        watch.feed(printed)
        for at in range(0, len(printed), step):
            other.feed(printed[at : at + step])
        if printed:
            assert whole.calls == pieces.calls, (whole.calls, pieces.calls)
        for kind in Kind:
            watch.judge(Outcome(kind))
        sent: list[bytes] = []
        tapped = watch.tap(sent.append)
        for at in range(0, len(printed), SENT_LIMIT // 4):
            tapped(printed[at : at + SENT_LIMIT // 4])
        assert b"".join(sent) == printed
        watch.panic_reported()
        for is_utf8 in (False, True):
            queries = QueryWatch(utf8=is_utf8)
            for at in range(0, len(printed), step):
                queries.feed(printed[at : at + step])
        check_printable(f".{escape(printed.decode('latin-1'))}")
        check_printable(f".{escape(printed.decode('utf-8', 'surrogateescape'))}")
        kept = EscapeFilter(_nothing, _nothing, _nothing).feed(printed)
        assert len(kept) <= len(printed) + 1


def _nothing() -> None:
    """Nobody is told."""


def make() -> Target:
    """Return the target."""
    return ConsoleTarget()
