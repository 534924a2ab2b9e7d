"""Our half of the agent's protocol and a guest that lies: frames of every kind, cut anywhere"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from uuid import UUID

from fuzz.checks import check_printable
from fuzz.source import Source
from fuzz.target import Target
from pyvmm.agent.clone import MAX_HOOK_OUTPUT, CloneNotice
from pyvmm.agent.link import AgentLink, Job, JobEnd, JobResult, LinkState, RunRequest
from pyvmm.agent.protocol import (
    EXIT,
    GUEST_MAGIC,
    HEADER,
    HELLO,
    MAX_JOBS,
    MAX_PAYLOAD,
    U32,
    WINDOW,
    FrameType,
    frame,
)
from pyvmm.errors import AgentError

_HELLO = frame(FrameType.HELLO, 0, 0, HELLO.pack(GUEST_MAGIC, 1, MAX_JOBS, WINDOW) + b"agent")
_HELLO_2 = frame(FrameType.HELLO, 0, 0, HELLO.pack(GUEST_MAGIC, 2, MAX_JOBS, WINDOW) + b"agent")
_NOTICE = CloneNotice(clone_id=UUID(int=1))
_MOST_STEPS = 60
_MOST_WAITING = 2 * (MAX_PAYLOAD + HEADER.size)
_MOST_OUTPUT = MAX_JOBS * (2 * WINDOW + 4096)
"""Bytes: each job may have sent its window, in frames that may be small, and some orders."""


class _Job:
    """A user of the link who takes what comes, and checks the order of what is told."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.job: Job | None = None
        self.unconsumed = {1: 0, 2: 0}
        self.over: set[int] = set()
        self.result: JobResult | None = None

    def on_data(self, stream: int, data: bytes) -> None:
        """See ``JobEvents.on_data``."""
        assert self.result is None, "data behind the end"
        assert stream not in self.over, "data behind the end of its stream"
        if not data:
            self.over.add(stream)
        self.unconsumed[stream] += len(data)
        assert self.unconsumed[stream] <= WINDOW

    def on_room(self) -> None:
        """See ``JobEvents.on_room``."""
        assert self.job is not None
        assert 0 < self.job.room <= WINDOW

    def on_exit(self, result: JobResult) -> None:
        """See ``JobEvents.on_exit``."""
        assert self.result is None, "it ended twice"
        self.result = result
        if result.reason or result.kind in (JobEnd.FAILED, JobEnd.LOST):
            check_printable(result.reason)


class AgentTarget(Target):
    """Nothing raises, memory is bounded, every job ends once, a lost link has its line."""

    is_structured = True
    max_bytes = 2048
    words = (_HELLO, GUEST_MAGIC, b"PYVMMAGT", struct.pack("<IHHI", 4, 3, 0, 1))

    def run(self, data: bytes) -> None:
        """Play the guest that ``data`` describes."""
        source = Source(data)
        states: list[str] = []
        notice = _NOTICE if source.chance(128) else None
        link = AgentLink(
            on_state=lambda: states.append(link.state), wake=lambda: None, notice=lambda: notice
        )
        jobs: list[_Job] = []
        link.opened(True)
        if source.chance(250):
            link.feed(_HELLO_2 if source.chance(128) else _HELLO)
        for _ in range(_MOST_STEPS):
            if not source.more:
                break
            self._step(link, source, jobs)
            assert len(link._in) <= _MOST_WAITING, len(link._in)
            assert len(link.output(1 << 30)) <= _MOST_OUTPUT
            assert (link.state is LinkState.LOST) == bool(link.problem)
            if link.problem:
                check_printable(link.problem)
            if link.clone is not None:
                if link.clone.problem:
                    check_printable(link.clone.problem)
                assert len(link.clone.output) <= MAX_HOOK_OUTPUT
                assert notice is not None
        link.opened(False)
        assert all(job.result is not None for job in jobs)
        assert all(a != b for a, b in itertools.pairwise(states)), states

    def _step(self, link: AgentLink, source: Source, jobs: list[_Job]) -> None:
        match source.number(0, 9):
            case 0:
                _begin(link, source, jobs)
            case 1:
                link.sent(source.pick((1, 100, 1 << 20)))
            case 2:
                link.opened(source.chance(200))
                hello = source.pick((_HELLO, _HELLO_2))
                link.feed(hello if source.chance(200) else source.take(source.bits(6)))
            case 3 if jobs:
                _use(source.pick(jobs))
            case 4:
                link.feed(source.take(source.bits(6)))
            case _:
                said = _frame(source)
                cut = source.number(0, len(said)) if source.chance(20) else len(said)
                link.feed(said[:cut])
                link.feed(said[cut:] if source.chance(250) else b"")


def _begin(link: AgentLink, source: Source, jobs: list[_Job]) -> None:
    """Ask for a job, which may be refused."""
    user = _Job(source)
    starts: tuple[Callable[[], Job], ...] = (
        lambda: link.run(RunRequest(argv=("a",), has_input=source.chance(128)), user),
        lambda: link.put("/a", user), lambda: link.get("/a", user),
        lambda: link.read("/a", user), lambda: link.write("/a", 0o644, user),
    )
    try:
        if source.chance(20):
            link.ping(lambda: None)
        user.job = source.pick(starts)()
    except AgentError as error:
        check_printable(error)
    else:
        jobs.append(user)


def _use(user: _Job) -> None:
    """Do something with a job, over or not."""
    job, source = user.job, user.source
    assert job is not None
    match source.number(0, 3):
        case 0:
            job.write(bytes(min(job.room, source.pick((1, 5000, WINDOW)))))
        case 1:
            job.close_input()
        case 2:
            job.kill(source.number(1, 64))
        case _:
            stream = source.number(1, 2)
            if count := user.unconsumed[stream]:
                user.unconsumed[stream] = 0
                job.consumed(stream, count)


def _frame(source: Source) -> bytes:
    """Return a frame as a guest might send it, mostly of a job that there is."""
    kind = source.pick((
        FrameType.DATA, FrameType.DATA, FrameType.CREDIT, FrameType.EXIT, FrameType.PONG,
        FrameType.HELLO, source.bits(5),
    ))
    number = source.edge(1, 2, 3, MAX_JOBS, bits=32) if source.chance(100) else source.number(1, 3)
    stream = source.number(0, 3)
    payload = source.take(source.bits(4))
    if kind == FrameType.DATA:
        stream, payload = source.number(1, 2), bytes(source.pick((0, 1, 4000, MAX_PAYLOAD)))
    elif kind == FrameType.CREDIT and source.chance(240):
        stream, payload = 0, U32.pack(source.edge(1, WINDOW, bits=32))
    elif kind == FrameType.EXIT and source.chance(240):
        values = source.number(0, 3), source.bits(1), 0, source.edge(0, 9, 255, bits=32)
        payload = EXIT.pack(*values) + payload
    elif kind == FrameType.PONG:
        payload = U32.pack(source.number(1, 4))
    said = frame(kind, stream, number, payload)
    if source.chance(8):  # another length than there is
        said = U32.pack(source.edge(len(payload), MAX_PAYLOAD, bits=32)) + said[4:]
    return said


def make() -> Target:
    """Return the target."""
    return AgentTarget()
