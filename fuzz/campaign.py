"""Fuzzing several targets in some seconds altogether, each in a process of its own."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fuzz.watch import Finding
from fuzz.worker import CASE_FILE, SUMMARY_FILE, save

GRACE_S = 60.0
"""How much longer than its time a process may take, for the case under way, before it is stuck."""
LEAST_S = 1.0
GUIDED_FROM_S = 20.0
"""A target's share of the time from which atheris is used: it needs seconds to begin."""
_COVERAGE = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)")
_TAIL_BYTES = 20_000


@dataclass
class Result:
    """The result of one target."""

    name: str
    runs: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    coverage: str = ""
    new_cases: int = 0
    found: list[str] = field(default_factory=list)

    def row(self) -> list[str]:
        """Return the cells of its row in the table."""
        rate = self.runs / self.seconds if self.seconds else 0.0
        return [self.name, str(self.runs), f"{rate:.0f}", f"{self.slowest_s * 1000:.0f}",
                self.coverage or "-", str(self.new_cases), str(len(self.found))]


HEADINGS = ("target", "runs", "runs/s", "slowest ms", "branches", "new cases", "found")


class Campaign:
    """Fuzzes the targets ``names`` in ``seconds`` altogether, ``jobs`` of them at a time."""

    def __init__(
        self, names: Sequence[str], out: Path, *, seconds: float, seed: int, jobs: int,
        runs: int | None, plain: bool,
    ) -> None:
        self._waiting = list(names)
        self._out = out
        self._seed = seed
        self._jobs = min(jobs, len(names))
        self._share_s = max(LEAST_S, seconds * self._jobs / len(names))
        self._runs = runs
        self._plain = plain
        self._running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        self._cases_before: dict[str, int] = {}

    def run(self) -> list[Result]:
        """Fuzz; return what came of each target.  It prints a line as each one ends."""
        results = []
        try:
            while self._waiting or self._running:
                while self._waiting and len(self._running) < self._jobs:
                    self._start(self._waiting.pop(0))
                time.sleep(0.05)
                for name, (process, until_s) in list(self._running.items()):
                    if process.poll() is None and time.monotonic() > until_s:
                        process.send_signal(signal.SIGABRT)  # its threads' tracebacks
                        until_s = time.monotonic() + GRACE_S
                        self._wait(process)
                    if process.poll() is not None:
                        del self._running[name]
                        results.append(self._result(name, process.returncode))
                        print("  ".join(results[-1].row()), flush=True)
        finally:
            for process, _ in self._running.values():
                process.kill()
                process.wait()
        return sorted(results, key=lambda result: result.name)

    def _start(self, name: str) -> None:
        folder = self._out / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SUMMARY_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder / "seeds", ignore_errors=True)
        self._cases_before[name] = _count(folder / "corpus")
        command = [sys.executable, "-m", "fuzz.worker", name, str(folder),
                   "--seconds", str(self._share_s), "--seed", str(self._seed)]
        if self._runs is not None:
            command += ["--runs", str(self._runs)]
        if self._plain or (self._runs is None and self._share_s < GUIDED_FROM_S):
            command.append("--plain")
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        self._running[name] = (process, time.monotonic() + self._share_s + GRACE_S)

    @staticmethod
    def _wait(process: subprocess.Popen[bytes]) -> None:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _result(self, name: str, status: int) -> Result:
        folder = self._out / name
        result = Result(name)
        log = (folder / "log").read_text(errors="replace")
        if measured := _COVERAGE.findall(log):
            result.coverage = measured[-1][0]
        result.new_cases = _count(folder / "corpus") - self._cases_before[name]
        try:
            summary = json.loads((folder / SUMMARY_FILE).read_text())
        except FileNotFoundError:
            tail = log[-_TAIL_BYTES:]
            finding = Finding("died", f"{tail}\nthe process ended with status {status}\n")
            result.found = [str(save(folder, name, finding, _last_case(folder)))]
            return result
        result.runs, result.seconds = summary["runs"], summary["seconds"]
        result.slowest_s, result.found = summary["slowest_s"], summary["found"]
        for path in result.found:
            print(Path(path).with_suffix(".txt").read_text(), flush=True)
        return result


def table(results: Sequence[Result]) -> str:
    """Return the results as a table."""
    rows = [list(HEADINGS), *(result.row() for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]),
                   *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def _count(folder: Path) -> int:
    return sum(1 for _ in folder.glob("*")) if folder.is_dir() else 0


def _last_case(folder: Path) -> bytes:
    """The case that was under way."""
    try:
        data = (folder / CASE_FILE).read_bytes()
    except FileNotFoundError:
        return b""
    length = int.from_bytes(data[:4], "little")
    return data[4 : 4 + length]
