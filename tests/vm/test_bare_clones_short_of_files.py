"""A process that may open too few files for one more clone: an error, and nothing is left."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pyvmm.errors import HostError
from pyvmm.report import Reporter
from pyvmm.snapshot.capture import take
from pyvmm.snapshot.snapshot import Snapshot
from tests.support.disk_guest import built, wait_for_rounds
from tests.support.snapshots import STOPPED, Resources, ending, finish, snapshot_machine

pytestmark = pytest.mark.bare

ROUNDS = 40
FILES_OF_A_CLONE = 40
"""More than one has."""


@contextmanager
def files_left(count: int) -> Iterator[None]:
    """This process may open ``count`` more files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    with ExitStack() as stack:
        while (fd := os.open("/dev/null", os.O_RDONLY)) <= highest:  # the limit is one of numbers
            stack.callback(os.close, fd)
        os.close(fd)
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (fd + count, hard))
        yield


def has_begun(snapshot: Snapshot, count: int) -> bool:
    """True if a clone can be made, and begun, with ``count`` more files; it is ended.

    OSError and HostError are what says that it cannot.
    """
    said = ""
    with files_left(count):
        try:
            with ending(snapshot.clone(report=Reporter())) as clone:
                clone.start()
        except (HostError, OSError) as error:
            said = str(error)
    assert not said or "Too many open files" in said
    return not said


def test_whichever_file_is_one_too_many(tmp_path: Path) -> None:
    with ending(built(snapshot_machine(tmp_path, rounds=ROUNDS))) as machine:
        machine.start()
        wait_for_rounds(machine, 10)
        snapshot = take(machine)
        machine.stop(STOPPED)
    with snapshot:
        assert has_begun(snapshot, FILES_OF_A_CLONE)  # imports open files, too
        before = Resources.now()
        begun = []
        for count in range(FILES_OF_A_CLONE):
            begun.append(has_begun(snapshot, count))
            assert Resources.now() == before, count
        assert begun == sorted(begun)
        assert not begun[0]
        assert begun[-1]
        with ending(snapshot.clone(report=Reporter())) as clone:
            finish(clone, ROUNDS)
