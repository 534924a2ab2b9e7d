"""``VmSnapshot``: clones in processes of their own, which a warm process forks."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

import pyvmm
from pyvmm.cli.fork_server import ForkServer
from pyvmm.errors import SnapshotError
from pyvmm.launcher.clones import Clones
from pyvmm.launcher.vm import VmSnapshot
from tests.support.launched import is_there, until
from tests.support.patience import patient


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clones' guest is the agent's program on this host."""
    monkeypatch.setattr("pyvmm.launcher.zygote.PROGRAM", (
        sys.executable, "-P", "-m", "tests.support.clone_process",
    ))


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().split()[3])


def test_clones_are_processes_of_their_own_and_take_orders(tmp_path: Path) -> None:
    with VmSnapshot(tmp_path / "saved") as snapshot:
        with snapshot.clone() as first, snapshot.clone() as second:
            assert first.pid != second.pid
            for vm in first, second:
                vm.wait_for_agent(patient(20))
                assert vm.run(["echo", "hello"], check=True).stdout == "hello\n"
            parents = {parent_of(first.pid), parent_of(second.pid)}
            assert len(parents) == 1
            first.close()
            assert second.run(["true"]).status == 0
        (parent,) = parents
        until(lambda: children_of(parent) == [])
    assert not is_there(parent)


def test_a_clone_that_is_killed_harms_no_other(tmp_path: Path) -> None:
    with VmSnapshot(tmp_path / "saved") as snapshot, snapshot.clone() as other:
        with snapshot.clone() as victim:
            os.kill(victim.pid, signal.SIGKILL)
            outcome = victim.wait(patient(20))
            assert outcome is not None
            assert "by signal 9" in outcome.detail
        other.wait_for_agent(patient(20))
        assert other.run(["true"]).status == 0
        with snapshot.clone() as another:
            another.wait_for_agent(patient(20))


def test_clones_outlive_the_process_that_forked_them(tmp_path: Path) -> None:
    snapshot = VmSnapshot(tmp_path / "saved")
    with snapshot.clone() as vm:
        vm.wait_for_agent(patient(20))
        snapshot.close()
        assert vm.run(["echo", "still"]).stdout == "still\n"
    assert not is_there(vm.pid)
    with pytest.raises(RuntimeError, match="the snapshot was closed"):
        snapshot.clone()


