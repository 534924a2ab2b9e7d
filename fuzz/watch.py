"""Runs one case and says what is wrong with it: an exception, no end, too much memory."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import time
import traceback
from collections.abc import Callable
from types import FrameType

from fuzz.target import Target

WAIT_FACTOR = 10
_WARM_UP = 20
"""Cases after which the process has its size."""


class OverTimeError(BaseException):
    """The case has had its time; no handler of ``Exception`` may keep it."""


class Finding:
    """A fault that a case showed: ``kind`` tells findings apart, ``text`` is for people."""

    def __init__(self, kind: str, text: str) -> None:
        self.kind = kind
        self.text = text

    @property
    def digest(self) -> str:
        """A short name that the same fault always has."""
        return hashlib.sha1(self.kind.encode()).hexdigest()[:10]


class Watch:
    """Calls ``target.run`` with the target's limits; the main thread's, which gets the signals."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._cases = 0
        self._base_bytes = 0
        self._status_fd = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
        self.slowest_s = 0.0
        """The most CPU time a case has had."""
        signal.signal(signal.SIGPROF, _over_time)
        signal.signal(signal.SIGALRM, _over_time)

    def run(self, case: bytes) -> Finding | None:
        """Run ``case``; None if nothing is wrong with it."""
        limit_s = self._target.limit_s
        begun_s = time.process_time()
        try:
            # Of the CPU, so a busy machine has no findings; and of the clock, for what sleeps.
            signal.setitimer(signal.ITIMER_PROF, limit_s)
            signal.setitimer(signal.ITIMER_REAL, limit_s * WAIT_FACTOR)
            try:
                self._target.run(case)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return _describe(error, limit_s)
        self.slowest_s = max(self.slowest_s, time.process_time() - begun_s)
        return self._check_memory()

    def _check_memory(self) -> Finding | None:
        # Not getrusage: its peak is also that of the process that started this one.
        peak = re.search(rb"VmHWM:\s+(\d+) kB", os.pread(self._status_fd, 8192, 0))
        assert peak is not None
        peak_bytes = int(peak[1]) << 10
        self._cases += 1
        if self._cases <= _WARM_UP:
            self._base_bytes = peak_bytes
        grown = peak_bytes - self._base_bytes
        if grown <= self._target.memory_bytes:
            return None
        self._base_bytes = peak_bytes
        return Finding("memory", f"the process grew by {grown >> 20} MiB, to {peak_bytes >> 20}; "
                                 f"the limit is {self._target.memory_bytes >> 20}\n")


def minimise(run: Callable[[bytes], Finding | None], case: bytes, *, seconds: float) -> bytes:
    """Return the shortest case found in ``seconds`` that does the same wrong as ``case``."""
    wanted = run(case)
    deadline_s = time.monotonic() + seconds

    def is_same(smaller: bytes) -> bool:
        found = run(smaller)
        return found is not None and wanted is not None and found.kind == wanted.kind

    piece = len(case) // 2
    while piece and wanted is not None:
        at = 0
        while at < len(case) and time.monotonic() < deadline_s:
            smaller = case[:at] + case[at + piece :]
            if is_same(smaller):
                case = smaller
            else:
                at += piece
        piece //= 2
    for at in range(len(case)):  # what means nothing becomes 0
        if time.monotonic() < deadline_s and case[at]:
            simpler = case[:at] + b"\0" + case[at + 1 :]
            if is_same(simpler):
                case = simpler
    return case


def _over_time(number: int, _frame: FrameType | None) -> None:
    raise OverTimeError("of the CPU" if number == signal.SIGPROF else "of the clock")


def _describe(error: BaseException, limit_s: float) -> Finding:
    text = "".join(traceback.format_exception(error))
    if isinstance(error, OverTimeError):
        seconds = limit_s * (1 if "CPU" in str(error) else WAIT_FACTOR)
        return Finding("over time", f"{text}\nno end after {seconds:g} s {error}\n")
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{frame.filename}:{frame.name}" for frame in frames[-3:]]
    return Finding(f"{type(error).__name__} {' '.join(places)}", text)
