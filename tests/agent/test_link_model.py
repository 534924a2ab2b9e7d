"""AgentLink against a model of a legal guest, in any order of what both may do."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pyvmm.agent.link import AgentLink, Job, JobEnd, JobResult, LinkState, RunRequest
from pyvmm.agent.protocol import (
    EXIT,
    GUEST_MAGIC,
    HEADER,
    HELLO,
    MIN_WINDOW,
    START,
    U32,
    FrameType,
    frame,
)

WINDOW = MIN_WINDOW
MAX_JOBS = 3
SIZES = st.integers(1, WINDOW)
PIECES = st.sampled_from([1, 13, 300, 1 << 20, 1 << 20])


@dataclass
class GuestJob:
    """The guest's side of a job."""

    kind: int
    received: bytearray = field(default_factory=bytearray)
    unreturned: int = 0
    is_input_over: bool = False
    credit: dict[int, int] = field(default_factory=dict)
    open: set[int] = field(default_factory=set)
    sent: dict[int, bytearray] = field(default_factory=lambda: {1: bytearray(), 2: bytearray()})
    kills: list[int] = field(default_factory=list)


class HostJob:
    """The host's side: what the link told of a job, and what was written into it."""

    def __init__(self) -> None:
        self.job: Job | None = None
        self.got = {1: bytearray(), 2: bytearray()}
        self.unconsumed = {1: 0, 2: 0}
        self.over: set[int] = set()
        self.written = bytearray()
        self.result: JobResult | None = None
        self.room = 0

    def on_data(self, stream: int, data: bytes) -> None:
        assert self.result is None
        assert stream not in self.over
        if not data:
            self.over.add(stream)
        self.got[stream] += data
        self.unconsumed[stream] += len(data)

    def on_room(self) -> None:
        assert self.job is not None
        assert self.job.room > self.room
        self.room = self.job.room

    def on_exit(self, result: JobResult) -> None:
        assert self.result is None
        self.result = result