def test_many_threads_clone_at_once(tmp_path: Path) -> None:
    outputs: list[str] = []

    def clone_and_run(snapshot: VmSnapshot, number: int) -> None:
        with snapshot.clone() as vm:
            vm.wait_for_agent(patient(30))
            outputs.append(vm.run(["echo", str(number)]).stdout)

    with VmSnapshot(tmp_path / "saved") as snapshot:
        threads = [
            threading.Thread(target=clone_and_run, args=(snapshot, number)) for number in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(outputs) == [f"{number}\n" for number in range(8)]


def test_an_answer_that_comes_too_late_is_nobody_else_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with VmSnapshot(tmp_path / "saved") as snapshot:
        with snapshot.clone() as vm:
            parent = parent_of(vm.pid)
        os.kill(parent, signal.SIGSTOP)
        with monkeypatch.context() as patch:
            patch.setattr("pyvmm.launcher.zygote.ANSWER_TIMEOUT_S", 0.2)
            with pytest.raises(pyvmm.HostError, match="has not answered in"):
                snapshot.clone()
        os.kill(parent, signal.SIGCONT)
        with snapshot.clone() as vm:
            vm.wait_for_agent(patient(20))
            *late, last = children_of(parent)  # in the order in which they were forked
            assert vm.pid == last
            for pid in late:  # a stand-in without an owner may wait for ever
                os.kill(pid, signal.SIGKILL)


def test_the_console_log_is_a_file_or_a_descriptor(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with VmSnapshot(tmp_path / "saved") as snapshot:
        with snapshot.clone(console_log=log, clock="now"):
            pass
        assert log.read_text() == "--clock=now"
        fd = os.open(tmp_path / "other", os.O_WRONLY | os.O_CREAT)
        try:
            with snapshot.clone(console_log=fd):
                pass
        finally:
            os.close(fd)
        assert (tmp_path / "other").read_text() == "--clock=keep"


def test_a_snapshot_that_cannot_be_used_is_told_at_the_first_clone(tmp_path: Path) -> None:
    with VmSnapshot(tmp_path / "missing") as snapshot:
        for _ in range(2):
            with pytest.raises(SnapshotError) as caught:
                snapshot.clone()
            assert (caught.value.subject, caught.value.problem) == (
                str(tmp_path / "missing"), "is no snapshot"
            )


def test_a_clone_that_cannot_run_says_why(tmp_path: Path) -> None:
    with (
        VmSnapshot(tmp_path / "dies") as snapshot,
        pytest.raises(pyvmm.HostError, match="it dies"),
    ):
        snapshot.clone()


def test_arguments_that_cannot_be(tmp_path: Path) -> None:
    with VmSnapshot(tmp_path / "saved") as snapshot:
        with pytest.raises(pyvmm.ConfigError, match="clock 'soon': is none of keep, now"):
            snapshot.clone(clock="soon")
        with pytest.raises(pyvmm.ConfigError, match="cannot be written"):
            snapshot.clone(console_log=tmp_path / "no" / "log")


def test_a_temporary_directory_goes_with_the_snapshot(tmp_path: Path) -> None:
    made: list[str] = []

    def make(path: str) -> None:
        made.append(path)
        os.mkdir(path)

    with contextlib.closing(Clones.in_temporary_directory(make)) as snapshot:
        assert snapshot.path == made[0]
        assert os.path.isdir(made[0])
    assert not os.path.exists(os.path.dirname(made[0]))

    def fail(path: str) -> None:
        made.append(path)
        raise SnapshotError("disk 0", "is written in place")

    with pytest.raises(SnapshotError):
        Clones.in_temporary_directory(fail)
    assert not os.path.exists(os.path.dirname(made[1]))


@pytest.mark.parametrize("place", ["", ".", "none"])
def test_a_temporary_directory_is_told_by_its_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", place)
    if place == "none":
        with pytest.raises(SnapshotError, match="none: has no room for a snapshot: No such file"):
            Clones.in_temporary_directory(os.mkdir)
        return
    with contextlib.closing(Clones.in_temporary_directory(os.mkdir)) as snapshot:
        assert os.path.dirname(os.path.dirname(snapshot.path)) == (
            str(tmp_path) if place else "/var/tmp"
        )


def test_a_snapshot_that_nobody_closes_leaves_nothing(tmp_path: Path) -> None:
    snapshot = VmSnapshot(tmp_path / "saved")
    with snapshot.clone() as vm:
        parent = parent_of(vm.pid)
    del snapshot
    until(lambda: not is_there(parent))


@pytest.mark.parametrize("message", [
    b"no json", b"{}", b"[1]", json.dumps([{"fd": 9, "before": "x"}]).encode(), b"\xff",
])
def test_the_fork_server_refuses_what_is_no_message(message: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server = ForkServer(theirs, lambda _: 0)
    thread = threading.Thread(target=server.serve)
    with ours, theirs:
        thread.start()
        socket.send_fds(ours, [message], [ours.fileno()])
        kind, _ = json.loads(ours.recv(1 << 16))
        assert kind == "failed"
        ours.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_child_that_the_fork_server_cannot_watch_is_ended(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_pid: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def wait(_words: list[str]) -> int:
        time.sleep(patient(60))
        return 0

    monkeypatch.setattr(os, "pidfd_open", refuse)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    thread = threading.Thread(target=ForkServer(theirs, wait).serve)
    with ours, theirs:
        thread.start()
        socket.send_fds(ours, [b"[]"], [ours.fileno()])
        assert json.loads(ours.recv(1 << 16)) == ["failed", "[Errno 24] Too many open files"]
        assert children_of(os.getpid()) == []
        ours.shutdown(socket.SHUT_RDWR)
        thread.join()
