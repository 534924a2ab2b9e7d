"""A control group: the option's text, its files, and a real one if the host lets us make one."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.jail.cgroup import Cgroup, parse_cgroup
from tests.support.apart import EndedApartError, apart, become_nobody, refuse_calls

WRITE = 1
PLACE = "/sys/fs/cgroup/vm"


@pytest.mark.parametrize(("text", "group"), [
    (PLACE, Cgroup(directory=PLACE)),
    (f"{PLACE}/", Cgroup(directory=PLACE)),
    (f"{PLACE},memory=512M", Cgroup(directory=PLACE, memory_bytes=512 << 20)),
    (f"{PLACE},memory=16777216", Cgroup(directory=PLACE, memory_bytes=16 << 20)),
    (f"{PLACE},cpu=1.5,pids=20,memory=2G",
     Cgroup(directory=PLACE, cpus=1.5, pids=20, memory_bytes=2 << 30)),
])
def test_a_group_is_a_directory_with_limits(text: str, group: Cgroup) -> None:
    assert parse_cgroup(text) == group


@pytest.mark.parametrize(("limits", "problem"), [
    ("", "'' is no limit; there are memory=SIZE, cpu=N and pids=N"),
    ("memory", "'memory' is no limit; there are memory=SIZE, cpu=N and pids=N"),
    ("io=1", "'io=1' is no limit; there are memory=SIZE, cpu=N and pids=N"),
    ("cpus=1", "'cpus=1' is no limit; there are memory=SIZE, cpu=N and pids=N"),
    ("memory=1M", "memory=1M is not a size from 16M to 1024T; write 512M or 2G"),
    ("memory=2000T", "memory=2000T is not a size from 16M to 1024T; write 512M or 2G"),
    ("memory=max", "memory=max is not a size from 16M to 1024T; write 512M or 2G"),
    ("cpu=0", "cpu=0 is not a number of CPUs, from 0.01 to 8192"),
    ("cpu=nan", "cpu=nan is not a number of CPUs, from 0.01 to 8192"),
    ("cpu=1e9", "cpu=1e9 is not a number of CPUs, from 0.01 to 8192"),
    ("pids=0", "pids=0 is not a number of threads, from 1 to 4194304"),
    ("pids=-1", "pids=-1 is not a number of threads, from 1 to 4194304"),
    ("pids=1,pids=2", "pids is given twice"),
])
def test_another_limit_is_refused(limits: str, problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_cgroup(f"{PLACE},{limits}")
    assert refused.value.problem == problem


@pytest.mark.parametrize("text", ["", "vm", "vm,memory=1G", ",memory=1G"])
def test_the_path_must_be_whole(text: str) -> None:
    with pytest.raises(ConfigError, match="must begin with a whole path, as /sys/fs/cgroup/NAME"):
        parse_cgroup(text)


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A directory with the files of a group."""
    for name in ("cgroup.controllers", "cgroup.procs", "memory.max", "cpu.max", "pids.max"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def test_limits_are_set_before_the_group_is_joined(stand_in: Path) -> None:
    Cgroup(directory=str(stand_in), memory_bytes=1 << 30, cpus=0.5, pids=9).join()
    written = {path.name: path.read_text() for path in stand_in.iterdir()}
    assert written == {
        "cgroup.controllers": "", "cgroup.procs": "0", "memory.max": "1073741824",
        "cpu.max": "50000 100000", "pids.max": "9",
    }
    assert (stand_in / "memory.max").stat().st_mtime_ns <= (
        (stand_in / "cgroup.procs").stat().st_mtime_ns
    )


def test_without_limits_none_is_written(stand_in: Path) -> None:
    Cgroup(directory=str(stand_in)).join()
    assert {path.name for path in stand_in.iterdir() if path.read_bytes()} == {"cgroup.procs"}


def test_a_controller_that_is_off_is_told_with_the_remedy(stand_in: Path) -> None:
    (stand_in / "memory.max").unlink()
    with pytest.raises(ConfigError) as refused:
        Cgroup(directory=str(stand_in), memory_bytes=1 << 30).join()
    assert refused.value.problem == (
        f"has no memory.max: write +memory to {stand_in.parent}/cgroup.subtree_control"
    )
    assert (stand_in / "cgroup.procs").read_bytes() == b""


def test_a_directory_that_is_no_group_is_refused_and_not_left(tmp_path: Path) -> None:
    new = tmp_path / "new"
    for place in (tmp_path, new):
        with pytest.raises(ConfigError, match="is no directory of cgroup v2"):
            Cgroup(directory=str(place)).join()
    assert tmp_path.exists()
    assert not new.exists()


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be made: No such file or directory"):
        Cgroup(directory=str(tmp_path / "a" / "b")).join()


def test_a_file_that_cannot_be_written_is_told(stand_in: Path) -> None:
    (stand_in / "cgroup.procs").unlink()
    (stand_in / "cgroup.procs").mkdir()
    with pytest.raises(ConfigError, match=r"cgroup\.procs cannot be set to 0: Is a directory"):
        Cgroup(directory=str(stand_in)).join()


def hierarchy() -> Path | None:
    """Return where cgroup v2 is mounted; None if it is not."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(place)
    return None


@pytest.fixture
def new_group() -> Iterator[Path]:
    """The path of a group that is not there yet, on a host on which this process may make it."""
    above = hierarchy()
    if above is None or not os.access(above, os.W_OK):
        pytest.skip("this process may not make a cgroup of version 2")
    place = above / f"pyvmm-test-{uuid.uuid4().hex[:8]}"
    yield place
    if place.exists():
        place.rmdir()


def test_a_process_joins_a_real_group_with_its_threads(new_group: Path) -> None:
    def body(_: int) -> tuple[str, list[str]]:
        Cgroup(directory=str(new_group)).join()
        line = next(
            line for line in Path("/proc/self/cgroup").read_text().splitlines()
            if line.startswith("0::")
        )
        return line, (new_group / "cgroup.procs").read_text().split()

    line, members = apart(body)
    assert line.endswith(f"/{new_group.name}")
    assert len(members) == 1
    assert new_group.exists()


def test_a_group_that_cannot_be_joined_is_not_left(new_group: Path) -> None:
    def body(_: int) -> None:
        refuse_calls(errno.EIO, WRITE)
        Cgroup(directory=str(new_group)).join()

    with pytest.raises(EndedApartError):  # it cannot write its result either
        apart(body)
    assert not new_group.exists()


def test_a_user_who_may_not_is_told(new_group: Path) -> None:
    def body(_: int) -> None:
        become_nobody()
        Cgroup(directory=str(new_group)).join()

    with pytest.raises(ConfigError, match=f"cannot be made: {os.strerror(errno.EACCES)}"):
        apart(body)


def test_limits_hold(new_group: Path) -> None:
    new_group.mkdir()
    if not (new_group / "pids.max").exists():
        pytest.skip("the controllers are off here, or those of version 1")

    def body(_: int) -> bool:
        Cgroup(directory=str(new_group), pids=1, memory_bytes=1 << 30, cpus=0.5).join()
        try:
            pid = os.fork()
        except BlockingIOError:
            return True
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        return False

    assert apart(body)
