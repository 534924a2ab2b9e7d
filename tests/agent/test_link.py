"""The host's half of the agent's protocol: its rules, and guests that break them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pyvmm.agent.link import (
    MAX_NOISE,
    MAX_PINGS,
    AgentLink,
    Job,
    JobEnd,
    JobResult,
    LinkState,
    RunRequest,
)
from pyvmm.agent.protocol import (
    EXIT,
    GUEST_MAGIC,
    HEADER,
    HELLO,
    HOST_MAGIC,
    MAX_JOBS,
    MAX_PAYLOAD,
    START,
    U32,
    VERSION,
    WINDOW,
    FrameType,
    frame,
)
from pyvmm.errors import AgentError

CAT = RunRequest(argv=("cat",), has_input=True)


def hello(
    version: int = 1, jobs: int = MAX_JOBS, window: int = WINDOW, text: bytes = b"a"
) -> bytes:
    payload = HELLO.pack(GUEST_MAGIC, version, jobs, window) + text
    return frame(FrameType.HELLO, 0, 0, payload)


class Seen:
    """Remembers what a job told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def on_data(self, stream: int, data: bytes) -> None:
        self.told.append((stream, data))

    def on_room(self) -> None:
        self.told.append("room")

    def on_exit(self, result: JobResult) -> None:
        self.told.append(result)


class Host:
    """A link whose port is open, and all that it told."""

    def __init__(self) -> None:
        self.states: list[str] = []
        self.wakes = 0
        self.link = AgentLink(
            on_state=lambda: self.states.append(self.link.state), wake=self._wake
        )

    def _wake(self) -> None:
        self.wakes += 1

    def sent(self) -> list[tuple[int, int, int, bytes]]:
        """Take the output; return its frames: type, stream, id, payload."""
        output = self.link.output(1 << 30)
        self.link.sent(len(output))
        frames, at = [], 0
        while at < len(output):
            length, kind, stream, number = HEADER.unpack_from(output, at)
            payload = output[at + HEADER.size : at + HEADER.size + length]
            assert len(payload) == length <= MAX_PAYLOAD
            frames.append((kind, stream, number, payload))
            at += HEADER.size + length
        return frames

    def run(self, request: RunRequest = CAT) -> tuple[Job, Seen]:
        seen = Seen()
        return self.link.run(request, seen), seen


@pytest.fixture
def host() -> Host:
    host = Host()
    host.link.opened(True)
    host.link.feed(hello())
    host.sent()
    return host


def test_hello_makes_a_link_ready_and_is_answered_with_start() -> None:
    host = Host()
    assert host.link.state is LinkState.WAITING
    host.link.opened(True)
    for byte in hello(text=b"agent\x1b\n"):
        host.link.feed(bytes([byte]))
    assert host.states == [LinkState.READY]
    assert host.link.hello is not None
    assert host.link.hello.text == r"agent\x1b\n"
    assert host.sent() == [(FrameType.START, 0, 0, START.pack(HOST_MAGIC, VERSION))]
    assert host.link.free_jobs == MAX_JOBS


@pytest.mark.parametrize("noise", [
    b"login: \r\n" * 1000, hello()[:19], hello()[4:], b"PYVMMAGT", bytes(100), hello()[:11] * 9,
])
@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_what_others_wrote_to_the_port_before_hello_is_skipped(noise: bytes, step: int) -> None:
    host = Host()
    host.link.opened(True)
    said = noise + hello(text=b"here")
    for at in range(0, len(said), step):
        host.link.feed(said[at : at + step])
    assert host.link.state is LinkState.READY
    assert host.link.hello is not None
    assert host.link.hello.text == "here"


