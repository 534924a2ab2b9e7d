"""When a run takes its snapshot, and what becomes of the run: bare guests, a stand-in for taking.

tests/vm/test_bare_restore.py has whole command lines.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.cli.warm import WarmPlan, WarmSnapshot
from pyvmm.config import RunConfig
from pyvmm.console.line_match import line_pattern
from pyvmm.errors import SnapshotError
from pyvmm.machine import Machine, build
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.x86 import layout
from tests.support.patience import patient
from tests.support.tiny_guests import REPORT_7, SPIN, out, prints, waits, write_guest

pytestmark = pytest.mark.bare

WARM = out(layout.WARM_PORT, 1)
WAIT_S = 20.0
LONG = 200_000
"""Turns that take a guest longer than a prompt takes to be shown."""


class Taking:
    """A stand-in for ``capture.take``: quiesces, looks, and lets the guest go on."""

    def __init__(self, error: Exception | None = None, *, hold_s: float = 0.0) -> None:
        self.calls: list[tuple[str, bool]] = []
        self.saved: list[dict[str, object]] = []
        self.outputs: list[bytes] = []
        self.threads: list[threading.Thread] = []
        self._error = error
        self._hold_s = hold_s

    def __call__(self, machine: Machine, directory: str, *, live: bool) -> Taking:
        self.calls.append((directory, live))
        self.threads.append(threading.current_thread())
        if self._error is not None:
            raise self._error
        was_paused = machine.is_paused
        if not machine.quiesce(patient(WAIT_S)):
            raise SnapshotError(directory, "the run has ended")
        self.saved.append(machine.save())
        time.sleep(self._hold_s)
        os.mkdir(directory)
        Path(directory, "ram").write_bytes(bytes(3 << 20))
        if not was_paused:
            machine.resume()
        return self

    def close(self) -> None:
        """Nothing is held."""


class Rig:
    """A machine of ``code``, and the snapshot of its run."""

    def __init__(
        self, folder: Path, *code: bytes, take: Callable[..., Taking], pattern: str = "",
        exits: bool = False, live: bool = False,
    ) -> None:
        self.lines: list[str] = []
        self.directory = str(folder / "warm")
        self.console = folder / "console"
        config = RunConfig(
            kernel=write_guest(folder / "guest.elf", *code), console=str(self.console),
            memory_bytes=16 << 20, timeout_s=patient(WAIT_S),
        )
        self.machine = build(config, report=self.lines.append)
        self.warm = WarmSnapshot(
            WarmPlan(
                directory=self.directory, exits=exits, live=live,
                pattern=line_pattern("--snapshot-at", pattern) if pattern else None,
            ),
            self.machine, self.lines.append, take,
        )
        self.warm.plug()

    def run(self) -> tuple[Outcome, int]:
        """Run to the end; the outcome, and the exit status with the snapshot's say."""
        with self.machine as machine:
            outcome = machine.run()
            return outcome, self.warm.end(outcome)


@pytest.fixture
def take() -> Taking:
    return Taking()


def test_the_guest_says_when_and_goes_on(tmp_path: Path, take: Taking) -> None:
    rig = Rig(tmp_path, prints(b"before\n"), WARM, prints(b"behind\n"), REPORT_7, take=take)
    outcome, status = rig.run()
    assert outcome == Outcome(Kind.GUEST_STATUS, 7)
    assert status == 7
    assert take.calls == [(rig.directory, False)]
    assert rig.console.read_bytes() == b"before\nbehind\n"
    (line,) = rig.lines
    assert re.fullmatch(
        rf"snapshot {re.escape(rig.directory)}: 3072 KiB in \d+ ms; pyvmm restore "
        rf"{re.escape(rig.directory)} goes on from there", line
    )


def test_not_one_instruction_runs_between_the_port_and_the_snapshot(
    tmp_path: Path, take: Taking
) -> None:
    code = (WARM, b"\xb8\x2a\x00\x00\x00", SPIN)  # mov eax, 42
    rig = Rig(tmp_path, *code, take=take, exits=True)
    outcome, status = rig.run()
    assert (outcome.kind, status) == (Kind.STOPPED, 0)
    (state,) = take.saved
    assert isinstance(state["vcpus"], dict)
    registers = state["vcpus"]["vcpu0"]["regs"]
    (entry,) = [
        int.from_bytes(registers[at : at + 8], "little") for at in (8 * 16,)  # rip, in kvm_regs
    ]
    whole = (tmp_path / "guest.elf").read_bytes()
    start = rig.machine.kernel.entry
    assert whole[whole.index(WARM) - 7 :].startswith(b"\x48\x8d\x25")
    assert entry == start + 7 + len(WARM)


