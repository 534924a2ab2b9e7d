"""``Machine.checkpoint`` and ``Machine.rewind`` from a script: bare guests on any /dev/kvm."""

from __future__ import annotations

import errno
import threading
import time

import pytest

import pyvmm
from pyvmm.errors import SnapshotError
from tests.support.patience import patient
from tests.support.rewound import WAIT_S, MakeMachine, ask_then, echo, machines_made
from tests.support.tiny_guests import (
    HALT,
    REBOOT,
    REPORT_7,
    SPIN,
    TRIPLE_FAULT,
    echoes,
    out,
    prints,
)

pytestmark = pytest.mark.bare

POWER_OFF = out(0x600, 0x34)  # sleep control: S5, and go


make = pytest.fixture(machines_made)


def has_panicked(machine: pyvmm.Machine) -> bool:
    """True if the guest is known to have panicked."""
    return machine.evidence.has_panicked


def test_a_guest_goes_back_and_goes_on(make: MakeMachine) -> None:
    machine = make(echoes())
    machine.start()
    echo(machine, "one ")
    assert list(machine.checkpoints) == []
    first = machine.checkpoint()
    echo(machine, "two ")
    second = machine.checkpoint()
    assert list(machine.checkpoints) == [first, second]
    echo(machine, "three ")
    machine.rewind()
    assert list(machine.checkpoints) == [first, second]
    echo(machine, "four ")
    machine.rewind(first)
    assert list(machine.checkpoints) == [first]
    echo(machine, "five")
    assert machine.console.text == "one two three four five"
    assert machine.stop() == pyvmm.Outcome(pyvmm.Kind.STOPPED)


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        (TRIPLE_FAULT, pyvmm.Kind.TRIPLE_FAULT),
        (REPORT_7, pyvmm.Kind.GUEST_STATUS),
        (REBOOT, pyvmm.Kind.RESET),
        (POWER_OFF, pyvmm.Kind.POWER_OFF),
        (HALT, pyvmm.Kind.SHUTDOWN),
    ],
    ids=["triple fault", "status", "reset", "power off", "halt"],
)
def test_a_guest_goes_back_to_before_its_end(
    make: MakeMachine, end: bytes, kind: pyvmm.Kind
) -> None:
    machine = make(prints(b"ready"), ask_then(end))
    machine.start()
    machine.console.expect("ready", patient(WAIT_S))
    machine.checkpoint()
    for _ in range(3):
        machine.console.write("!")
        outcome = machine.wait(patient(WAIT_S))
        assert outcome is not None
        assert outcome.kind is kind
        assert machine.wait(0.0) == outcome
        machine.rewind()
        assert machine.outcome is None
        assert machine.is_paused
        rip = machine.vcpus[0].registers.rip
        machine.resume()
        assert machine.pause(patient(WAIT_S))
        assert abs(machine.vcpus[0].registers.rip - rip) < 0x40, "it waits for its byte"
        machine.resume()
    with pytest.raises(pyvmm.ExpectError, match=r"0\.05 s have passed"):
        machine.console.expect("ready", 0.05)


def test_a_stopped_guest_and_one_whose_time_was_up_go_back_too(make: MakeMachine) -> None:
    machine = make(echoes(), timeout_s=1.0)
    machine.start()
    echo(machine, "a")
    machine.checkpoint()
    outcome = machine.wait(patient(WAIT_S))
    assert outcome is not None
    assert outcome.kind is pyvmm.Kind.TIMEOUT
    for _ in range(2):
        began_s = time.monotonic()
        machine.rewind()
        machine.resume()
        echo(machine, "b")
        outcome = machine.wait(patient(WAIT_S))
        assert outcome is not None
        assert outcome.kind is pyvmm.Kind.TIMEOUT
        assert time.monotonic() - began_s > 0.9, "the time began anew"
    machine.rewind()
    machine.resume()
    assert machine.stop() == pyvmm.Outcome(pyvmm.Kind.STOPPED)
    machine.rewind()
    machine.resume()
    echo(machine, "c")


