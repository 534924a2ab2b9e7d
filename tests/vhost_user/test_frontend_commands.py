"""What the front end says to have a back end do something, and what it makes of the answers."""

from __future__ import annotations

import contextlib
import socket
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import RequestRefusedError, VhostUserError
from pyvmm.memory import GuestMemory
from pyvmm.vhost_user.frontend import Frontend
from pyvmm.vhost_user.protocol import (
    CONFIG,
    PROTOCOL_FEATURES,
    U64,
    VERSION,
    VRING_STATE,
    MemoryRegion,
    ProtocolFeature,
    Request,
)
from tests.support.vhost_user_peers import (
    ALL_PROTOCOL_FEATURES,
    PEER,
    ScriptedBackend,
    connected,
    open_fds,
    raw_message,
    send_raw,
)

REGION = MemoryRegion(0x1000, 0x2000, 0x7F00_0000_0000, 0)
OTHER_REGION = MemoryRegion(0x10_0000, 0x1000, 0x7F00_1000_0000, 0x4000)
NO_ACK = ALL_PROTOCOL_FEATURES & ~ProtocolFeature.REPLY_ACK
NO_SLOTS = ALL_PROTOCOL_FEATURES & ~ProtocolFeature.CONFIGURE_MEM_SLOTS

# Commands


def test_features_keep_the_protocol_features(peer: ScriptedBackend) -> None:
    frontend = connected(peer)
    peer.acknowledge(Request.SET_FEATURES)
    frontend.set_features(0x1_0000_0000)
    assert peer.said() == [f"SET_FEATURES? {U64.pack(0x1_4000_0000).hex()}"]


def test_a_refusal_is_an_error_and_no_more(peer: ScriptedBackend) -> None:
    frontend = connected(peer)
    peer.acknowledge(Request.SET_FEATURES, status=1)
    with pytest.raises(
        RequestRefusedError, match=r"SET_FEATURES: the back end refuses it \(status 0x1\)"
    ):
        frontend.set_features(0)
    peer.acknowledge(Request.SET_FEATURES)
    frontend.set_features(0)


def test_a_back_end_without_acknowledgements_is_asked_something_else(
    peer: ScriptedBackend, eventfd_pair: tuple[int, int]
) -> None:
    frontend = connected(peer, protocol_features=NO_ACK)
    peer.say_number(Request.GET_FEATURES, PROTOCOL_FEATURES)
    frontend.add_region(REGION, eventfd_pair[0])
    texts = peer.said()
    assert texts[0].startswith("ADD_MEM_REG* ")
    assert texts[1:] == ["GET_FEATURES"]


@pytest.mark.parametrize(
    ("request_", "payload", "flags", "problem"),
    [
        (2, U64.pack(0), VERSION, "SET_FEATURES: answered by the request SET_FEATURES"),
        (3, U64.pack(0), 5, "SET_FEATURES: answered by the reply to SET_OWNER"),
        (99, U64.pack(0), 5, "SET_FEATURES: answered by the reply to request 99"),
        (2, b"", 5, "SET_FEATURES: payload of 0 bytes, not 8"),
        (2, bytes(12), 5, "SET_FEATURES: payload of 12 bytes, not 8"),
        (2, U64.pack(0), 6, "SET_FEATURES: protocol version 2, not 1"),
    ],
)
def test_wrong_replies_end_the_session(
    peer: ScriptedBackend, request_: int, payload: bytes, flags: int, problem: str
) -> None:
    frontend = connected(peer)
    send_raw(peer.sock, raw_message(request_, payload, flags=flags))
    for _ in range(2):
        with pytest.raises(VhostUserError) as caught:
            frontend.set_features(0)
        assert str(caught.value) == f"{PEER}: {problem}"
    with pytest.raises(VhostUserError, match=problem):
        frontend.stop_queue(0)


def test_a_reply_with_fds_ends_the_session(
    peer: ScriptedBackend, eventfd_pair: tuple[int, int]
) -> None:
    frontend = connected(peer)
    peer.say(Request.SET_FEATURES, U64.pack(0), eventfd_pair)
    with pytest.raises(VhostUserError, match="SET_FEATURES: the reply brings file descriptors"):
        frontend.set_features(0)


# Configuration space


def test_configuration_is_read_from_its_beginning(peer: ScriptedBackend) -> None:
    frontend = connected(peer)
    space = bytes(range(36))
    peer.say(Request.GET_CONFIG, CONFIG.pack(0, 36, 0) + space)
    assert frontend.get_config(32, 4) == space[32:]
    assert peer.said() == [f"GET_CONFIG {CONFIG.pack(0, 36, 0).hex()}{bytes(36).hex()}"]


def test_configuration_is_written_where_it_is(peer: ScriptedBackend) -> None:
    frontend = connected(peer)
    peer.acknowledge(Request.SET_CONFIG)
    frontend.set_config(32, b"\1")
    assert peer.said() == [f"SET_CONFIG? {CONFIG.pack(32, 1, 0).hex()}01"]


