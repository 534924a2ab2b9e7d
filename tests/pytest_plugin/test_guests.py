"""One guest under its judge, on a stand-in for its machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import pyvmm
from pyvmm import Kind, Outcome
from pyvmm.errors import HostError, PyvmmError
from pyvmm.launcher.vm import Vm
from pyvmm.pytest_plugin.guests import Guest, Guests
from pyvmm.pytest_plugin.marker import checked
from pyvmm.pytest_plugin.plan import make_plan

OLD = b"4,1,1000000,-;odd: harmless\n"
WARNING = b"4,2,2000000,-;WARNING: CPU: 0 PID: 1 at fs/x.c:7 f+0x1/0x2\n"
OF_A_PROGRAM = b"12,3,3000000,-;WARNING: says a program\n"


class StandInVm:
    """A machine that has booted, whose console and kernel log say what a test lets them."""

    is_paused = False
    is_end_told = False
    outcome: Outcome | None = None
    failure: PyvmmError | None = None

    def __init__(self) -> None:
        self._callbacks: list[Callable[[bytes], object]] = []
        self.console = SimpleNamespace(lost_bytes=0)
        self.log = OLD
        self.is_closed = False
        self.late = b""
        """Printed while the machine is closed."""

    def on_output(self, callback: Callable[[bytes], object]) -> None:
        self._callbacks.append(callback)

    def print(self, data: bytes) -> None:
        for callback in self._callbacks:
            callback(data)

    def on_end(self, callback: Callable[[Outcome], object]) -> None:
        self.end = callback

    def fail(self, error: PyvmmError) -> None:
        self.failure = self.failure or error

    def settle(self) -> None:
        pass

    def read(self, path: str, timeout_s: float) -> bytes:
        assert path == "/dev/kmsg"
        return self.log

    def close(self) -> None:
        self.is_closed = True
        self.print(self.late)
        self.end(Outcome(Kind.STOPPED))

    def __getattr__(self, name: str) -> Any:
        raise PyvmmError(f"this machine has no {name}")


@pytest.fixture
def vm() -> StandInVm:
    return StandInVm()


@pytest.fixture
def guest(vm: StandInVm) -> Guest:
    plan = make_plan(
        checked("here", {"kernel": "k"}), kernel=None, disks=(), root=Path("/"), is_lab=False
    )
    return Guest(cast(Vm, vm), plan, label="vm", log=None)


def test_a_good_guest_has_no_verdict(vm: StandInVm, guest: Guest) -> None:
    vm.print(b"[    1.0] all is well\r\n")
    assert guest.untold() is None
    assert guest.is_fit
    guest.close()
    assert vm.is_closed


def test_a_warning_in_the_kernels_log_counts_once(vm: StandInVm, guest: Guest) -> None:
    assert guest.untold() is None
    vm.log += WARNING
    error = guest.untold()
    assert isinstance(error, pyvmm.KernelWarning)
    assert vm.failure is error
    assert not guest.is_fit
    assert guest.untold() is None


def test_a_programs_own_message_is_no_warning(vm: StandInVm, guest: Guest) -> None:
    vm.log += OF_A_PROGRAM
    assert guest.untold() is None


def test_a_verdict_that_a_call_has_raised_is_told(vm: StandInVm, guest: Guest) -> None:
    vm.print(b"[    1.0] Kernel panic - not syncing: x\r\n[    1.0] ---[ end Kernel panic\r\n")
    assert isinstance(vm.failure, pyvmm.KernelPanic)
    with pytest.raises(pyvmm.KernelPanic):
        raise vm.failure
    assert guest.untold() is None
    guest.close()


def test_a_line_that_comes_while_the_guest_is_stopped_counts(
    vm: StandInVm, guest: Guest
) -> None:
    vm.late = b"[    1.0] WARNING: at the very end\r\n"
    with pytest.raises(pyvmm.KernelWarning):
        guest.close()
    assert vm.is_closed


def test_an_end_counts_unless_the_test_knows(vm: StandInVm, guest: Guest) -> None:
    vm.end(Outcome(Kind.RESET))
    assert isinstance(guest.untold(), pyvmm.GuestEnded)
    vm.is_end_told = True
    assert guest.untold() is None


class Interrupt(BaseException):
    """As pytest-timeout's, which is no Exception."""


def test_all_guests_are_closed_whatever_is_raised_meanwhile(
    vm: StandInVm, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = StandInVm()
    guests = Guests(label="vm", log_file=lambda: None, is_shared=False)
    guests.all += [Guest(cast(Vm, other), guest.plan, label="vm 2", log=None), guest]

    def interrupted(*_args: object, **_kwargs: object) -> bytes:
        raise Interrupt

    monkeypatch.setattr(vm, "read", interrupted)
    other.print(b"[    1.0] WARNING: told nobody\r\n")
    with pytest.raises(Interrupt):
        guests.close()
    assert vm.is_closed
    assert other.is_closed


def test_a_console_whose_file_is_not_whole_fails(
    vm: StandInVm, guest: Guest, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"all is ")
    guest = Guest(cast(Vm, vm), guest.plan, label="vm", log=log)
    vm.print(b"all is well\r\n")
    with pytest.raises(HostError, match=r"^--pyvmm-logs .*: has 7 of 13 bytes: the disk"):
        guest.close()
    assert vm.is_closed
    log.write_bytes(b"all is well\r\n==== a mark ====\n")
    Guest(cast(Vm, vm), guest.plan, label="vm", log=log).close()
    log.unlink()
    with pytest.raises(HostError, match=r"log: No such file"):
        Guest(cast(Vm, vm), guest.plan, label="vm", log=log).close()
