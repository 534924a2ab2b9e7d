"""The host's half of the notice to a clone: who is told, how often, and what older agents do."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest

from pyvmm.agent.clone import CLOCK_SET, HAS_HOOK, RESEEDED, CloneNotice, HookEnd
from pyvmm.agent.link import AgentLink, LinkState, RunRequest
from pyvmm.agent.protocol import EXIT, HEADER, ExitEnd, FrameType, frame
from pyvmm.errors import AgentError
from tests.agent.test_link import Seen, hello


class ClonedHost:
    """A link to the guest of a clone, and what it sent."""

    def __init__(self) -> None:
        self.clone_id: UUID | None = uuid4()
        self.sets_clock = False
        self.states: list[str] = []
        self.link = AgentLink(
            on_state=lambda: self.states.append(self.link.state), wake=lambda: None,
            notice=self._notice,
        )
        self.link.opened(True)

    def _notice(self) -> CloneNotice | None:
        if self.clone_id is None:
            return None
        return CloneNotice(clone_id=self.clone_id, sets_clock=self.sets_clock)

    def sent(self) -> list[tuple[int, int, bytes]]:
        """Take the output; return the frames: type, id, payload."""
        output, at, frames = self.link.output(1 << 20), 0, []
        self.link.sent(len(output))
        while at < len(output):
            length, kind, _, number = HEADER.unpack_from(output, at)
            at += HEADER.size + length
            frames.append((kind, number, output[at - length : at]))
        return frames

    def greet(self, version: int = 2) -> int:
        """An agent says HELLO; return the id of its notice, 0 without one."""
        self.link.feed(hello(version=version))
        frames = self.sent()
        assert frames[0][0] == FrameType.START
        return frames[1][1] if len(frames) > 1 else 0

    def answer(self, number: int, done: int, status: int = 0, output: bytes = b"") -> None:
        """The agent answers the notice."""
        self.link.feed(
            frame(FrameType.DATA, 1, number, bytes([done])) + frame(FrameType.DATA, 1, number)
            + (frame(FrameType.DATA, 2, number, output) if output else b"")
            + frame(FrameType.DATA, 2, number)
            + frame(FrameType.EXIT, 0, number, EXIT.pack(ExitEnd.EXITED, 0, 0, status))
        )


@pytest.fixture
def host() -> ClonedHost:
    return ClonedHost()


def test_an_agent_is_ready_only_after_its_answer(host: ClonedHost) -> None:
    number = host.greet()
    assert number
    assert host.states == []
    with pytest.raises(AgentError, match="has not yet dealt with being in a clone"):
        host.link.run(RunRequest(argv=("true",)), Seen())
    host.answer(number, RESEEDED | CLOCK_SET | HAS_HOOK, 0, b"warn")
    assert host.states == [LinkState.READY]
    clone = host.link.clone
    assert clone is not None
    assert (clone.is_reseeded, clone.is_clock_set, clone.hook) == (True, True, HookEnd.EXITED)
    assert (clone.clone_id, clone.output) == (host.clone_id, b"warn")
    host.link.run(RunRequest(argv=("true",)), Seen())


def test_no_two_notices_have_the_same_random_bytes(host: ClonedHost) -> None:
    assert host.clone_id is not None
    first = CloneNotice(clone_id=host.clone_id).payload()
    second = CloneNotice(clone_id=host.clone_id).payload()
    assert first[:32] == second[:32]
    assert len(first) == len(second) == 96
    assert first[32:] != second[32:]


def test_an_older_agent_takes_orders_and_the_host_knows_that_it_was_not_told(
    host: ClonedHost,
) -> None:
    assert host.greet(version=1) == 0
    assert host.link.state is LinkState.READY
    assert host.link.clone is not None
    assert not host.link.clone.is_told
    assert host.link.clone.problem == ""


def test_the_guest_of_no_clone_is_told_nothing(host: ClonedHost) -> None:
    host.clone_id = None
    assert host.greet() == 0
    assert host.link.state is LinkState.READY
    assert host.link.clone is None


def test_an_agent_that_comes_again_is_told_only_of_another_clone(host: ClonedHost) -> None:
    host.answer(host.greet(), 0)
    host.link.opened(False)
    host.link.opened(True)
    assert host.greet() == 0
    host.clone_id = uuid4()
    host.link.opened(True)
    number = host.greet()
    assert number
    assert host.link.is_due(host.clone_id)
    host.answer(number, HAS_HOOK, 7)
    assert not host.link.is_due(host.clone_id)
    assert host.link.clone is not None
    assert "exited with status 7" in host.link.clone.problem


def test_a_port_that_closes_before_the_answer_loses_the_link(host: ClonedHost) -> None:
    host.greet()
    host.link.opened(False)
    assert host.states == [LinkState.LOST]
    host.link.opened(True)
    assert host.states == [LinkState.LOST, LinkState.WAITING]
    assert host.greet()


def test_a_guest_that_floods_behind_the_flags_is_held_to_its_credit(host: ClonedHost) -> None:
    number = host.greet()
    for _ in range(100):
        host.link.feed(frame(FrameType.DATA, 1, number, bytes(65536)))
        host.sent()
    assert host.states == [], "a flood within its credit breaks no rule"
    host.answer(number, 0)
    assert host.states == [LinkState.READY]


@pytest.mark.parametrize("lie", [
    frame(FrameType.DATA, 0, 1, b"x"), frame(FrameType.HELLO, 0, 0, b"x"),
    frame(FrameType.EXIT, 0, 1, EXIT.pack(0, 0, 0, 999)), frame(99, 0, 1),
])
def test_a_guest_that_lies_instead_of_an_answer_loses_the_link(
    host: ClonedHost, lie: bytes
) -> None:
    assert host.greet() == 1
    host.link.feed(lie)
    assert host.link.state is LinkState.LOST
    assert "broke its protocol" in host.link.problem


def test_an_answer_without_flags_says_that_nothing_was_done(host: ClonedHost) -> None:
    number = host.greet()
    host.link.feed(frame(FrameType.EXIT, 0, number, EXIT.pack(ExitEnd.FAILED, 0, 0, 11) + b"busy"))
    clone = host.link.clone
    assert clone is not None
    assert (clone.is_reseeded, clone.hook) == (False, HookEnd.FAILED)
    assert clone.problem == "the hook for clones in the guest did not run: busy"
