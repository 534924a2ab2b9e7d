"""``pyvmm restore DIR --clones-fd N``: one process that forks clones, and what its owner hears."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.guest import environment
from tests.support.patience import patient
from tests.support.tiny_guests import REPORT_7, SPIN, prints
from tests.support.warm_runs import Warmed, finished, pyvmm

pytestmark = pytest.mark.bare

WAIT_S = 30


class Owner:
    """The owner of a process that forks clones of ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(patient(WAIT_S))
        with other:
            self.process = subprocess.Popen(
                pyvmm("restore", directory, f"--clones-fd={other.fileno()}"),
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                pass_fds=[other.fileno()], env=environment(),
            )

    def fork(self, folder: Path, *options: str) -> Path:
        """Ask for a clone, whose standard error goes to the file that is returned."""
        errors = folder / f"errors{len(list(folder.glob('errors*')))}"
        with errors.open("wb") as file:
            socket.send_fds(self.socket, [json.dumps(options).encode()], [file.fileno()])
        return errors

    def hear(self) -> list[object]:
        """The next answer."""
        answer = json.loads(self.socket.recv(1 << 16))
        assert isinstance(answer, list)
        return answer

    def close(self) -> tuple[int, bytes]:
        """Go away; return the exit status and the lines of the process."""
        self.socket.close()
        assert self.process.stderr is not None
        with self.process:
            said = self.process.stderr.read()
            return self.process.wait(patient(WAIT_S)), said


@pytest.fixture
def warmed(tmp_path: Path) -> Warmed:
    return Warmed(tmp_path)


@pytest.fixture
def owner(warmed: Warmed) -> Iterator[Owner]:
    warmed.warm(prints(b"up\n"), REPORT_7)
    owner = Owner(warmed.directory)
    yield owner
    if owner.process.returncode is None:
        owner.close()


def test_clones_are_forked_and_their_ends_told(owner: Owner, tmp_path: Path) -> None:
    pids = set()
    for number in range(3):
        log = tmp_path / f"log{number}"
        errors = owner.fork(tmp_path, "--console", str(log))
        kind, pid = owner.hear()
        assert kind == "started"
        pids.add(pid)
        assert owner.hear() == ["ended", pid, 7]
        assert (log.read_text(), errors.read_text()) == ("up\n", "")
    assert len(pids) == 3
    assert owner.close() == (0, b"")


def test_a_clone_that_cannot_be_is_a_line_of_its_own(
    owner: Owner, warmed: Warmed, tmp_path: Path
) -> None:
    errors = owner.fork(tmp_path, "--timeout", "never")
    kind, pid = owner.hear()
    assert kind == "started"
    assert owner.hear() == ["ended", pid, 125]
    assert errors.read_text().startswith("pyvmm: --timeout never: must be a number")
    assert errors.read_text().count("\n") == 1
    errors = owner.fork(tmp_path, "--console", "none", "--disk", f"0={tmp_path}/no.img")
    kind, pid = owner.hear()
    assert owner.hear() == ["ended", pid, 125]
    assert "no.img" in errors.read_text()
    owner.fork(tmp_path, "--console", "none")
    kind, pid = owner.hear()
    assert owner.hear() == ["ended", pid, 7], "the process goes on"


def test_a_clone_that_is_killed_harms_no_other(warmed: Warmed, tmp_path: Path) -> None:
    warmed.warm(prints(b"up\n"), SPIN)
    owner = Owner(warmed.directory)
    owner.fork(tmp_path, "--console", "none", "--timeout", str(patient(WAIT_S)))
    _, first = owner.hear()
    owner.fork(tmp_path, "--console", "none", "--timeout", "1")
    _, second = owner.hear()
    assert isinstance(first, int)
    os.kill(first, signal.SIGKILL)
    assert owner.hear() == ["ended", first, -signal.SIGKILL]
    assert owner.hear() == ["ended", second, 124]
    assert owner.close() == (0, b"")


def test_what_is_wrong_from_the_start_is_a_line(warmed: Warmed, tmp_path: Path) -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        done = subprocess.run(
            pyvmm("restore", tmp_path / "missing", f"--clones-fd={other.fileno()}"),
            pass_fds=[other.fileno()], capture_output=True, env=environment(), check=False,
        )
    assert done.returncode == 125
    assert done.stderr.decode() == f"pyvmm: {tmp_path}/missing: no such directory\n"
    status, _, said = finished(pyvmm("restore", tmp_path / "missing", "--clones-fd", "0"))
    assert status == 125
    assert said.startswith("pyvmm: --clones-fd 0: is no ")
