"""A guest with a disk, in a process that was confined once everything was open."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.jail.confine import Plan, confine
from pyvmm.jail.namespaces import Namespaces
from pyvmm.jail.root import User
from pyvmm.run.outcome import Kind, Outcome
from tests.support.apart import NOBODY, apart, become_nobody, refuse_calls
from tests.support.disk_guest import built, disk_machine, expected_disk, wait_for_rounds
from tests.support.patience import patient

pytestmark = pytest.mark.bare
ROUNDS = 100
MORE_FILES = 8
"""An epoll for each thread, and the like."""
NOBODY_USER = User(NOBODY, NOBODY, "nobody")
UNSHARE, CREATE_RULESET, SECCOMP = 272, 444, 317
is_root = os.geteuid() == 0
needs_root = pytest.mark.skipif(not is_root, reason="only root has what is given up here")


def open_descriptors() -> set[int]:
    """Return all open descriptors but /dev/kvm's."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") != "/dev/kvm":
                found.add(int(name))
        except FileNotFoundError:  # the listing's own
            continue
    return found


def run_confined(
    folder: Path,
    *,
    user: User | None = None,
    namespaces: bool = False,
    before: Callable[[], object] = lambda: None,
) -> tuple[Outcome, int]:
    """Run a guest with two vCPUs in a jail; return its outcome, and the errno with which the
    process then opens /dev/kvm.  ``before`` is called once the machine is built.
    """
    config = disk_machine(folder, rounds=ROUNDS, cpus=2)

    def body(fd: int) -> tuple[Kind, int, str, int]:
        its_namespaces = Namespaces() if namespaces else None
        machine = built(config)  # not closed: the Kvm object does not know that its file is
        before()
        confine(Plan(
            kept=(*open_descriptors(), fd), more_files=MORE_FILES, user=user,
            namespaces=its_namespaces,
        ))
        machine.start()
        wait_for_rounds(machine, ROUNDS)
        assert machine.consoles.receive(b"!") == 1  # the guest waits for it at its end
        outcome = machine.wait(patient(30))
        assert outcome is not None
        try:
            os.open("/dev/kvm", os.O_RDWR)
        except OSError as error:
            return outcome.kind, outcome.value, outcome.detail, error.errno or -1
        return outcome.kind, outcome.value, outcome.detail, 0

    kind, value, detail, error = apart(body)
    return Outcome(kind, value, detail), error


def check(folder: Path, outcome: Outcome) -> None:
    assert outcome == Outcome(Kind.GUEST_STATUS, 0)
    assert (folder / "disk.img").read_bytes() == expected_disk(ROUNDS)


def test_a_guest_runs_confined(tmp_path: Path) -> None:
    outcome, error = run_confined(tmp_path)
    check(tmp_path, outcome)
    assert error in (errno.EACCES, errno.ENOENT)


@needs_root
def test_a_guest_runs_as_another_user_with_an_empty_root(tmp_path: Path) -> None:
    """KVM and the disk are open already: the user needs no right to either."""
    outcome, error = run_confined(tmp_path, user=NOBODY_USER, namespaces=True)
    check(tmp_path, outcome)
    assert error == errno.EACCES


@needs_root
def test_a_guest_runs_in_a_process_that_has_become_an_ordinary_user(tmp_path: Path) -> None:
    outcome, error = run_confined(tmp_path, before=become_nobody)
    check(tmp_path, outcome)
    assert error == errno.EACCES


def test_a_guest_runs_in_a_container_that_forbids_most_of_it(tmp_path: Path) -> None:
    """As one without Landlock, namespaces and nested filters."""
    outcome, _ = run_confined(
        tmp_path, namespaces=is_root,
        before=lambda: refuse_calls(errno.EPERM, UNSHARE, CREATE_RULESET, SECCOMP),
    )
    check(tmp_path, outcome)
