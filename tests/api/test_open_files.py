"""Too few open files for the machines of a script: one error, which names the remedy."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyvmm
from tests.support.tiny_guests import SPIN, write_guest

pytestmark = pytest.mark.bare

REMEDY = r"^too few open files: the limit is \d+, a process .* needs 4096; .* `ulimit -n 4096`$"


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[pyvmm.Machine]:
    """A machine that spins."""
    kernel = write_guest(tmp_path / "guest.elf", SPIN)
    with pyvmm.Machine(pyvmm.MachineConfig(kernel=kernel, memory="16M")) as machine:
        machine.start()
        yield machine


@contextlib.contextmanager
def room_for(count: int) -> Iterator[None]:
    """Let this process open ``count`` files besides those that it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unused = []
    with contextlib.ExitStack() as opened:
        for _ in range(count + 1):
            unused.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
            opened.callback(os.close, unused[-1])
    most = unused[-1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_clones_that_are_too_many_are_an_error_with_its_remedy(
    machine: pyvmm.Machine, tmp_path: Path
) -> None:
    with machine.snapshot(tmp_path / "kept") as snapshot, contextlib.ExitStack() as clones:
        def clone_many() -> None:
            for _ in range(40):
                clones.enter_context(snapshot.clone())

        with room_for(30), pytest.raises(pyvmm.HostError, match=REMEDY):
            clone_many()
        clones.enter_context(snapshot.clone())  # there is room again


def test_prepared_clones_that_are_too_many_are_a_line_with_its_remedy(
    machine: pyvmm.Machine, tmp_path: Path
) -> None:
    machine.snapshot(tmp_path / "kept").close()
    lines: list[str] = []
    with pyvmm.Snapshot.open(tmp_path / "kept", report=lines.append) as snapshot, room_for(30):
        snapshot.prepare(40)
        snapshot.wait_until_prepared()
    assert lines
    assert all("no more clones are prepared: too few open files: " in line for line in lines)


@pytest.mark.parametrize("room", range(4))
def test_other_calls_are_refused_with_the_remedy_or_done(
    machine: pyvmm.Machine, tmp_path: Path, room: int
) -> None:
    """However far they come: what there is no file for differs with the room."""
    config = pyvmm.MachineConfig(kernel=tmp_path / "guest.elf", memory="16M")
    machine.snapshot(tmp_path / "kept").close()
    failed = 0
    for call in (
        lambda: pyvmm.Machine(config).close(),
        lambda: pyvmm.Snapshot.open(tmp_path / "kept").close(),
        lambda: machine.snapshot().close(),
        lambda: machine.snapshot(tmp_path / "new").close(),
        machine.checkpoint,
    ):
        try:
            with room_for(room):
                call()
        except pyvmm.PyvmmError as error:
            failed += 1
            with pytest.raises(pyvmm.HostError, match=REMEDY):
                raise error
    assert failed
