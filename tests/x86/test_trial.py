"""The trial guest: its bytes are its source's, and its verdicts are about what happened."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.kvm.handles import Kvm
from pyvmm.x86 import trial
from pyvmm.x86.trial import Part, try_part
from tests.support.bare import assemble
from tests.support.patience import patient


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    with Kvm() as opened:
        yield opened


def _part(code: str, expected: bytes = b"R") -> Part:
    return Part(name="part", entry=0, expected=expected, code=bytes.fromhex(code))


def test_the_code_is_what_its_source_assembles_to(tmp_path: Path) -> None:
    assert assemble("trial", trial.CODE_GPA, tmp_path) == trial.CODE


def test_the_code_fits_where_it_goes() -> None:
    assert len(trial.CODE) <= trial.IDT_GPA - trial.CODE_GPA
    assert all(part.entry < len(trial.CODE) for part in trial.PARTS)


@pytest.mark.bare
def test_a_guest_that_says_what_is_expected_passes(kvm: Kvm) -> None:
    result = try_part(kvm, _part("b052 e6f4"))
    assert (result.passed, result.detail) == (True, "")


@pytest.mark.bare
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        pytest.param("ebfe", b"R", id="spins"),
        pytest.param("f4", b"R", id="halts"),
        pytest.param("b057 e6f4 f4", b"WR", id="asks for an interrupt with interrupts off"),
    ],
)
def test_a_guest_that_never_answers_misses_its_deadline(
    kvm: Kvm, code: str, expected: bytes
) -> None:
    handler = signal.getsignal(signal.SIGALRM)
    timer, _ = signal.getitimer(signal.ITIMER_REAL)  # pytest-timeout has one running
    start = time.monotonic()
    result = try_part(kvm, _part(code, expected), deadline_s=0.2)
    assert not result.passed
    assert "no answer within 0.2 s" in result.detail
    assert time.monotonic() - start < patient(5)
    assert signal.getsignal(signal.SIGALRM) is handler
    left, interval = signal.getitimer(signal.ITIMER_REAL)
    assert interval == 0
    assert timer - 5 < left <= timer


@pytest.mark.bare
def test_a_callers_timer_goes_on_afterwards(kvm: Kvm) -> None:
    fired: list[int] = []
    handler = signal.signal(signal.SIGALRM, lambda number, _frame: fired.append(number))
    timer = signal.setitimer(signal.ITIMER_REAL, 60.0)
    try:
        assert try_part(kvm, _part("b052 e6f4")).passed
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60.0
        assert fired == []
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


@pytest.mark.bare
@pytest.mark.parametrize(
    ("code", "detail"),
    [
        ("b058 e6f4", "it answered b'X' instead of b'R'"),
        ("0f0b", "triple fault"),
        ("e460", "IoExit"),
        ("b8000000d0 8a00", "MmioExit"),  # mov $0xd0000000,%eax; mov (%rax),%al
    ],
)
def test_a_guest_that_does_something_else_fails_with_what_it_did(
    kvm: Kvm, code: str, detail: str
) -> None:
    result = try_part(kvm, _part(code))
    assert not result.passed
    assert detail in result.detail
    assert "rip 0x" in result.detail


@pytest.mark.bare
def test_no_file_descriptor_is_left_behind(kvm: Kvm) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    trial.run_trials(kvm)
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.bare
def test_running_out_of_file_descriptors_is_a_result(
    kvm: Kvm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(initial: int, flags: int) -> int:
        raise OSError(24, os.strerror(24))

    monkeypatch.setattr(os, "eventfd", refuse)
    result = try_part(kvm, trial.PARTS[0])
    assert not result.passed
    assert "Too many open files" in result.detail


@pytest.mark.bare
def test_an_interrupt_and_a_return_work_on_any_kvm_that_runs_bare_guests(kvm: Kvm) -> None:
    results = {result.name: result for result in trial.run_trials(kvm)}
    assert list(results) == ["iretq", "int3", "external interrupt", "xsave"]
    assert results["iretq"].passed
    assert results["external interrupt"].passed
