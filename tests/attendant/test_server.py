"""An attendant and a machine's process that may have been taken over: what it does, and does not.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.attendant.messages import MAX_BYTES, Ask, encode
from pyvmm.attendant.reading import SHAPES, Answer, decode
from pyvmm.attendant.server import FORBIDDEN
from pyvmm.attendant.writer_server import MOST_WRITERS
from pyvmm.run.outcome import Kind
from tests.support.attended import Attended
from tests.support.patience import patient

SECRET = "\x1b]0;owned\x07"


def ended(kind: str = Kind.TIMEOUT, detail: str = "") -> bytes:
    """The message that a run has ended."""
    return encode(Ask.ENDED, kind, detail, True, False, True)


def failed(number: int) -> tuple[int, tuple[int, ...]]:
    """The answer that is an errno."""
    return Answer.FAILED, (number,)


def test_it_returns_whether_the_machine_said_that_it_ends() -> None:
    attended = Attended()
    attended.socket.send(encode(Ask.END))
    assert attended.end()
    assert not Attended().end()


def test_an_explanation_is_printed_and_then_answered(capfd: pytest.CaptureFixture[str]) -> None:
    with Attended(lines=["first", "second"]) as attended:
        assert attended.ask(ended(detail="why")) == (Answer.DONE, ())
        assert capfd.readouterr().err == "pyvmm: first\npyvmm: second\n"
        ((outcome, evidence),) = attended.explained
        assert (outcome.kind, outcome.detail) == (Kind.TIMEOUT, "why")
        assert (evidence.has_printed, evidence.waits_for_root) == (True, False)
        assert evidence.reached_init


def test_a_run_ends_once(capfd: pytest.CaptureFixture[str]) -> None:
    with Attended(lines=["once"]) as attended:
        attended.ask(ended())
        assert attended.ask(ended()) == failed(errno.EPERM)
        assert len(attended.explained) == 1


def test_an_explanation_of_a_machine_that_has_gone_is_not_printed(
    capfd: pytest.CaptureFixture[str]
) -> None:
    is_gone, begins = threading.Event(), threading.Event()

    def lines() -> Iterator[str]:
        begins.set()
        assert is_gone.wait(patient(30))
        yield "late"

    attended = Attended(lines=lines())
    attended.socket.send(ended())
    assert begins.wait(patient(30))
    assert not attended.end()
    is_gone.set()
    for thread in threading.enumerate():
        if thread.name == "explanation":
            thread.join(patient(30))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("data", [
    b"\0", b"\xff" * 100, bytes(MAX_BYTES + 1), encode(99), encode(Ask.SCRATCH, 1),
    encode(Ask.ENDED, SECRET, SECRET, 1, 1, 1), encode(Ask.ENDED, "x" * 5000, "", 1, 1, 1),
    encode(Ask.CREATE, "ram"), encode(Ask.SNAPSHOT, 3), encode(Ask.SETTLE),
], ids=range(10))
def test_a_wrong_message_is_an_error_and_told_once(
    data: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    with Attended(any_snapshot=True) as attended:
        for _ in range(3):
            assert attended.ask(data) == failed(errno.EBADMSG)
        assert attended.explained == []
    assert capfd.readouterr().err == f"pyvmm: {FORBIDDEN}\n"


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(datagrams=st.lists(
    st.binary(min_size=1, max_size=60)
    | st.builds(
        encode, st.sampled_from(sorted(SHAPES)).filter(lambda kind: kind != Ask.END),
        st.text("../ram\0disk", max_size=9), st.integers(-1, 1),
    ), max_size=8,
))
def test_whatever_comes_is_answered_by_an_error(
    datagrams: list[bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    with Attended() as attended:
        for data in datagrams:
            kind, _ = attended.ask(data)
            assert kind in (Answer.FAILED, Answer.REFUSED)
    assert capfd.readouterr().err in ("", f"pyvmm: {FORBIDDEN}\n")


def test_files_that_come_with_a_message_are_closed() -> None:
    with Attended() as attended:
        read_end, write_end = os.pipe()
        attended.socket.sendmsg(
            [ended()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [write_end]))]
        )
        os.close(write_end)
        assert decode(attended.socket.recv(MAX_BYTES)) == (Answer.DONE, ())
        assert os.read(read_end, 1) == b""  # nobody has the other end
        os.close(read_end)


def test_a_machine_that_takes_no_answer_holds_up_nothing_but_itself() -> None:
    attended = Attended()
    attended.socket.settimeout(0.3)
    has_stuck = False
    while not has_stuck:
        try:
            attended.socket.send(encode(99))
        except TimeoutError:
            has_stuck = True
    assert not attended.end()


# Files -------------------------------------------------------------------------------------------


def test_there_are_so_many_nameless_files_and_no_more(capfd: pytest.CaptureFixture[str]) -> None:
    with Attended(most_scratch_files=2) as attended:
        channel = attended.channel()
        for _ in range(2):
            fd, _ = channel.ask_for_file(Ask.SCRATCH)
            assert os.pwrite(fd, b"there", 1000) == 5
            assert os.fstat(fd).st_nlink == 0
            os.close(fd)
        with pytest.raises(PermissionError):
            channel.ask_for_file(Ask.SCRATCH)
        channel.close()
    assert capfd.readouterr().err == f"pyvmm: {FORBIDDEN}\n"


def test_no_option_no_snapshot(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wanted, other = tmp_path / "wanted", tmp_path / "other"
    for attended in (Attended(), Attended(snapshot_path=str(wanted))):
        with attended:
            kind, (subject, problem) = attended.ask(encode(Ask.SNAPSHOT, str(other)))
            assert (kind, subject) == (Answer.REFUSED, str(other))
            assert problem == "no option of this run allows a snapshot there"
    assert os.listdir(tmp_path) == []
    assert capfd.readouterr().err == f"pyvmm: {FORBIDDEN}\n" * 2


def test_clients_may_name_any_new_directory_two_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with Attended(any_snapshot=True) as attended:
        kind, (subject, problem) = attended.ask(encode(Ask.SNAPSHOT, str(tmp_path / "old")))
        assert (kind, subject) == (Answer.REFUSED, str(tmp_path / "old"))
        assert "never overwritten" in str(problem)
        channel = attended.channel()
        fds = [
            channel.ask_for_file(Ask.SNAPSHOT, str(tmp_path / name), shape=(str, str))[0]
            for name in "ab"
        ]
        assert len(fds) == MOST_WRITERS
        assert sorted(os.listdir(tmp_path)) == ["a.tmp", "b.tmp", "old"]
        with pytest.raises(Exception, match="2 snapshots are being made already"):
            channel.ask_for_file(Ask.SNAPSHOT, str(tmp_path / "c"), shape=(str, str))
        for fd in fds:
            os.close(fd)
        channel.close()
    assert os.listdir(tmp_path) == ["old"]
