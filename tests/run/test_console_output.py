"""The output half of a run's console in a loop: it gathers, is shown, and costs nothing in rest."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.console.output import GATHER_S, OutputBuffer, OutputPump
from pyvmm.run.console_output import PluggedOutput
from pyvmm.run.io_loop import IoLoop
from tests.support.patience import patient


class Shown:
    """A loop in a thread of its own that shows what is written to ``output``."""

    def __init__(self, fd: int | None) -> None:
        self.observed = bytearray()
        self.lost: list[OSError] = []
        self.looks = 0
        self.loop = IoLoop(woken=self._look)
        self.output = OutputBuffer(fd, self.loop.wake, self.observed.extend)
        self._plugged = PluggedOutput(OutputPump(self.output, self.lost.append), self.loop)
        self._thread = threading.Thread(target=self.loop.run)
        self._thread.start()

    def _look(self) -> None:
        self.looks += 1
        self._plugged.look()

    def wait_for(self, what: Callable[[], bool]) -> None:
        until_s = time.monotonic() + patient(20)
        while not what():
            assert time.monotonic() < until_s
            time.sleep(0.001)

    def stop(self) -> None:
        self.loop.stop()
        self._thread.join()


def test_bytes_gather_and_are_shown_in_their_order() -> None:
    reader, writer = os.pipe()
    shown = Shown(writer)
    started_s = time.monotonic()
    for byte in b"hello":
        shown.output.write(bytes((byte,)))
    assert os.read(reader, 100) == b"hello"
    assert time.monotonic() - started_s >= GATHER_S
    shown.wait_for(lambda: shown.observed == b"hello")
    assert shown.looks <= 6, "nobody is woken for each byte"
    shown.stop()
    os.close(reader)
    os.close(writer)


def test_a_reader_who_takes_nothing_is_waited_for_without_work() -> None:
    reader, writer = os.pipe()
    shown = Shown(writer)
    data = bytes(range(256)) * 512  # more than a pipe holds and the buffer lets in
    thread = threading.Thread(target=lambda: shown.output.write(data))
    thread.start()
    shown.wait_for(lambda: len(shown.observed) >= 1 << 16)
    before_s = time.process_time()
    time.sleep(0.1)
    assert time.process_time() - before_s < 0.05
    got = bytearray()
    while len(got) < len(data):
        got += os.read(reader, 1 << 16)
    assert got == data
    thread.join()
    shown.stop()
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("kind", ["file", "nowhere", "null"])
def test_what_needs_no_waiting_is_shown_at_once(tmp_path: Path, kind: str) -> None:
    """epoll takes no regular file; such output must not keep the loop busy either."""
    path = tmp_path / "console.log" if kind == "file" else Path(os.devnull)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    shown = Shown(None if kind == "nowhere" else fd)
    for _ in range(3):
        before = len(shown.observed)
        shown.output.write(b"line\n" * 2000)
        shown.wait_for(lambda: len(shown.observed) == before + 10_000)  # noqa: B023
    before_s = time.process_time()
    time.sleep(0.1)
    assert time.process_time() - before_s < 0.05
    shown.stop()
    if kind == "file":
        assert path.read_bytes() == bytes(shown.observed)
    assert not shown.lost
    os.close(fd)


def test_a_reader_who_leaves_is_told_once_and_the_observer_sees_all() -> None:
    reader, writer = os.pipe()
    shown = Shown(writer)
    os.close(reader)
    for _ in range(3):
        shown.output.write(b"x" * 5000)
    shown.wait_for(lambda: len(shown.observed) == 15_000)
    shown.stop()
    assert [type(error) for error in shown.lost] == [BrokenPipeError]
    os.close(writer)
