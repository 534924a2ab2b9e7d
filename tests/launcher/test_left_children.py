"""A machine that was taken over forks children; none outlives a machine that was launched."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvmm.cli.fork_server import ForkServer
from pyvmm.launcher.arguments import Arguments
from pyvmm.launcher.process import VmProcess
from pyvmm.launcher.zygote import ForkedProcess, Zygote
from tests.support.launched import is_there, until
from tests.support.patience import patient

FORKS = """
import os, signal, sys, time
fd = int(sys.argv[-1].partition("=")[2])
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
children = [os.fork()]
if children[0]:
    os.write(fd, b"%d" % children[0])
    if "lives" in sys.argv:
        signal.pause()
else:
    time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    """True if ``pid`` is there and has not ended; whoever has ended may wait for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], tuple[VmProcess, int]]]:
    """Starts a machine's process that forks, and returns it and its child."""
    children: list[int] = []
    processes: list[VmProcess] = []

    def begin(word: str) -> tuple[VmProcess, int]:
        monkeypatch.setattr(
            "pyvmm.launcher.process.PROGRAM", (sys.executable, "-c", FORKS, word)
        )
        process = VmProcess.start(Arguments())
        processes.append(process)
        children.append(int(process.socket.recv(100)))
        return process, children[-1]

    yield begin
    for process in processes:
        process.close()
    assert not [pid for pid in children if is_alive(pid)]


def test_a_machine_that_ends_leaves_no_child(
    start: Callable[[str], tuple[VmProcess, int]],
) -> None:
    process, child = start("ends")
    assert process.wait(patient(20)) == 0
    until(lambda: not is_alive(child))
    assert process.wait(0) == 0


def test_a_machine_that_is_killed_leaves_no_child(
    start: Callable[[str], tuple[VmProcess, int]],
) -> None:
    process, child = start("lives")
    assert process.wait(0.01) is None
    assert is_alive(child)
    os.kill(process.pid, signal.SIGKILL)
    threads = [threading.Thread(target=process.wait_for_ever) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert process.wait(0) == -signal.SIGKILL
    until(lambda: not is_alive(child))


def test_a_machine_that_does_not_end_is_killed_with_its_children(
    start: Callable[[str], tuple[VmProcess, int]],
) -> None:
    process, child = start("lives")
    assert process.end(0.01) == -signal.SIGKILL
    until(lambda: not is_alive(child))


def fork_a_sleeper(_words: list[str]) -> int:
    """Be a clone's process that leaves a child."""
    if os.fork() == 0:
        time.sleep(patient(600))
    return 7


def test_a_clone_that_ends_leaves_no_child() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    thread = threading.Thread(target=ForkServer(theirs, fork_a_sleeper).serve)
    out, into = os.pipe()
    with ours, theirs:
        thread.start()
        socket.send_fds(ours, [b"[]"], [into])
        os.close(into)
        kind, pid = json.loads(ours.recv(1 << 16))
        assert kind == "started"
        assert json.loads(ours.recv(1 << 16)) == ["ended", pid, 7]
        # The child had the clone's standard error: the pipe ends with it.
        assert os.read(out, 1) == b""
        os.close(out)
        ours.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_clone_that_has_lost_the_process_which_forked_it_leaves_no_child(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pyvmm.launcher.zygote.PROGRAM", (
        sys.executable, "-P", "-m", "tests.support.clone_process",
    ))
    zygote = Zygote([str(tmp_path / "forks")])
    clone = ForkedProcess.start(zygote, [], ())
    child = int(clone.socket.recv(100))
    assert is_alive(child)
    zygote.close()
    assert clone.wait(0) is None
    os.kill(clone.pid, signal.SIGKILL)
    until(lambda: not is_there(clone.pid))
    assert is_alive(child)
    clone.close()
    until(lambda: not is_alive(child))