@pytest.mark.parametrize(
    ("payload", "problem"),
    [
        (bytes(7), "reply of 7 bytes, not 20"),
        (CONFIG.pack(0, 8, 0) + bytes(9), "reply of 21 bytes, not 20"),
        (CONFIG.pack(0, 7, 0) + bytes(8), "the reply is about other bytes"),
        (CONFIG.pack(1, 8, 0) + bytes(8), "the reply is about other bytes"),
    ],
)
def test_wrong_configuration(peer: ScriptedBackend, payload: bytes, problem: str) -> None:
    frontend = connected(peer)
    peer.say(Request.GET_CONFIG, payload)
    for _ in range(2):
        with pytest.raises(VhostUserError, match=f"GET_CONFIG: {problem}"):
            frontend.get_config(0, 8)


def test_configuration_that_is_not_there(peer: ScriptedBackend) -> None:
    frontend = connected(peer)
    peer.say(Request.GET_CONFIG)
    with pytest.raises(RequestRefusedError, match="has no 72 bytes of configuration"):
        frontend.get_config(60, 12)
    with pytest.raises(ValueError, match="the limit is 256"):
        frontend.get_config(250, 7)
    peer.say(Request.GET_CONFIG, CONFIG.pack(0, 1, 0) + b"x")
    assert frontend.get_config(0, 1) == b"x"


# Memory


def test_regions_come_and_go(peer: ScriptedBackend, eventfd_pair: tuple[int, int]) -> None:
    frontend = connected(peer)
    peer.acknowledge(Request.ADD_MEM_REG, Request.REM_MEM_REG)
    frontend.add_region(REGION, eventfd_pair[0])
    frontend.remove_region(REGION)
    payload = struct.pack("=QQQQQ", 0, *REGION).hex()
    assert peer.said() == [f"ADD_MEM_REG*? {payload}", f"REM_MEM_REG? {payload}"]


def test_a_back_end_without_slots_gets_whole_tables(
    peer: ScriptedBackend, eventfd_pair: tuple[int, int]
) -> None:
    frontend = connected(peer, protocol_features=NO_SLOTS)
    assert frontend.max_mem_regions == 8
    peer.acknowledge(*[Request.SET_MEM_TABLE] * 3)
    frontend.add_region(REGION, eventfd_pair[0])
    frontend.add_region(OTHER_REGION, eventfd_pair[1])
    frontend.remove_region(REGION)

    def table(*regions: MemoryRegion) -> str:
        packed = (struct.pack("=QQQQ", *region) for region in regions)
        return (struct.pack("=II", len(regions), 0) + b"".join(packed)).hex()

    assert peer.said() == [
        f"SET_MEM_TABLE*? {table(REGION)}",
        f"SET_MEM_TABLE**? {table(REGION, OTHER_REGION)}",
        f"SET_MEM_TABLE*? {table(OTHER_REGION)}",
    ]
    frontend.close()


@pytest.mark.parametrize("protocol_features", [ALL_PROTOCOL_FEATURES, NO_SLOTS])
def test_a_region_that_is_refused_is_not_shared(
    peer: ScriptedBackend, eventfd_pair: tuple[int, int], protocol_features: int
) -> None:
    frontend = connected(peer, protocol_features=protocol_features)
    slots = protocol_features & ProtocolFeature.CONFIGURE_MEM_SLOTS
    request = Request.ADD_MEM_REG if slots else Request.SET_MEM_TABLE
    peer.acknowledge(request, status=22)
    with pytest.raises(RequestRefusedError, match=f"{request.name}: the back end refuses it"):
        frontend.add_region(REGION, eventfd_pair[0])
    with pytest.raises(ValueError, match="is not shared"):
        frontend.remove_region(REGION)
    peer.acknowledge(request)
    frontend.add_region(REGION, eventfd_pair[0])
    with pytest.raises(ValueError, match="is shared already"):
        frontend.add_region(REGION, eventfd_pair[0])
    peer.said()
    frontend.close()


def test_more_regions_than_the_back_end_takes(
    peer: ScriptedBackend, eventfd_pair: tuple[int, int]
) -> None:
    frontend = connected(peer, mem_slots=1)
    peer.acknowledge(Request.ADD_MEM_REG)
    frontend.add_region(REGION, eventfd_pair[0])
    with pytest.raises(VhostUserError, match="takes no more than 1 memory regions"):
        frontend.add_region(OTHER_REGION, eventfd_pair[0])
    peer.said()


# Queues


def start_queue(frontend: Frontend, eventfd_pair: tuple[int, int], index: int = 1) -> None:
    """Hand over a queue."""
    frontend.start_queue(
        index, size=128, descriptor=0x1000, driver=0x2000, device=0x3000, base=7,
        kick_fd=eventfd_pair[0], call_fd=eventfd_pair[1],
    )  # fmt: skip


