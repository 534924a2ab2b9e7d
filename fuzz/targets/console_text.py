"""Guest output: the watch for panics and halts, lines of any length, in any pieces"""

from __future__ import annotations

from collections.abc import Callable

from fuzz.checks import check_printable
from fuzz.source import Source
from fuzz.target import Target
from pyvmm.console.queries import QueryWatch
from pyvmm.console.typed import EscapeFilter
from pyvmm.console.watch import SENT_LIMIT, ConsoleWatch, Finding
from pyvmm.report import escape
from pyvmm.run.io_loop import Deadline
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.run.verdict import Verdict

_MOST_FACTOR = 64


class _Run:
    """Stands for the run: what the verdict asks of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.verdict = Verdict(self, is_linux=True)
        self.watch = ConsoleWatch(self._hear)

    def _hear(self, finding: Finding) -> None:
        self.calls.append(f"{finding.sign}: {finding.text}")
        self.verdict.hear(finding)

    def finish(self, outcome: Outcome) -> None:
        """See ``Run.finish``."""
        self.calls.append(f"finish {outcome}")

    def finish_after(self, delay_s: float, outcome: Outcome) -> Deadline:
        """See ``Run.finish_after``."""
        assert delay_s > 0
        self.calls.append(f"after {outcome}")
        return Deadline(lambda: None, lambda _: None)

    def call_after(self, delay_s: float, callback: Callable[[], None]) -> None:
        """See ``Run.call_after``."""

    def watch_for_halt(self) -> None:
        """See ``Run.watch_for_halt``."""
        self.calls.append("halt")


class ConsoleTarget(Target):
    """The watch finds the same however the guest's bytes are cut; no verdict raises.

    A case is: how the bytes are cut, how often the last part is repeated, the bytes.
    """

    max_bytes = 4096
    words = (
        b"Kernel panic - not syncing: ", b"---[ end Kernel panic", b"reboot: System halted",
        b"reboot: Power down", b"pyvmm-init: user space reached", b"[    1.234567] ", b"\n", b"\r",
        b"pyvmm-initramfs: cannot mount the root", b"Run /sbin/init as init process",
        b"reboot: Restarting system", b"PANIC: early exception ",
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
        whole, pieces = _Run(), _Run()
        whole.watch.feed(printed)
        for at in range(0, len(printed), step):
            pieces.watch.feed(printed[at : at + step])
        if printed:
            assert whole.calls == pieces.calls, (whole.calls, pieces.calls)
        sent: list[bytes] = []
        tapped = whole.watch.tap(sent.append)
        for at in range(0, len(printed), SENT_LIMIT // 4):
            tapped(printed[at : at + SENT_LIMIT // 4])
        assert b"".join(sent) == printed
        whole.watch.end()
        for is_reported in (False, True):
            if is_reported:
                whole.verdict.panic_reported()
            for kind in Kind:
                check_printable(f".{escape(str(whole.verdict.judge(Outcome(kind))))}")
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
