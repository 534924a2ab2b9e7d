"""A host that breaks the protocol or sends noise: the agent ends with a line, never crashes."""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
import subprocess
import time
from pathlib import Path

import pytest

from pyvmm.agent.binary import PROGRAM
from pyvmm.agent.protocol import (
    HEADER,
    HOST_MAGIC,
    RUN,
    START,
    U32,
    WINDOW,
    FrameType,
    frame,
)
from tests.support.checked_agent import build_checked_agent
from tests.support.patience import patient

CLONE = bytes(4) + U32.pack(20000) + bytes(88)
START_FRAME = frame(FrameType.START, 0, 0, START.pack(HOST_MAGIC, 1))


@pytest.fixture(scope="module")
def checked_agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checked_agent(tmp_path_factory.mktemp("agent"))


def run_frame(number: int, *argv: bytes, flags: int = 1, cwd: bytes = b"") -> bytes:
    texts = b"".join(text + b"\0" for text in (cwd, *argv))
    return frame(FrameType.RUN, 0, number, RUN.pack(flags, 0, len(argv), 0) + texts)


def answers(program: Path, said: bytes, cwd: Path, *, is_closed: bool = True) -> tuple[str, int]:
    """Send ``said``; return the agent's complaints and its exit status when it has ended."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            agent = subprocess.Popen(
                [program, "--fd", str(theirs.fileno())], pass_fds=[theirs.fileno()], cwd=cwd,
                stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )
        tick = 0.02
        ours.settimeout(tick)
        left, end_s = memoryview(said), time.monotonic() + patient(30)
        is_over = False
        while left and not is_over:
            try:
                left = left[ours.send(left[:65536]) :]
            except TimeoutError:
                pass
            except OSError:
                break
            is_over = drain(ours)
            assert time.monotonic() < end_s
        if is_closed and not is_over:
            drain(ours)
            ours.shutdown(socket.SHUT_WR)
        while not is_over:
            is_over = drain(ours)
            assert time.monotonic() < end_s
        _, complaints = agent.communicate(timeout=patient(30))
    return complaints.decode("utf-8", "backslashreplace"), agent.returncode


def drain(connection: socket.socket) -> bool:
    """Read what there is; True at the end."""
    while True:
        try:
            if not connection.recv(1 << 20):
                return True
        except TimeoutError:
            return False
        except OSError:
            return True


LIES = {
    "a frame that is too long": HEADER.pack(65537, 17, 0, 1),
    "an unknown frame": frame(99, 0, 1),
    "data for a job without that stream": run_frame(1, b"sleep", b"9", flags=0)
    + frame(FrameType.DATA, 0, 1, b"x"),
    "data behind the end of the input": run_frame(1, b"sleep", b"9")
    + frame(FrameType.DATA, 0, 1) + frame(FrameType.DATA, 0, 1, b"x"),
    "more data than it had credit for": run_frame(1, b"sleep", b"9")
    + frame(FrameType.DATA, 0, 1, bytes(65536)) * 6,
    "more credit than was used": run_frame(1, b"sleep", b"9")
    + frame(FrameType.CREDIT, 1, 1, U32.pack(1)),
    "CREDIT": frame(FrameType.CREDIT, 1, 1, b"123"),
    "a job with an id that is taken": run_frame(1, b"sleep", b"9") * 2,
    "a job without a name": frame(FrameType.GET, 0, 1),
    "a path that is none": frame(FrameType.GET, 0, 1, b"etc"),
    "a command whose texts are not complete": run_frame(1, b"a")[:-1] + b"b",
    "KILL without a signal": frame(FrameType.KILL, 0, 1, U32.pack(65)),
    "CLONE": frame(FrameType.CLONE, 0, 1, bytes(95)),
    "CLONE behind a job": run_frame(1, b"sleep", b"9") + frame(FrameType.CLONE, 0, 2, CLONE),
    "a long PING": frame(FrameType.PING, 0, 0, bytes(65)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_ends_the_link_with_its_name(lie: str, tmp_path: Path) -> None:
    said = START_FRAME + LIES[lie] + frame(FrameType.PING, 0, 0)
    complaints, status = answers(PROGRAM, said, tmp_path, is_closed=False)
    assert complaints == f"<4>pyvmm-agent: the host broke the protocol: {lie}\n"
    assert status == 0


@pytest.mark.parametrize("said", [
    frame(FrameType.GET, 0, 1, b"/etc/\0passwd"), frame(FrameType.GET, 0, 1, b"/" + b"x" * 4096),
    frame(FrameType.GET, 0, 0, b"/etc"), frame(FrameType.WRITE, 0, 1, b"1234"),
    frame(FrameType.RUN, 0, 1, RUN.pack(0, 0, 0, 0) + b"\0"),
    frame(FrameType.RUN, 0, 1, RUN.pack(0, 0, 65535, 65535) + bytes(60000)),
    frame(FrameType.RUN, 0, 1, b"short"), frame(FrameType.CREDIT, 0, 1, U32.pack(1)) * 2
    + run_frame(1, b"sleep", b"9") + frame(FrameType.CREDIT, 0, 1, U32.pack(1)),
])
def test_other_lies_end_it_too(said: bytes, tmp_path: Path) -> None:
    complaints, _ = answers(PROGRAM, START_FRAME + said, tmp_path, is_closed=False)
    assert complaints.startswith("<4>pyvmm-agent: the host broke the protocol: ")


def test_frames_for_jobs_that_have_ended_are_no_lies(tmp_path: Path) -> None:
    said = frame(FrameType.DATA, 0, 7, b"x") + frame(FrameType.CREDIT, 2, 7, U32.pack(WINDOW))
    said += frame(FrameType.KILL, 0, 7, U32.pack(9))
    assert answers(PROGRAM, START_FRAME + said, tmp_path) == ("", 0)


def test_noise_before_start_is_skipped(tmp_path: Path) -> None:
    said = b"junk" * 100_000 + START_FRAME[4:] + START_FRAME + frame(FrameType.PING, 0, 0, b"hi")
    assert answers(PROGRAM, said, tmp_path) == ("", 0)


def test_noise_never_crashes_it(checked_agent: Path, tmp_path: Path) -> None:
    noise = random.Random(7)
    for _ in range(25):
        begin = noise.choice([b"", START_FRAME, START_FRAME[: noise.randrange(22)]])
        said = begin + noise.randbytes(noise.choice([10, 1000, 300_000]))
        complaints, status = answers(checked_agent, said, tmp_path)
        assert status == 0, complaints
        assert "Sanitizer" not in complaints
        assert "runtime error" not in complaints


def test_any_order_of_frames_never_crashes_it(checked_agent: Path, tmp_path: Path) -> None:
    """Commands that do no harm, with credit and data as a host may send them or may not."""
    noise = random.Random(11)
    for _ in range(25):
        said = bytearray(START_FRAME)
        for _ in range(noise.choice([5, 40, 150])):
            said += random_frame(noise, os.fsencode(tmp_path))
        complaints, status = answers(checked_agent, bytes(said), tmp_path)
        assert status == 0, complaints
        assert "Sanitizer" not in complaints
        assert "runtime error" not in complaints


def random_frame(noise: random.Random, folder: bytes) -> bytes:
    """Return a frame of the host's, mostly legal."""
    number = noise.choice([1, 2, 3, noise.randrange(1, 40)])
    commands = (
        [b"true"], [b"cat"], [b"yes"], [b"nope"], [b"sleep", b"9"], [b"sh", b"-c", b"exit 3"],
        [b"sh", b"-c", b"exec <&- >&-; sleep 0.01"], [b"sh", b"-c", b"kill -9 $$"],
    )
    kind = noise.randrange(12)
    if kind < 3:
        return run_frame(number + 100 * noise.randrange(50), *noise.choice(commands),
                         flags=noise.randrange(4), cwd=noise.choice([b"", b"/", b"/none"]))
    if kind < 6:
        size = noise.choice([0, 1, 1000, 32768, 65536])
        return frame(FrameType.DATA, 0, number, bytes(size))
    if kind == 6:
        count = noise.choice([1, 100, 65536, WINDOW])
        return frame(FrameType.CREDIT, noise.choice([1, 1, 2]), number, U32.pack(count))
    if kind == 7:
        return frame(FrameType.KILL, 0, number, U32.pack(noise.choice([9, 15, 1, 19, 18])))
    if kind == 8:
        return frame(FrameType.PING, 0, 0, noise.randbytes(noise.randrange(65)))
    path = noise.choice([b"/proc/self/status", b"/dev/zero", b"/none", folder, folder + b"/file"])
    if kind == 9:
        return frame(noise.choice([FrameType.GET, FrameType.READ]), 0, number + 1000, path)
    if kind == 10:
        name = folder + b"/" + noise.choice([b"a", b"b/c", b"d" * 300])
        return frame(FrameType.WRITE, 0, number + 2000, U32.pack(0o644) + name)
    return frame(FrameType.PUT, 0, number, folder + b"/out")


