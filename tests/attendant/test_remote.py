"""A machine's half of an attendant: files and snapshots from another process, and its absence."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from socket import AF_UNIX, SOCK_SEQPACKET, socketpair

import pytest

from pyvmm.attendant.client import Attendant, LocalAttendant
from pyvmm.attendant.messages import Ask, encode
from pyvmm.attendant.reading import Answer
from pyvmm.attendant.remote import Line, RemoteAttendant
from pyvmm.attendant.remote_files import Channel, FilesAttendant
from pyvmm.errors import SnapshotError
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.run.verdict import Evidence
from tests.support.attended import Attended


class Remote:
    """A ``RemoteAttendant`` whose server is a thread of this process."""

    def __init__(self, attended: Attended) -> None:
        self.attended = attended
        self.bell, wake_fd = os.pipe()
        pid = os.posix_spawn("/bin/true", ["true"], {})
        self.attendant = FilesAttendant(
            pid, attended.channel(), wake_fd, has_work_at_the_end=False
        )
        self.attendant.jailed()

    def close(self) -> None:
        self.attendant.close()
        os.close(self.bell)
        self.attended.end()


@pytest.fixture
def remote() -> Iterator[Remote]:
    made = Remote(Attended(any_snapshot=True, most_scratch_files=3))
    yield made
    made.close()


@pytest.fixture(params=["local", "remote"])
def attendant(request: pytest.FixtureRequest, remote: Remote) -> Attendant:
    if request.param == "remote":
        return remote.attendant
    return LocalAttendant(remote.attended.duties)


def test_a_nameless_file_takes_writes(attendant: Attendant) -> None:
    fd = attendant.scratch_file()
    assert not os.get_inheritable(fd)
    assert os.pwrite(fd, b"text", 7) == 4
    assert os.pread(fd, 100, 0) == bytes(7) + b"text"
    assert os.fstat(fd).st_nlink == 0
    os.close(fd)


def test_a_snapshot_appears_whole_under_its_name(tmp_path: Path, attendant: Attendant) -> None:
    path = tmp_path / "warm"
    with attendant.snapshot_writer(path) as writer:
        assert writer.path == str(path)
        fds = [writer.create(name) for name in ("ram", "disk0.overlay")]
        for fd in fds:
            os.write(fd, b"x" * 4096)
        assert writer.size_of("ram") == 4096
        assert os.listdir(tmp_path) == ["warm.tmp"]
        writer.finish({"about": {"a": 1}})
        assert os.listdir(tmp_path) == ["warm"]
        assert sorted(os.listdir(path)) == ["disk0.overlay", "ram", "state"]
        assert writer.held_bytes == sum(one.stat().st_blocks * 512 for one in path.iterdir())
        again = writer.reopen("ram")
        assert os.fstat(again).st_ino == os.fstat(fds[0]).st_ino
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(again, b"no")
        for fd in (*fds, again):
            os.close(fd)
    assert {stat.S_IMODE(one.stat().st_mode) for one in path.iterdir()} == {0o400}


def test_the_state_is_the_same_whoever_opens_the_files(tmp_path: Path, remote: Remote) -> None:
    states = []
    for name, one in (("a", remote.attendant), ("b", LocalAttendant(remote.attended.duties))):
        with one.snapshot_writer(tmp_path / name) as writer:
            fd = writer.create("disk1.overlay")
            os.write(fd, b"content")
            os.close(fd)
            writer.finish({"about": {"number": 5, "bytes": b"\0\xff"}})
        states.append((tmp_path / name / "state").read_bytes())
    assert states[0] == states[1]


def test_a_snapshot_that_is_not_finished_leaves_nothing(
    tmp_path: Path, attendant: Attendant
) -> None:
    with attendant.snapshot_writer(tmp_path / "warm") as writer:
        os.close(writer.create("ram"))
        assert os.listdir(tmp_path) == ["warm.tmp"]
    assert os.listdir(tmp_path) == []
    with attendant.snapshot_writer(tmp_path / "warm") as writer:
        writer.abort()
        writer.abort()
        assert os.listdir(tmp_path) == []


def test_errors_name_the_directory_and_its_file(tmp_path: Path, attendant: Attendant) -> None:
    (tmp_path / "old").mkdir()
    with pytest.raises(SnapshotError, match=f"^{tmp_path}/old: is there already"):
        attendant.snapshot_writer(tmp_path / "old")
    with attendant.snapshot_writer(tmp_path / "warm") as writer:
        os.close(writer.create("ram"))
        with pytest.raises(SnapshotError, match=f"^{tmp_path}/warm/ram: cannot be written: File"):
            writer.create("ram")
        with pytest.raises(SnapshotError, match="etc/passwd: is no file of a snapshot"):
            writer.create("../etc/passwd")
        with pytest.raises(SnapshotError, match=r"disk3.overlay: cannot be written: No such file"):
            writer.reopen("disk3.overlay")
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        assert str(writer.failed(error)) == (
            f"{tmp_path}/warm/ram: cannot be written: No space left on device"
        )


def test_a_machine_that_calls_for_no_files_gets_none_in_its_jail(tmp_path: Path) -> None:
    attended, (bell, wake_fd) = Attended(), os.pipe()
    pid = os.posix_spawn("/bin/true", ["true"], {})
    plain = RemoteAttendant(
        pid, Line(attended.taken()), wake_fd, has_work_at_the_end=False
    )
    os.close(plain.scratch_file())
    plain.jailed()
    with pytest.raises(PermissionError, match="no option of this run calls for files"):
        plain.scratch_file()
    with pytest.raises(SnapshotError, match="warm: no option of this run allows a snapshot there"):
        plain.snapshot_writer(tmp_path / "warm")
    plain.ended(Outcome(Kind.PANIC), Evidence())
    assert len(attended.explained) == 1
    plain.close()
    plain.ended(Outcome(Kind.PANIC), Evidence())
    assert os.read(bell, 100) == b"wake\n"
    os.close(bell)
    assert attended.end()


def test_a_sleeping_attendant_is_woken_once(remote: Remote) -> None:
    for _ in range(3):
        remote.attendant.wake()
        os.close(remote.attendant.scratch_file())
    assert os.read(remote.bell, 100) == b"wake\n"


def test_one_of_which_nothing_was_asked_is_let_go(remote: Remote) -> None:
    remote.attendant.close()
    assert os.read(remote.bell, 100) == b"quit\n"
    remote.attendant.close()


def test_an_attendant_that_is_gone_is_an_error_of_the_host(tmp_path: Path) -> None:
    remote = Remote(Attended())
    remote.attended.vanish()
    os.close(remote.bell)
    other = remote.attendant
    for _ in range(2):
        with pytest.raises(BrokenPipeError, match="the process beside the machine"):
            other.scratch_file()
        with pytest.raises(SnapshotError, match="warm: cannot be written: the process beside"):
            other.snapshot_writer(tmp_path / "warm")
    other.ended(Outcome(Kind.TIMEOUT), Evidence())
    other.close()
    with pytest.raises(BrokenPipeError):
        other.scratch_file()


@pytest.mark.parametrize("answer", [
    b"?", encode(99), encode(Answer.DONE, "more"), encode(Answer.FAILED, "text"),
    encode(Answer.REFUSED, 1, 2), encode(Answer.FAILED, 1 << 40), encode(Answer.DONE),
], ids=range(7))
def test_a_wrong_answer_is_an_error_too(answer: bytes) -> None:
    """The last one is a file's without a file."""
    ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET)
    channel = Channel(ours.detach())
    with theirs:
        theirs.send(answer)
        with pytest.raises(OSError, match=r"bad answer|no file came|Unknown error"):
            channel.ask_for_file(Ask.SCRATCH)
    channel.close()


def test_many_threads_may_ask_at_once(tmp_path: Path) -> None:
    remote = Remote(Attended(most_scratch_files=400))
    fds: list[int] = []

    def ask() -> None:
        for _ in range(50):
            fds.append(remote.attendant.scratch_file())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({os.fstat(fd).st_ino for fd in fds}) == len(fds) == 400
    for fd in fds:
        os.close(fd)
    remote.close()
