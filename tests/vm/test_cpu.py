"""What Linux finds of its CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cpu_needs import contradictions
from tests.support.guest import TOOLS, boot, run_in_guest

pytestmark = pytest.mark.kvm


def flags(*options: str) -> set[str]:
    """The CPU's features, as the guest's /proc/cpuinfo has them."""
    run = boot("--disk", f"{TOOLS},ro", *options,
               append=run_in_guest("grep -m1 ^flags /proc/cpuinfo"))
    assert run.status == 0, run.console + run.messages
    return set(run.lines("flags")[0].partition(": ")[2].split())


def test_fault_29_nested_virtualization_is_there_on_request_only() -> None:
    host = set(next(
        line for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        if line.startswith("flags")
    ).split())
    nested = "svm" if "svm" in host else "vmx"
    by_default, on_request = flags(), flags("--cpu", f"host,+{nested}")
    assert on_request - by_default >= {nested}
    assert not by_default & {"svm", "vmx", "npt", "vgif"}
    assert contradictions(by_default) == contradictions(on_request) == []
