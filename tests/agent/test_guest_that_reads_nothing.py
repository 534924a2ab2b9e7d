"""A guest that goes on sending and reads nothing: what waits for it stays bounded."""

from __future__ import annotations

import pytest

from pyvmm.agent import link as link_module
from pyvmm.agent.link import AgentLink, Job, JobEnd, JobResult, LinkState, RunRequest
from pyvmm.agent.protocol import (
    EXIT,
    GUEST_MAGIC,
    HELLO,
    MIN_WINDOW,
    STDOUT,
    VERSION,
    FrameType,
    frame,
)
from pyvmm.errors import AgentError

LIMIT = 4096


class Eager:
    """Deals with all that comes at once, so that the guest gets credit for more."""

    def __init__(self) -> None:
        self.job: Job | None = None
        self.results: list[JobResult] = []

    def on_data(self, stream: int, data: bytes) -> None:
        assert self.job is not None
        self.job.consumed(stream, len(data))

    def on_room(self) -> None:
        pass

    def on_exit(self, result: JobResult) -> None:
        self.results.append(result)


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> AgentLink:
    monkeypatch.setattr(link_module, "MAX_QUEUED", LIMIT)
    found = AgentLink(on_state=lambda: None, wake=lambda: None)
    found.opened(True)
    words = HELLO.pack(GUEST_MAGIC, VERSION, 1, MIN_WINDOW)
    found.feed(frame(FrameType.HELLO, 0, 0, words))
    return found


def test_credit_that_it_never_reads(link: AgentLink) -> None:
    events = Eager()
    events.job = link.run(RunRequest(argv=("yes",)), events)
    data = frame(FrameType.DATA, STDOUT, events.job.id, bytes(MIN_WINDOW // 4))
    for _ in range(2 * LIMIT):
        link.feed(data)
        assert len(link.output(1 << 30)) <= LIMIT + 100
    assert link.state is LinkState.LOST
    assert link.problem.endswith("it sent data, and read nothing of what it was sent")
    assert [result.kind for result in events.results] == [JobEnd.LOST]


def test_jobs_that_it_ends_without_having_read_of_them(link: AgentLink) -> None:
    with pytest.raises(AgentError, match="reads nothing of what it was sent"):  # noqa: PT012 - some jobs later
        for _ in range(LIMIT):
            events = Eager()
            job = link.run(RunRequest(argv=("true",)), events)
            link.feed(frame(FrameType.EXIT, 0, job.id, EXIT.pack(0, 0, 0, 0)))
    assert len(link.output(1 << 30)) <= LIMIT + 100
    assert link.state is LinkState.READY