def test_a_signal_of_the_terminal_does_not_end_it(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        agent = subprocess.Popen([PROGRAM, "--fd", str(theirs.fileno())],
                                 pass_fds=[theirs.fileno()], cwd=tmp_path)
        ours.settimeout(patient(10))
        assert struct.unpack("<I", ours.recv(4))[0] > 16
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
            agent.send_signal(number)
        ours.recv(1000)
        ours.sendall(START_FRAME + frame(FrameType.PING, 0, 0, b"well?"))
        assert ours.recv(1000) == frame(FrameType.PONG, 0, 0, b"well?")
        ours.shutdown(socket.SHUT_RDWR)
        assert agent.wait(patient(10)) == 0


@pytest.mark.parametrize("noise", [b"junk" + START_FRAME[4:], b"junk" + START_FRAME[4:20]])
def test_start_is_found_behind_a_damaged_one_in_the_same_read(
    tmp_path: Path, noise: bytes
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        agent = subprocess.Popen([PROGRAM, "--fd", str(theirs.fileno())],
                                 pass_fds=[theirs.fileno()], cwd=tmp_path)
        ours.settimeout(patient(10))
        assert struct.unpack("<I", ours.recv(4))[0] > 16
        ours.recv(1000)
        try:
            ours.sendall(noise + START_FRAME + frame(FrameType.PING, 0, 0, b"well?"))
            assert ours.recv(1000) == frame(FrameType.PONG, 0, 0, b"well?")
        finally:
            ours.shutdown(socket.SHUT_RDWR)
            assert agent.wait(patient(10)) == 0