def test_the_port_counts_once(tmp_path: Path, take: Taking) -> None:
    rig = Rig(tmp_path, *[WARM] * 50, REPORT_7, take=take)
    assert rig.run()[1] == 7
    assert len(take.calls) == 1
    assert len(rig.lines) == 1


@pytest.mark.parametrize("live", [False, True])
def test_a_line_of_the_console_says_when(tmp_path: Path, take: Taking, live: bool) -> None:
    rig = Rig(
        tmp_path, prints(b"vm login: "), waits(LONG), prints(b"login: "), REPORT_7, take=take,
        pattern="login: $", live=live,
    )
    assert rig.run()[1] == 7
    assert take.calls == [(rig.directory, live)]
    assert len(rig.lines) == 1


def test_the_run_ends_once_the_snapshot_is_there(tmp_path: Path, take: Taking) -> None:
    rig = Rig(tmp_path, WARM, prints(b"never\n"), SPIN, take=take, exits=True)
    outcome, status = rig.run()
    assert (outcome.kind, status) == (Kind.STOPPED, 0)
    assert rig.console.read_bytes() == b""


@pytest.mark.parametrize("exits", [False, True])
@pytest.mark.parametrize("error", [
    SnapshotError("warm", "no"), OSError(28, "No space left on device"), RuntimeError("no thread"),
    TypeError("a defect"),
])
def test_a_snapshot_that_fails_is_a_line(tmp_path: Path, error: Exception, exits: bool) -> None:
    take = Taking(error)
    end = (SPIN,) if exits else (REPORT_7,)
    rig = Rig(tmp_path, WARM, *end, take=take, exits=exits)
    assert rig.run()[1] == (125 if exits else 7)
    (line,) = rig.lines
    assert line.startswith(f"snapshot {rig.directory}: was not taken: ")
    assert str(error) in line
    assert line.endswith("; the guest goes on") != exits


def test_a_person_tries_again_after_a_failure_but_the_guest_may_not(tmp_path: Path) -> None:
    take = Taking(SnapshotError("x", "no room"))
    rig = Rig(tmp_path, WARM, WARM, prints(b"now"), SPIN, take=take)
    shown: list[str] = []
    rig.machine.output.say = shown.append  # type: ignore[method-assign, assignment]
    with rig.machine as machine:
        machine.start()
        wait_until(lambda: len(rig.lines) == 1)
        take._error = None
        rig.warm.on_key()
        wait_until(lambda: len(rig.lines) == 2)
        assert "pyvmm restore" in rig.lines[1]
        wait_until(lambda: not rig.warm.is_taking)
        rig.warm.on_key()
        outcome = machine.stop(Outcome(Kind.QUIT))
        assert outcome is not None
        assert rig.warm.end(outcome) == 0
    assert shown == [f"\nsnapshot {rig.directory}: is taken already\n"]
    assert len(take.calls) == 2


def test_a_guest_that_was_never_warm(tmp_path: Path, take: Taking) -> None:
    rig = Rig(tmp_path, prints(b"login\n"), REPORT_7, take=take, pattern="nothing")
    assert rig.run()[1] == 7
    (line,) = rig.lines
    assert "none was taken" in line
    assert not take.calls


def test_without_a_snapshot_there_is_no_success(tmp_path: Path, take: Taking) -> None:
    rig = Rig(tmp_path, b"\x31\xc0\xe6\xf4\xf4", take=take, exits=True)
    outcome, status = rig.run()
    assert outcome.exit_status == 0
    assert status == 125


def test_a_run_that_ends_meanwhile_waits_for_the_snapshot(tmp_path: Path) -> None:
    take = Taking(hold_s=0.3)
    rig = Rig(tmp_path, WARM, SPIN, take=take)
    with rig.machine as machine:
        machine.start()
        wait_until(lambda: bool(take.saved))
        outcome = machine.stop(Outcome(Kind.QUIT))
        assert outcome is not None
        assert rig.warm.end(outcome) == 0
    assert not rig.warm.is_taking
    assert "pyvmm restore" in rig.lines[0]


def test_it_is_never_taken_in_a_thread_of_the_run(tmp_path: Path, take: Taking) -> None:
    rig = Rig(tmp_path, WARM, REPORT_7, take=take)
    rig.run()
    (thread,) = take.threads
    assert thread.name == "snapshot"
    assert not thread.is_alive()


def wait_until(condition: Callable[[], bool]) -> None:
    until_s = time.monotonic() + patient(WAIT_S)
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.002)