def test_a_rewind_of_a_running_guest_gives_it_all_its_time_again(make: MakeMachine) -> None:
    machine = make(echoes(), timeout_s=1.0)
    machine.start()
    echo(machine, "a")
    machine.checkpoint()
    for _ in range(20):
        time.sleep(0.1)
        machine.rewind()
    assert machine.outcome is None


PANIC = prints(b"Kernel panic - not syncing: oops\n") + SPIN


def test_a_panic_is_forgotten_before_and_after_it_ends_the_run(make: MakeMachine) -> None:
    machine = make(prints(b"up\n"), ask_then(PANIC))
    machine.start()
    machine.console.expect("up\n", patient(WAIT_S))
    machine.checkpoint()
    machine.console.write("!")
    machine.console.expect("oops\n", patient(WAIT_S))
    assert has_panicked(machine)
    machine.rewind()
    assert not has_panicked(machine)
    assert machine.wait(2.5) is None, "the end that was due two seconds after the panic"
    machine.console.write("!")
    outcome = machine.wait(patient(WAIT_S))
    assert outcome is not None
    assert outcome.kind is pyvmm.Kind.PANIC
    machine.rewind()
    machine.resume()
    assert not has_panicked(machine)
    assert machine.wait(2.5) is None


def test_a_line_that_was_half_printed_is_half_printed_again(make: MakeMachine) -> None:
    lines: list[str] = []
    machine = make(prints(b"Kernel panic - "), ask_then(prints(b"not syncing: torn\n"), SPIN))
    machine.console.on_line(lines.append)
    machine.start()
    machine.console.expect("panic - ", patient(WAIT_S))
    machine.checkpoint()
    for count in (1, 2):
        machine.console.write("!")
        machine.console.expect("torn\n", patient(WAIT_S))
        assert machine.evidence.panic == "torn"
        assert lines == ["Kernel panic - not syncing: torn"] * count
        machine.rewind()


def test_hooks_and_lines_are_seen_before_and_after(make: MakeMachine) -> None:
    lines: list[str] = []
    written: list[int | None] = []
    exits: list[int] = []
    machine = make(ask_then(out(0x77, 5), prints(b"line\n"), REPORT_7))
    machine.console.on_line(lines.append)
    machine.on_port(0x77, lambda access: written.append(access.value))
    machine.on_exit(lambda index, _exit: exits.append(index))
    machine.start()
    machine.checkpoint()
    for count in (1, 2, 3):
        machine.console.write("!")
        outcome = machine.wait(patient(WAIT_S))
        assert outcome == pyvmm.Outcome(pyvmm.Kind.GUEST_STATUS, 7)
        assert lines == ["line"] * count
        assert written == [5] * count
        before = len(exits)
        assert before > 0
        machine.rewind()
        machine.resume()
    machine.stop()
    assert machine.exits.io > 0


def test_a_hook_that_raised_is_asked_again(make: MakeMachine) -> None:
    calls: list[int | None] = []

    def hook(access: object) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("the first time")

    machine = make(ask_then(out(0x77, 5), REPORT_7))
    machine.on_port(0x77, hook)
    machine.start()
    machine.checkpoint()
    machine.console.write("!")
    outcome = machine.wait(patient(WAIT_S))
    assert outcome is not None
    assert outcome.kind is pyvmm.Kind.HOST_ERROR
    machine.rewind()
    machine.resume()
    machine.console.write("!")
    assert machine.wait(patient(WAIT_S)) == pyvmm.Outcome(pyvmm.Kind.GUEST_STATUS, 7)
    assert len(calls) == 2


def test_typed_bytes_that_nobody_read_are_forgotten(make: MakeMachine) -> None:
    machine = make(prints(b"up"), echoes(slowness=1 << 20))
    machine.start()
    machine.console.expect("up", patient(WAIT_S))
    machine.checkpoint()
    machine.console.write("x" * 1000)
    machine.console.expect("xxx", patient(WAIT_S))
    machine.rewind()
    echo(machine, "yz")


