"""The live table of a matrix on a terminal, drawn by rich: the extra ``pyvmm[rich]``."""

from __future__ import annotations

import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pyvmm.matrix.progress import result_line
from pyvmm.matrix.results import RunResult
from pyvmm.report import escape

_MOST_ROWS = 16


class LiveProgress:
    """A bar, the runs under way with their phases, and above them a line for each that ended."""

    refresh_s = 0.25

    def __init__(self, count: int) -> None:
        self._count = count
        self._done = 0
        self._failed = 0
        self._began_s = time.monotonic()
        self._running: dict[str, tuple[float, str, str]] = {}
        self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
        self._live.start()

    def started(self, name: str, where: str) -> None:
        """See ``Progress``."""
        self._running[name] = (time.monotonic(), "start", where)
        self.refresh()

    def phase_began(self, name: str, phase: str) -> None:
        """See ``Progress``."""
        if name in self._running:
            began_s, _, where = self._running[name]
            self._running[name] = (began_s, phase, where)
            self.refresh()

    def finished(self, result: RunResult) -> None:
        """See ``Progress``."""
        self._running.pop(result.name, None)
        self._done += 1
        self._failed += not result.is_ok
        line = escape(result_line(result, self._done, self._count))
        self._live.console.print(Text(line, style="green" if result.is_ok else "bold red"))
        self.refresh()

    def note(self, line: str) -> None:
        """See ``Progress``."""
        self._live.console.print(Text(f"pyvmm: {escape(line)}"))

    def refresh(self) -> None:
        """See ``Progress``."""
        now_s = time.monotonic()
        table = Table.grid(padding=(0, 2))
        for name, (began_s, phase, where) in list(self._running.items())[:_MOST_ROWS]:
            table.add_row(
                Text(escape(name), overflow="ellipsis", no_wrap=True), Text(escape(phase), "cyan"),
                Text(f"{now_s - began_s:.0f} s"), Text(escape(where), "dim"),
            )
        failed = f", {self._failed} failed" if self._failed else ""
        head = Table.grid(padding=(0, 2))
        head.add_row(
            ProgressBar(total=self._count, completed=self._done, width=30),
            Text(f"{self._done}/{self._count}{failed}, {now_s - self._began_s:.0f} s"),
        )
        self._live.update(Group(head, table), refresh=True)

    def close(self) -> None:
        """See ``Progress``."""
        self._live.stop()
