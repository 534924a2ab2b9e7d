"""KVM's own count of exits, from the tracepoint kvm:kvm_exit: those to user space are a few."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

_TRACEFS = Path("/sys/kernel/tracing")
_EVENT = "events/kvm/kvm_exit"
_TRIGGER = "hist:keys=exit_reason"


@contextlib.contextmanager
def counted_exits() -> Iterator[list[int]]:
    """Count the exits of every VM on this host meanwhile: the list's one number, at the end.

    Needs root, and a KVM with the tracepoint.
    """
    if not (_TRACEFS / "instances").is_dir():
        subprocess.run(["mount", "-t", "tracefs", "tracefs", str(_TRACEFS)], check=True)
    instance = _TRACEFS / "instances" / f"pyvmm-test-{os.getpid()}"
    instance.mkdir()
    try:
        trigger = instance / _EVENT / "trigger"
        trigger.write_text(_TRIGGER)
        counts: list[int] = []
        yield counts
        found = re.search(r"^ *Hits: (\d+)$", (instance / _EVENT / "hist").read_text(), re.M)
        assert found is not None
        counts.append(int(found[1]))
        trigger.write_text(f"!{_TRIGGER}")
    finally:
        instance.rmdir()
