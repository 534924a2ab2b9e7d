"""The agent's own program on this host, behind a socket pair, driven by an ``AgentLink``."""

from __future__ import annotations

import contextlib
import io
import select
import socket
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pyvmm.agent.binary import PROGRAM
from pyvmm.agent.link import AgentLink, Job, JobResult, LinkState, RunRequest
from pyvmm.agent.protocol import STDERR, STDOUT
from tests.support.patience import patient

PIECE = 1 << 16


class Events:
    """Remembers what a job sent; ``limit`` bytes of each output are read, then none."""

    def __init__(self, feed: bytes = b"", limit: int | None = None) -> None:
        self.job: Job | None = None
        self.out: dict[int, bytearray] = {STDOUT: bytearray(), STDERR: bytearray()}
        self.ended: list[int] = []
        self.result: JobResult | None = None
        self.feed = memoryview(feed)
        self.limit = limit

    def on_data(self, stream: int, data: bytes) -> None:
        """See ``JobEvents.on_data``."""
        assert self.result is None
        assert stream not in self.ended
        if not data:
            self.ended.append(stream)
        self.out[stream] += data
        if self.job is not None and (self.limit is None or len(self.out[stream]) < self.limit):
            self.job.consumed(stream, len(data))

    def on_room(self) -> None:
        """See ``JobEvents.on_room``."""
        self.send_more()

    def on_exit(self, result: JobResult) -> None:
        """See ``JobEvents.on_exit``."""
        assert self.result is None
        self.result = result

    def send_more(self) -> None:
        """Send what is left of ``feed``, as far as there is room; then close the input."""
        assert self.job is not None
        while self.feed and self.job.room:
            piece = self.feed[: min(self.job.room, PIECE)]
            self.feed = self.feed[len(piece) :]
            self.job.write(bytes(piece))
        if not self.feed:
            self.job.close_input()

    @property
    def stdout(self) -> bytes:
        """Return what came on standard output."""
        return bytes(self.out[STDOUT])

    @property
    def stderr(self) -> bytes:
        """Return what came on standard error."""
        return bytes(self.out[STDERR])


class AgentRig:
    """An agent and a link to it."""

    def __init__(self, program: Path, cwd: Path | None = None) -> None:
        ours, theirs = socket.socketpair()
        self.socket = ours
        with theirs:
            self.process = subprocess.Popen(
                [program, "--fd", str(theirs.fileno())], pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=cwd,
            )
        ours.setblocking(False)
        self.states: list[str] = []
        self.link = AgentLink(on_state=self._note, wake=lambda: None)
        self.link.opened(True)

    def _note(self) -> None:
        self.states.append(self.link.state)

    def step(self, timeout_s: float) -> None:
        """Move bytes both ways once."""
        output = self.link.output(PIECE)
        readable, writable, _ = select.select(
            [self.socket], [self.socket] if output else [], [], timeout_s
        )
        if writable:
            with contextlib.suppress(BlockingIOError):
                self.link.sent(self.socket.send(output))
        if readable:
            data = self.socket.recv(PIECE)
            if data:
                self.link.feed(data)
            else:
                self.link.opened(False)

    def until(self, condition: Callable[[], object], seconds: float = 20) -> None:
        """Move bytes until ``condition()`` is true."""
        end_s = time.monotonic() + patient(seconds)
        while not condition():
            assert time.monotonic() < end_s, "the agent did not do it in time"
            assert self.link.state is not LinkState.LOST, self.link.problem
            self.step(0.05)

    def ready(self) -> None:
        """Wait for HELLO."""
        self.until(lambda: self.link.state is LinkState.READY)

    def begin(self, start: Callable[[Events], Job], events: Events) -> Events:
        """Start a job with ``events`` and send its input."""
        events.job = start(events)
        if events.job.room:
            events.send_more()
        return events

    def run(self, *argv: str | bytes, feed: bytes | None = None, **more: Any) -> Events:
        """Run a command to its end."""
        events = self.start(*argv, feed=feed, **more)
        self.until(lambda: events.result)
        return events

    def start(
        self, *argv: str | bytes, feed: bytes | None = None, limit: int | None = None,
        **more: Any,
    ) -> Events:
        """Start a command; ``more`` are fields of RunRequest."""
        request = RunRequest(argv=argv, has_input=feed is not None, **more)
        return self.begin(lambda e: self.link.run(request, e), Events(feed or b"", limit))

    def shell(self, script: str, **more: Any) -> Events:
        """Run a script of the shell to its end."""
        return self.run("/bin/sh", "-c", script, **more)

    def transfer(self, start: Callable[[Events], Job], feed: bytes = b"") -> Events:
        """Do a transfer to its end."""
        events = self.begin(start, Events(feed))
        self.until(lambda: events.result)
        return events

    def put(self, path: str | Path, archive: bytes) -> JobResult:
        """Unpack ``archive`` below ``path``."""
        return _result(self.transfer(lambda e: self.link.put(str(path), e), archive))

    def get(self, path: str | Path) -> Events:
        """Return ``path`` as a tar stream, in ``stdout``."""
        return self.transfer(lambda e: self.link.get(str(path), e))

    def close(self) -> str:
        """End the agent; return what it complained of."""
        self.socket.close()
        _, complaints = self.process.communicate(timeout=patient(20))
        return str(complaints, "utf-8", "backslashreplace")


def _result(events: Events) -> JobResult:
    assert events.result is not None
    return events.result


@contextlib.contextmanager
def agent_rig(program: Path = PROGRAM, cwd: Path | None = None) -> Iterator[AgentRig]:
    """Start ``program`` and greet it; at the end it must have nothing to complain of."""
    rig = AgentRig(program, cwd)
    try:
        rig.ready()
        yield rig
    finally:
        complaints = rig.close()
    assert complaints == ""
    assert rig.process.returncode == 0


def tar_of(*members: tuple[tarfile.TarInfo, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    """Return an archive of ``members``, each with its contents."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as archive:
        for info, data in members:
            info.size = len(data) if info.isreg() else info.size
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, **more: object) -> tarfile.TarInfo:
    """Return a member; ``more`` are its attributes."""
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in more.items():
        setattr(info, field, value)
    return info