def test_somebody_who_resumes_during_a_rewind_is_obeyed_afterwards(make: MakeMachine) -> None:
    machine = make(echoes())
    machine.start()
    echo(machine, "a")
    machine.checkpoint()
    is_over = threading.Event()

    def meddle() -> None:
        while not is_over.is_set():
            machine.pause(0.001)
            machine.resume()

    meddler = threading.Thread(target=meddle)
    meddler.start()
    for _ in range(200):
        machine.rewind()
    is_over.set()
    meddler.join()
    machine.resume()
    echo(machine, "b")


def test_a_stop_of_another_thread_ends_the_rewound_run(make: MakeMachine) -> None:
    machine = make(echoes())
    machine.start()
    echo(machine, "a")
    machine.checkpoint()
    for _ in range(20):
        stopper = threading.Thread(target=machine.stop)
        stopper.start()
        machine.rewind()
        stopper.join(patient(WAIT_S))
        assert not stopper.is_alive()
        machine.rewind()
        machine.resume()
        echo(machine, "b")


def rewind_for_ever(machine: pyvmm.Machine) -> None:
    """Rewind ``machine`` until that raises."""
    while True:
        machine.rewind()


def test_a_close_of_another_thread_waits_for_the_rewind(make: MakeMachine) -> None:
    for _ in range(5):
        machine = make(echoes())
        machine.start()
        machine.checkpoint()
        closer = threading.Thread(target=machine.close)
        closer.start()
        with pytest.raises(RuntimeError, match=r"^rewind\(\): the machine was closed$"):
            rewind_for_ever(machine)
        closer.join(patient(WAIT_S))


# Bad use


def test_a_hook_cannot_rewind_its_own_machine(make: MakeMachine) -> None:
    errors: list[str] = []

    def hook(access: object) -> None:
        for use in (machine.rewind, machine.checkpoint):
            with pytest.raises(RuntimeError) as caught:
                use()
            errors.append(str(caught.value))

    machine = make(ask_then(out(0x77, 5), REPORT_7))
    machine.on_port(0x77, hook)
    machine.start()
    machine.checkpoint()
    machine.console.write("!")
    assert machine.wait(patient(WAIT_S)) == pyvmm.Outcome(pyvmm.Kind.GUEST_STATUS, 7)
    assert [error.split(" would")[0] for error in errors] == [
        "rewind() in a thread of the run", "checkpoint() in a thread of the run",
    ]


def test_a_machine_that_was_not_started_or_was_closed_is_not_rewound(make: MakeMachine) -> None:
    machine = make(echoes())
    machine.checkpoint()
    with pytest.raises(RuntimeError, match=r"^rewind\(\): the machine was not started$"):
        machine.rewind()
    machine.start()
    echo(machine, "a")
    machine.rewind()
    echo(machine, "b")
    with pytest.raises(SnapshotError, match=r"^checkpoint 7: is not held; there are 1 to 1$"):
        machine.rewind(7)
    machine.close()
    for use in (machine.rewind, machine.checkpoint):
        with pytest.raises(RuntimeError, match=r"\(\): the machine was closed$"):
            use()


def test_a_rewind_that_fails_ends_the_run(
    make: MakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = make(echoes())
    machine.start()
    machine.checkpoint()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    with monkeypatch.context() as patch:
        patch.setattr("pyvmm.memory.GuestMemory.drop_own_pages", fail)
        with pytest.raises(OSError, match="no memory"):
            machine.rewind()
    outcome = machine.wait(patient(WAIT_S))
    assert outcome is not None
    assert outcome.kind is pyvmm.Kind.HOST_ERROR
    assert "rewind() failed" in outcome.detail
    machine.rewind()
    machine.resume()
    echo(machine, "a")


# Snapshots