def test_noise_without_end_is_an_agent_that_lies() -> None:
    host = Host()
    host.link.opened(True)
    for _ in range(MAX_NOISE // 1000 + 2):
        host.link.feed(b"x" * 1000)
    assert host.link.problem == (
        "the agent in the guest broke its protocol: it sent no HELLO in its first 1048576 bytes"
    )


def test_nothing_is_taken_while_the_port_is_closed() -> None:
    host = Host()
    host.link.feed(hello())
    assert (host.link.state, host.link.output(100)) == (LinkState.WAITING, b"")


def test_a_port_that_is_closed_loses_the_link_and_its_jobs_until_it_is_opened(host: Host) -> None:
    job, seen = host.run()
    host.link.opened(False)
    assert host.link.problem.startswith("the agent in the guest closed its port")
    assert seen.told == [JobResult(kind=JobEnd.LOST, reason=host.link.problem)]
    assert job.is_over
    assert host.link.output(100) == b""
    with pytest.raises(AgentError, match="closed its port"):
        host.run()
    host.link.opened(True)
    assert (host.link.state, host.link.problem) == (LinkState.WAITING, "")
    with pytest.raises(AgentError, match="has come forward yet"):
        host.run()
    host.link.feed(hello())
    assert host.states == [LinkState.READY, LinkState.LOST, LinkState.WAITING, LinkState.READY]
    # The old job stays over, and says nothing into the new link.
    host.sent()
    job.write(b"x")
    job.kill(9)
    job.close_input()
    job.consumed(1, 5)
    assert host.sent() == []


def test_a_port_that_is_closed_before_hello_is_still_waited_for() -> None:
    host = Host()
    host.link.opened(True)
    host.link.feed(hello()[:9])
    host.link.opened(False)
    host.link.opened(True)
    host.link.feed(hello())
    assert host.states == [LinkState.READY]


def test_a_job_sends_its_order_its_input_and_its_end(host: Host) -> None:
    job, seen = host.run()
    job.write(b"x" * 40000)
    job.close_input()
    job.close_input()
    frames = host.sent()
    assert [kind for kind, *_ in frames] == [FrameType.RUN, *[FrameType.DATA] * 3]
    assert b"".join(payload for *_, payload in frames[1:]) == b"x" * 40000
    assert frames[-1] == (FrameType.DATA, 0, job.id, b"")
    assert job.room == 0
    with pytest.raises(ValueError, match="1 bytes for a job that takes 0"):
        job.write(b"x")
    host.link.feed(frame(FrameType.EXIT, 0, job.id, EXIT.pack(0, 0, 0, 3)))
    assert seen.told == [JobResult(kind=JobEnd.EXITED, value=3)]


def test_input_waits_for_credit(host: Host) -> None:
    job, seen = host.run()
    job.write(b"x" * WINDOW)
    with pytest.raises(ValueError, match="takes 0"):
        job.write(b"x")
    host.link.feed(frame(FrameType.CREDIT, 0, job.id, U32.pack(1000)))
    assert (seen.told, job.room) == (["room"], 1000)


def test_credit_is_given_back_in_portions_for_what_is_consumed(host: Host) -> None:
    job, _ = host.run()
    host.sent()
    for _ in range(4):
        host.link.feed(frame(FrameType.DATA, 1, job.id, b"x" * 50000))
    job.consumed(1, WINDOW // 4 - 1)
    assert host.sent() == []
    job.consumed(1, 1)
    assert host.sent() == [(FrameType.CREDIT, 1, job.id, U32.pack(WINDOW // 4))]
    with pytest.raises(ValueError, match="has not sent"):
        job.consumed(1, 200000)


def test_an_ended_stream_needs_no_credit(host: Host) -> None:
    job, _ = host.run()
    host.sent()
    host.link.feed(frame(FrameType.DATA, 1, job.id, b"x" * 65536) * 2)
    host.link.feed(frame(FrameType.DATA, 1, job.id))
    job.consumed(1, 131072)
    assert host.sent() == []


def test_the_same_signal_waits_once_however_often_it_is_asked_for(host: Host) -> None:
    job, _ = host.run()
    for _ in range(10000):
        job.kill(15)
    job.kill(9)
    assert [(kind, payload[:1]) for kind, _, _, payload in host.sent()[1:]] == [
        (FrameType.KILL, b"\x0f"), (FrameType.KILL, b"\x09"),
    ]
    job.kill(15)
    assert len(host.sent()) == 1
    with pytest.raises(AgentError, match="a signal of Linux is 1 to 64, not 0"):
        job.kill(0)


def test_no_more_jobs_are_begun_than_the_agent_takes() -> None:
    host = Host()
    host.link.opened(True)
    host.link.feed(hello(jobs=2))
    first, _ = host.run()
    host.run()
    with pytest.raises(AgentError, match="has 2 jobs, as many as it takes: wait for one to end"):
        host.run()
    host.link.feed(frame(FrameType.EXIT, 0, first.id, EXIT.pack(0, 0, 0, 0)))
    assert host.link.free_jobs == 1
    host.run()


def test_wake_is_called_when_there_is_output_after_there_was_none(host: Host) -> None:
    host.wakes = 0
    host.run()
    host.run()
    assert host.wakes == 1
    host.link.sent(3)
    host.run()
    assert host.wakes == 1
    host.link.sent(1 << 20)
    host.run()
    assert host.wakes == 2


def test_output_is_given_again_until_it_is_sent(host: Host) -> None:
    host.run()
    whole = host.link.output(1 << 20)
    assert host.link.output(5) == whole[:5]
    host.link.sent(5)
    assert host.link.output(1 << 20) == whole[5:]


def test_pings_are_answered_in_any_order_and_bounded(host: Host) -> None:
    pongs: list[int] = []
    for index in range(MAX_PINGS):
        host.link.ping(lambda index=index: pongs.append(index))  # type: ignore[misc]
    with pytest.raises(AgentError, match="has not answered 16 signs of life"):
        host.link.ping(lambda: None)
    for _, _, _, payload in reversed(host.sent()):
        host.link.feed(frame(FrameType.PONG, 0, 0, payload))
    assert pongs == list(reversed(range(MAX_PINGS)))


def test_numbers_of_jobs_are_used_again_but_never_those_that_run(host: Host) -> None:
    host.link._last_id = 0xFFFF_FFFE
    ids = [host.run()[0].id for _ in range(3)]
    assert ids == [0xFFFF_FFFF, 1, 2]
    host.link._last_id = 0xFFFF_FFFE
    assert host.run()[0].id == 3


def test_events_may_use_the_link(host: Host) -> None:
    """A job that begins the next one as it ends, and one that closes the port."""
    after = Seen()

    class Chain(Seen):
        def on_exit(self, result: JobResult) -> None:
            host.link.run(CAT, after)
            host.link.opened(False)

    job = host.link.run(CAT, Chain())
    end = frame(FrameType.EXIT, 0, job.id, EXIT.pack(0, 0, 0, 0))
    host.link.feed(end + end + b"junk")
    assert [getattr(told, "kind", None) for told in after.told] == [JobEnd.LOST]
    assert host.link.state is LinkState.LOST


EXITED = EXIT.pack(0, 0, 0, 0)
LIES: dict[str, tuple[Callable[[int], bytes], str]] = {
    "long frame": (lambda n: HEADER.pack(65537, 2, 1, n), "a frame of 65537 bytes; the limit is"),
    "unknown": (lambda n: frame(99, 0, n), "a frame of unknown type 99"),
    "host's": (lambda n: frame(FrameType.RUN, 0, n), "a frame of unknown type 17"),
    "second hello": (lambda n: hello(), "a second HELLO"),
    "data of none": (lambda n: frame(2, 1, n + 1, b"x"), "DATA for job {next}, which does not run"),
    "credit of none": (lambda n: frame(3, 0, 0, U32.pack(1)), "CREDIT for job 0, which does not"),
    "exit of none": (lambda n: frame(4, 0, n, EXITED) * 2, "EXIT for job {job}, which does not"),
    "input": (lambda n: frame(2, 0, n, b"x"), "data on stream 0, which its job does not have"),
    "behind": (lambda n: frame(2, 1, n) + frame(2, 1, n, b"x"), "data behind the end of stream 1"),
    "two ends": (lambda n: frame(2, 2, n) * 2, "data behind the end of stream 2"),
    "flood": (lambda n: frame(2, 1, n, b"x" * 65536) * 5, "more data on stream 1 than it had"),
    "credit": (lambda n: frame(3, 0, n, U32.pack(1)), "1 bytes of credit on stream 0, more than"),
    "no credit": (lambda n: frame(3, 0, n, U32.pack(0)), "0 bytes of credit"),
    "odd credit": (lambda n: frame(3, 0, n, b"123"), "CREDIT of 3 bytes"),
    "wrong credit": (lambda n: frame(3, 1, n, U32.pack(1)), "1 bytes of credit on stream 1"),
    "short exit": (lambda n: frame(4, 0, n, b"1234567"), "EXIT of 7 bytes"),
    "long exit": (lambda n: frame(4, 0, n, EXITED + bytes(1025)), "EXIT of 1033 bytes"),
    "end": (lambda n: frame(4, 0, n, EXIT.pack(3, 0, 0, 1)), "EXIT with end 3, value 1"),
    "status": (lambda n: frame(4, 0, n, EXIT.pack(0, 0, 0, 256)), "EXIT with end 0, value 256"),
    "signal": (lambda n: frame(4, 0, n, EXIT.pack(1, 0, 0, 65)), "EXIT with end 1, value 65"),
    "errno": (lambda n: frame(4, 0, n, EXIT.pack(2, 0, 0, 0)), "EXIT with end 2, value 0"),
    "pong": (lambda n: frame(FrameType.PONG, 0, 0, b"\1\0\0\0"), "PONG without a PING"),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("is_cut", [False, True])
def test_a_guest_that_breaks_the_protocol_loses_the_link_with_one_line(
    host: Host, lie: str, is_cut: bool
) -> None:
    job, seen = host.run()
    make, problem = LIES[lie]
    said = make(job.id)
    for piece in (said[: len(said) // 2], said[len(said) // 2 :]) if is_cut else (said,):
        host.link.feed(piece)
    begin = "the agent in the guest broke its protocol: it sent "
    assert host.link.problem.startswith(begin + problem.format(job=job.id, next=job.id + 1))
    assert host.states == [LinkState.READY, LinkState.LOST]
    ends = [told for told in seen.told if isinstance(told, JobResult)]
    assert len(ends) == 1
    assert ends[0].kind is JobEnd.LOST or lie == "exit of none"
    # All else is dropped.
    host.link.feed(hello() + b"x" * 100000)
    assert host.link.output(1) == b""
    assert len(host.link._in) == 0


@pytest.mark.parametrize(("said", "problem"), [
    (hello(version=0), "version 0 of the protocol; this host speaks 2"),
    (hello(jobs=0), "HELLO with 0 jobs at a time and a window of 262144 bytes"),
    (hello(jobs=17), "HELLO with 17 jobs"),
    (hello(window=4095), "window of 4095 bytes"),
    (hello(window=WINDOW + 1), "window of 262145 bytes"),
    (hello(text=b"x" * 1025), "HELLO of 1041 bytes"),
    (HEADER.pack(65537, 1, 0, 0) + GUEST_MAGIC, "a frame of 65537 bytes"),
    (frame(FrameType.HELLO, 0, 0, GUEST_MAGIC), "HELLO of 8 bytes"),
])
def test_a_hello_that_cannot_be_is_refused(said: bytes, problem: str) -> None:
    host = Host()
    host.link.opened(True)
    host.link.feed(said)
    assert host.link.state is LinkState.LOST
    assert problem in host.link.problem


def test_a_newer_agent_is_told_the_version_of_the_host() -> None:
    host = Host()
    host.link.opened(True)
    host.link.feed(hello(version=7))
    assert host.link.state is LinkState.READY
    assert START.unpack(host.sent()[0][3]) == (HOST_MAGIC, VERSION)


def test_a_guests_reason_is_printable(host: Host) -> None:
    _, seen = host.run()
    reason = b"\x1b]0;mine\x07\n\xff"
    host.link.feed(frame(FrameType.EXIT, 0, 1, EXIT.pack(2, 0, 0, 2) + reason))
    (result,) = seen.told
    assert isinstance(result, JobResult)
    assert result.reason == r"\x1b]0;mine\x07\n\udcff"
