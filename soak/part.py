"""A part of the soak, and the work that is left of it.

A part's trials are numbered from 0, and trial N is the same whenever it is done: all that is
random in it comes from ``Trial.random``.  So a part that was stopped goes on, one that has ended
can be enlarged, and a trial that failed can be done once more alone.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soak.errors import PartError
from soak.journal import Journal, Line
from soak.processes import children

SEED = "pyvmm soak"
MOST_FAILURES = 20
"""A part gives up after so many: something is broken that more trials do not explain."""
SHOWN_EVERY_S = 10.0

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One of the parts.

    ``size`` is its usual number of ``things``, of which each trial does ``unit``.  With ``at_once``
    there is one trial, with all things at the same time, and its number is the size.  ``linux``:
    needs a KVM that runs stock kernels.  ``run`` does what is left of ``Work``.  ``summary`` makes
    the report's figures of the trials that were good.
    """

    name: str
    about: str
    things: str
    size: int
    run: Callable[[Work], None]
    linux: bool = False
    unit: int = 1
    at_once: bool = False
    summary: Callable[[Sequence[Line]], Mapping[str, object]] = lambda trials: {}

    def trials(self, size: int) -> Sequence[int]:
        """Return the numbers of the trials that ``size`` things are."""
        return [size] if self.at_once else range(-(-size // self.unit))

    def things_done(self, trials: Sequence[Line]) -> int:
        """Return how many things ``trials`` are; of crowds the largest counts."""
        if self.at_once:
            return max((line["trial"] for line in trials), default=0)
        return len(trials) * self.unit


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial: its number, its own random numbers, and an empty folder."""

    number: int
    random: random.Random
    folder: Path


@dataclass(slots=True)
class Work:
    """The trials of ``part`` up to ``size`` that ``journal`` does not have yet.

    ``folder`` is the part's, for what it makes once and keeps; ``scratch`` is gone at the end.
    ``only``: that one trial, done or not, and without a note in the journal.  ``published`` are
    trials that count as done, wherever that was.
    """

    part: Part
    journal: Journal
    size: int
    folder: Path
    scratch: Path
    say: Callable[[str], None]
    jobs: int = 2
    only: int | None = None
    published: frozenset[int] = frozenset()
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _began_s: float = field(default_factory=time.monotonic)
    _shown_s: float = 0.0
    _ended: int = 0
    failures: int = 0
    is_stopped: bool = False
    is_killed: bool = False

    def left(self) -> list[int]:
        """The numbers of the trials that are to be done, in order."""
        if self.only is not None:
            return [self.only]
        done = {line["trial"] for line in self._done()}
        return [number for number in self.part.trials(self.size) if number not in done]

    def _done(self) -> list[Line]:
        here = self.journal.trials
        elsewhere = self.published - {line["trial"] for line in here}
        return [*here, *({"trial": number} for number in elsewhere)]

    def each(self, do: Callable[[Trial], Figures]) -> None:
        """Do every trial that is left, ``jobs`` at a time.

        ``do`` returns the trial's figures, or raises TrialError or anything else if it failed.
        """
        numbers = iter(self.left())
        with ThreadPoolExecutor(self.jobs, thread_name_prefix=self.part.name) as pool:
            futures = [pool.submit(self._work, numbers, do) for _ in range(self.jobs)]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
                for future in futures:
                    future.result()
            except BaseException:
                self._wait_or_kill(futures)
                raise

    def _wait_or_kill(self, futures: Sequence[Future[None]]) -> None:
        """Wait until the trials under way have ended; once more interrupted, kill their VMs."""
        try:
            self.is_stopped = True
            self.say(f"{self.part.name}: the trials under way come to their end")
            wait(futures)
        except KeyboardInterrupt:
            self.is_killed = True
            for pid in children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _work(self, numbers: Iterator[int], do: Callable[[Trial], Figures]) -> None:
        while self.failures < MOST_FAILURES and not self.is_stopped:
            with self._lock:
                number = next(numbers, None)
            if number is None:
                return
            self.do_one(number, do)

    def do_one(self, number: int, do: Callable[[Trial], Figures]) -> None:
        """Do trial ``number`` and keep the result."""
        folder = self.scratch / str(number)
        folder.mkdir()
        began_s = time.monotonic()
        try:
            figures = do(Trial(number, random.Random(f"{SEED} {self.part.name} {number}"), folder))
        except PartError:
            remove(folder)
            raise
        except Exception as error:
            if self.is_killed:
                return
            kept = self.keep(str(number), folder, error)
            self.ended(number, began_s, {"failed": f"{error} ({kept})"})
        else:
            remove(folder)
            self.ended(number, began_s, figures)

    def ended(self, number: int, began_s: float, figures: Figures) -> None:
        """Note that trial ``number`` has ended; with ``failed`` in its figures it is a failure."""
        now_s = time.monotonic()
        if self.only is None:
            self.journal.add({"trial": number, "s": round(now_s - began_s, 3), **figures})
        with self._lock:
            self._ended += 1
            if "failed" in figures:
                self.failures += 1
                self.say(f"{self.part.name}: trial {number} FAILED: {figures['failed']}")
            if now_s - self._shown_s >= SHOWN_EVERY_S:
                self._shown_s = now_s
                self.say(self.progress(now_s))

    def leave(self, text: str) -> None:
        """Note a failure of the whole part: something was left behind, or has grown."""
        self.failures += 1
        if self.only is None:
            self.journal.add({"left": text})
        self.say(f"{self.part.name}: FAILED: {text}")

    def progress(self, now_s: float) -> str:
        """Return a line on how far the work is."""
        done = self.part.things_done(self._done())
        rate = self._ended / max(now_s - self._began_s, 1e-3)
        to_go = f", {len(self.left()) / rate / 60:.0f} min to go" if self._ended else ""
        return (
            f"{self.part.name}: {done} of {self.size} {self.part.things}, {self.failures} failed"
            f"{to_go}"
        )

    def keep(self, name: str, folder: Path, error: Exception) -> Path:
        """Keep what is left of a trial that failed; return its place."""
        kept = self.folder / f"failed-{name}"
        remove(kept)
        for path in folder.rglob("*"):
            if not (path.is_dir() or path.is_file()):
                path.unlink()  # a socket of a server that was killed: no other file system takes it
        shutil.move(folder, kept)
        (kept / "why").write_text("".join(traceback.format_exception(error)))
        return kept


def remove(folder: Path) -> None:
    """Remove ``folder`` and all in it, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)
