"""A real ``pyvmm run`` of our kernel on this host's KVM, which may be one that cannot run it."""

from __future__ import annotations

import os
import subprocess

import pytest

from pyvmm.run.verdict import INCOMPLETE_KVM
from tests.support.guest import command, environment
from tests.support.patience import patient

pytestmark = pytest.mark.bare


def test_fault_37_a_kvm_that_cannot_run_a_stock_kernel_is_named_before_the_timeout() -> None:
    done = subprocess.run(
        command("--timeout", "20"), stdin=subprocess.DEVNULL, capture_output=True,
        env=environment(), text=True, errors="replace", timeout=patient(120), check=False,
    )
    lines = done.stderr.splitlines()
    said = [at for at, line in enumerate(lines) if "has printed nothing for 3 s" in line]
    if done.stdout or not os.path.exists(INCOMPLETE_KVM):
        assert said == [], done.stderr
        return
    (at,) = said
    assert "this host's KVM is kvm_pvm, which cannot run a stock Linux kernel" in lines[at]
    assert "the same command behind `pyvmm lab --`" in lines[at]
    assert any(line.startswith("pyvmm: timeout") for line in lines[at:]), "before the end"
    assert done.returncode == 124
