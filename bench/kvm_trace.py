"""KVM's own account of exits to user space: the tracepoint kvm:kvm_userspace_exit, as a histogram.

Every return of KVM_RUN counts, by its reason, also those a signal caused.  Nothing but the counts
leaves the kernel, so the VMM is hardly slowed.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections import Counter
from pathlib import Path
from types import TracebackType

from bench.figures import BenchError

TRACEFS = Path("/sys/kernel/tracing")
EVENT = "events/kvm/kvm_userspace_exit"
TRIGGER = "hist:keys=reason,errno"
SETTLE_S = 0.5
"""After a mark on the console: the rest of its exits."""
_LINE = re.compile(r"\{ reason: +(\d+), errno: +(\d+) *\} hitcount: +(\d+)")
_REASONS = {"2": "io", "5": "hlt", "6": "mmio", "8": "shutdown", "17": "internal error"}


class UserspaceExits:
    """Counts every VM's exits on this host while its context lasts; needs root and tracefs."""

    def __init__(self) -> None:
        self._instance = TRACEFS / "instances" / f"pyvmm-bench-{os.getpid()}"

    def __enter__(self) -> UserspaceExits:
        if not (TRACEFS / "instances").is_dir():
            subprocess.run(
                ["mount", "-t", "tracefs", "tracefs", str(TRACEFS)], capture_output=True,
                check=False,
            )
        try:
            self._instance.mkdir()
            (self._instance / EVENT / "trigger").write_text(TRIGGER)
        except OSError as error:
            self._remove()
            raise BenchError(f"no tracepoint kvm_userspace_exit here: {error}") from error
        return self

    def read(self) -> Counter[str]:
        """All exits so far by reason; ``interrupted`` are those that a signal caused."""
        return parse_histogram((self._instance / EVENT / "hist").read_text())

    def settle(self) -> None:
        """Wait until a guest that has just said something, and now sleeps, is quiet."""
        time.sleep(SETTLE_S)

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            (self._instance / EVENT / "trigger").write_text(f"!{TRIGGER}")
        with contextlib.suppress(OSError):
            self._instance.rmdir()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._remove()


def parse_histogram(text: str) -> Counter[str]:
    """Counts by reason from a ``hist`` file."""
    counts: Counter[str] = Counter()
    for reason, code, hits in _LINE.findall(text):
        # An errno is negative, and shown as 64 bits without a sign; the reason is then an old one.
        name = _REASONS.get(reason, f"reason {reason}") if code == "0" else "interrupted"
        counts[name] += int(hits)
    return counts


def difference(after: Counter[str], before: Counter[str]) -> Counter[str]:
    """What came between."""
    return Counter({name: count - before[name] for name, count in after.items()})