class LinkMachine(RuleBasedStateMachine):
    """The guest's bytes and the host's go through two pipes that may stop anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.link = AgentLink(on_state=lambda: None, wake=self._wake)
        self.woken = False
        self.to_host = bytearray()
        self.to_guest = bytearray()
        self.hosts: dict[int, HostJob] = {}
        self.guests: dict[int, GuestJob] = {}
        self.is_open = False

    def _wake(self) -> None:
        assert not self.woken
        self.woken = True

    def pick(self, jobs: dict[int, object], index: int) -> int:
        return sorted(jobs)[index % len(jobs)]

    @initialize()
    def greet(self) -> None:
        self.open_port()
        self.deliver_to_host(1 << 20)
        self.deliver_to_guest(1 << 20)

    @precondition(lambda self: not self.is_open)
    @rule()
    def open_port(self) -> None:
        self.link.opened(True)
        self.is_open = True
        self.guests.clear()
        self.to_host.clear()
        self.to_guest.clear()
        self.woken = bool(self.link.output(1))
        self.say(FrameType.HELLO, 0, 0, HELLO.pack(GUEST_MAGIC, 1, MAX_JOBS, WINDOW))

    @precondition(lambda self: self.is_open)
    @rule(chance=st.integers(0, 30))
    def close_port(self, chance: int) -> None:
        if chance != 30:
            return
        self.link.opened(False)
        self.is_open = False
        self.woken = False
        for host in self.hosts.values():
            assert host.result is not None
            assert host.result.kind is JobEnd.LOST
        self.hosts.clear()
        self.guests.clear()

    def say(self, kind: int, stream: int, number: int, payload: bytes = b"") -> None:
        self.to_host += frame(kind, stream, number, payload)

    @rule(size=PIECES)
    def deliver_to_host(self, size: int) -> None:
        if self.is_open:
            data = bytes(self.to_host[:size])
            del self.to_host[:size]
            self.link.feed(data)

    @rule(size=PIECES)
    def deliver_to_guest(self, size: int) -> None:
        data = self.link.output(size)
        self.link.sent(len(data))
        self.woken = bool(self.link.output(1))
        self.to_guest += data
        while len(self.to_guest) >= HEADER.size:
            length, kind, stream, number = HEADER.unpack_from(self.to_guest)
            end = HEADER.size + length
            if len(self.to_guest) < end:
                break
            payload = bytes(self.to_guest[HEADER.size : end])
            del self.to_guest[:end]
            self.guest_takes(kind, stream, number, payload)

    def guest_takes(self, kind: int, stream: int, number: int, payload: bytes) -> None:
        job = self.guests.get(number)
        if kind == FrameType.START:
            assert len(payload) == START.size
        elif kind in (FrameType.RUN, FrameType.PUT, FrameType.GET):
            assert job is None
            outputs = {FrameType.RUN: (1, 2), FrameType.GET: (1,)}.get(FrameType(kind), ())
            self.guests[number] = GuestJob(
                kind, credit=dict.fromkeys(outputs, WINDOW), open=set(outputs)
            )
        elif kind == FrameType.PING:
            self.say(FrameType.PONG, 0, 0, payload)
        elif job is None:
            assert kind in (FrameType.DATA, FrameType.CREDIT, FrameType.KILL)
        elif kind == FrameType.DATA:
            assert stream == 0
            assert not job.is_input_over
            job.is_input_over = not payload
            job.received += payload
            job.unreturned += len(payload)
            assert job.unreturned <= WINDOW
        elif kind == FrameType.CREDIT:
            (count,) = U32.unpack(payload)
            job.credit[stream] += count
            assert count > 0
            assert job.credit[stream] <= WINDOW
        else:
            assert kind == FrameType.KILL
            job.kills.append(*U32.unpack(payload))

    @precondition(lambda self: self.link.free_jobs)
    @rule(kind=st.sampled_from(["run", "put", "get"]))
    def begin(self, kind: str) -> None:
        host = HostJob()
        if kind == "run":
            host.job = self.link.run(RunRequest(argv=("a",), has_input=True), host)
        elif kind == "put":
            host.job = self.link.put("/a", host)
        else:
            host.job = self.link.get("/a", host)
        host.room = host.job.room
        self.hosts[host.job.id] = host

    @precondition(lambda self: self.hosts)
    @rule(index=st.integers(0, 9), size=SIZES, byte=st.integers(0, 255))
    def host_writes(self, index: int, size: int, byte: int) -> None:
        host = self.hosts[self.pick(dict(self.hosts), index)]
        assert host.job is not None
        data = bytes([byte]) * min(size, host.job.room)
        host.job.write(data)
        host.written += data
        host.room = host.job.room

    @precondition(lambda self: self.hosts)
    @rule(index=st.integers(0, 9), what=st.sampled_from(["close", "kill", "ping"]))
    def host_says(self, index: int, what: str) -> None:
        job = self.hosts[self.pick(dict(self.hosts), index)].job
        assert job is not None
        if what == "close":
            job.close_input()
        elif what == "kill":
            job.kill(15)
        elif len(self.link._pings) < 16 and self.link.state is LinkState.READY:
            self.link.ping(lambda: None)

    @precondition(lambda self: self.hosts)
    @rule(index=st.integers(0, 9), stream=st.sampled_from([1, 2]), size=SIZES)
    def host_consumes(self, index: int, stream: int, size: int) -> None:
        host = self.hosts[self.pick(dict(self.hosts), index)]
        assert host.job is not None
        count = min(size, host.unconsumed[stream])
        if count:
            host.unconsumed[stream] -= count
            host.job.consumed(stream, count)

    @precondition(lambda self: self.guests)
    @rule(index=st.integers(0, 9), stream=st.sampled_from([1, 2]), size=SIZES,
          byte=st.integers(0, 255))
    def guest_sends(self, index: int, stream: int, size: int, byte: int) -> None:
        number = self.pick(dict(self.guests), index)
        job = self.guests[number]
        if stream not in job.open:
            return
        data = bytes([byte]) * min(size, job.credit[stream])
        if data:
            job.credit[stream] -= len(data)
            job.sent[stream] += data
            self.say(FrameType.DATA, stream, number, data)

    @precondition(lambda self: self.guests)
    @rule(index=st.integers(0, 9), size=SIZES)
    def guest_gives_credit(self, index: int, size: int) -> None:
        number = self.pick(dict(self.guests), index)
        job = self.guests[number]
        if count := min(size, job.unreturned):
            job.unreturned -= count
            self.say(FrameType.CREDIT, 0, number, U32.pack(count))

    @precondition(lambda self: self.guests)
    @rule(index=st.integers(0, 9), stream=st.sampled_from([1, 2]))
    def guest_ends_a_stream(self, index: int, stream: int) -> None:
        number = self.pick(dict(self.guests), index)
        if stream in self.guests[number].open:
            self.guests[number].open.discard(stream)
            self.say(FrameType.DATA, stream, number)

    @precondition(lambda self: self.guests)
    @rule(index=st.integers(0, 9), status=st.integers(0, 255))
    def guest_ends_a_job(self, index: int, status: int) -> None:
        """Let all that is under way arrive, and compare both sides."""
        number = self.pick(dict(self.guests), index)
        job = self.guests.pop(number)
        self.say(FrameType.EXIT, 0, number, EXIT.pack(0, 0, 0, status))
        host = self.hosts.pop(number)
        self.deliver_to_host(len(self.to_host))
        assert host.result == JobResult(kind=JobEnd.EXITED, value=status)
        assert host.got == job.sent
        assert host.written.startswith(job.received)

    @invariant()
    def a_legal_guest_never_loses_the_link(self) -> None:
        expected = (LinkState.READY, LinkState.WAITING) if self.is_open else (
            LinkState.WAITING, LinkState.LOST
        )
        assert self.link.state in expected, self.link.problem
        assert len(self.link._in) <= WINDOW + HEADER.size


LinkMachine.TestCase.settings = settings(
    max_examples=200, stateful_step_count=100, deadline=None
)
TestLink = LinkMachine.TestCase