def test_a_queue_is_handed_over(peer: ScriptedBackend, eventfd_pair: tuple[int, int]) -> None:
    frontend = connected(peer)
    requests = [
        Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.SET_VRING_ADDR,
        Request.SET_VRING_CALL, Request.SET_VRING_KICK, Request.SET_VRING_ENABLE,
    ]  # fmt: skip
    peer.acknowledge(*requests)
    start_queue(frontend, eventfd_pair)
    assert peer.said() == [
        f"SET_VRING_NUM? {struct.pack('=II', 1, 128).hex()}",
        f"SET_VRING_BASE? {struct.pack('=II', 1, 7).hex()}",
        # Descriptor table, used ring, available ring, log.
        f"SET_VRING_ADDR? {struct.pack('=IIQQQQ', 1, 0, 0x1000, 0x3000, 0x2000, 0).hex()}",
        f"SET_VRING_CALL*? {U64.pack(1).hex()}",
        f"SET_VRING_KICK*? {U64.pack(1).hex()}",
        f"SET_VRING_ENABLE? {struct.pack('=II', 1, 1).hex()}",
    ]


def test_without_protocol_features_a_ring_needs_no_enabling(
    peer: ScriptedBackend, eventfd_pair: tuple[int, int]
) -> None:
    frontend = connected(peer, protocol_features=None)
    for _ in range(5):
        peer.say_number(Request.GET_FEATURES, 0)
    start_queue(frontend, eventfd_pair)
    assert [text.split()[0] for text in peer.said()][::2] == [
        "SET_VRING_NUM", "SET_VRING_BASE", "SET_VRING_ADDR", "SET_VRING_CALL*", "SET_VRING_KICK*",
    ]  # fmt: skip


def test_a_ring_address_that_is_refused(
    peer: ScriptedBackend, eventfd_pair: tuple[int, int]
) -> None:
    frontend = connected(peer)
    peer.acknowledge(Request.SET_VRING_NUM, Request.SET_VRING_BASE)
    peer.acknowledge(Request.SET_VRING_ADDR, status=1)
    with pytest.raises(RequestRefusedError, match="SET_VRING_ADDR: the back end refuses it"):
        start_queue(frontend, eventfd_pair)
    frontend.check()


def test_a_queue_is_taken_back(peer: ScriptedBackend) -> None:
    frontend = connected(peer)
    peer.say(Request.GET_VRING_BASE, VRING_STATE.pack(1, 0x8003_8007))
    assert frontend.stop_queue(1) == 0x8003_8007
    assert peer.said() == [f"GET_VRING_BASE {VRING_STATE.pack(1, 0).hex()}"]


def test_stopping_may_take_longer_than_other_things(peer: ScriptedBackend) -> None:
    frontend = connected(peer)
    before_s = time.monotonic()
    with pytest.raises(VhostUserError, match=r"reply to GET_VRING_BASE did not come within 0\.1 s"):
        frontend.stop_queue(0)
    assert time.monotonic() - before_s >= 0.1


def test_the_base_of_another_queue(peer: ScriptedBackend) -> None:
    frontend = connected(peer)
    peer.say(Request.GET_VRING_BASE, VRING_STATE.pack(0, 0))
    for _ in range(2):
        with pytest.raises(VhostUserError, match="the reply is about queue 0, not 1"):
            frontend.stop_queue(1)


# Any answers

ANSWERS = st.lists(
    st.one_of(
        st.binary(max_size=30),
        st.builds(
            raw_message,
            st.sampled_from([1, 2, 11, 24, 25, 37, 38, 8]),
            st.one_of(st.just(bytes(8)), st.just(U64.pack(1)), st.binary(max_size=24)),
            flags=st.sampled_from([5, 5, 5, 5, 1, 13, 6]),
        ),
    ),
    max_size=6,
)


@settings(max_examples=80, deadline=None)
@given(answers=ANSWERS, with_fds=st.booleans(),
       protocol_features=st.sampled_from([ALL_PROTOCOL_FEATURES, NO_ACK, NO_SLOTS]))
def test_whatever_a_back_end_answers_is_taken_or_is_an_error(
    answers: list[bytes], with_fds: bool, protocol_features: int
) -> None:
    before = open_fds()
    with (
        ScriptedBackend() as peer,
        connected(peer, protocol_features=protocol_features) as frontend,
        GuestMemory([(0, 0x1000)], shared=True) as memory,
    ):
        fd = memory.fd
        assert fd is not None
        for answer in filter(None, answers):
            send_raw(peer.sock, answer, [fd] if with_fds else [])
        peer.sock.shutdown(socket.SHUT_WR)
        for command in (
            lambda: frontend.set_features(0),
            lambda: frontend.get_config(0, 8),
            lambda: frontend.add_region(REGION, fd),
            lambda: frontend.set_config(0, b"x"),
            lambda: frontend.remove_region(REGION),
            lambda: frontend.stop_queue(0),
            frontend.check,
        ):
            # ValueError: a region that could not be added cannot be removed.
            with contextlib.suppress(VhostUserError, ValueError):
                command()
        peer.said()
        with pytest.raises(VhostUserError):  # at the latest that it has hung up
            frontend.check()
    assert open_fds() == before
