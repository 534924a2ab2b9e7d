"""Messages on a socket: framing, file descriptors, and everything a peer can do wrong."""

from __future__ import annotations

import itertools
import os
import select
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import PeerClosedError, VhostUserError
from pyvmm.vhost_user.channel import Channel, Message
from pyvmm.vhost_user.protocol import (
    HEADER,
    MAX_FDS,
    MAX_PAYLOAD,
    MEM_REGION,
    NEED_REPLY,
    REPLY,
    SINGLE_MEM_REGION,
    U64,
    VERSION,
    VRING_ADDR,
    VRING_STATE,
    BackendRequest,
    Request,
)
from tests.support.patience import patient
from tests.support.vhost_user_peers import PEER, open_fds, raw_message, send_raw


class Pair:
    """A channel, and the socket at its other end."""

    def __init__(self) -> None:
        self.sock, ours = socket.socketpair()
        self.channel = Channel(ours, peer=PEER)

    def close(self) -> None:
        self.sock.close()
        self.channel.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    before = open_fds()
    pair = Pair()
    yield pair
    pair.close()
    assert open_fds() == before


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    fds = os.pipe()
    yield fds
    for fd in fds:
        os.close(fd)


# What is right


def test_sizes_are_those_of_the_document() -> None:
    layouts = (HEADER, U64, VRING_STATE, VRING_ADDR, MEM_REGION, SINGLE_MEM_REGION)
    assert [layout.size for layout in layouts] == [12, 8, 8, 40, 32, 40]


def test_a_message_is_header_payload_and_fds(pair: Pair, pipe: tuple[int, int]) -> None:
    pair.channel.send(Request.SET_VRING_CALL, U64.pack(3), [pipe[1]], flags=NEED_REPLY)
    data, fds, _, _ = socket.recv_fds(pair.sock, 100, 8)
    assert data == struct.pack("=IIIQ", 13, 0b1001, 8, 3)
    os.write(fds[0], b"the same pipe")
    assert os.read(pipe[0], 100) == b"the same pipe"
    os.close(fds[0])


def test_what_is_sent_is_received(pair: Pair, pipe: tuple[int, int]) -> None:
    send_raw(pair.sock, raw_message(5, b"payload", flags=VERSION | REPLY), pipe)
    message = pair.channel.receive(1.0)
    assert (message.request, message.payload, message.name) == (5, b"payload", "SET_MEM_TABLE")
    assert message.is_reply
    assert not message.need_reply
    fds = message.fds
    assert len(fds) == 2
    assert not any(os.get_inheritable(fd) for fd in fds)
    message.close_fds()
    assert not message.fds
    message.close_fds()


def test_fds_that_were_taken_stay_open(pair: Pair, pipe: tuple[int, int]) -> None:
    send_raw(pair.sock, raw_message(12, U64.pack(0)), pipe[:1])
    message = pair.channel.receive(1.0)
    (fd,) = message.take_fds()
    message.close_fds()
    os.write(pipe[1], b"x")
    assert os.read(fd, 1) == b"x"
    os.close(fd)


def test_fds_stay_with_their_own_message(pair: Pair, pipe: tuple[int, int]) -> None:
    pair.sock.send(raw_message(1))
    send_raw(pair.sock, raw_message(12, U64.pack(0)), pipe)
    pair.sock.send(raw_message(13, U64.pack(0)))
    messages = [pair.channel.receive(1.0) for _ in range(3)]
    assert [len(message.fds) for message in messages] == [0, 2, 0]
    for message in messages:
        message.close_fds()


def test_a_message_in_pieces_is_kept_until_it_is_whole(
    pair: Pair, pipe: tuple[int, int]
) -> None:
    data = raw_message(37, bytes(40))
    send_raw(pair.sock, data[:1], pipe[:1])
    for byte in data[1:]:
        assert pair.channel.poll() is None
        assert pair.channel.is_mid_message
        pair.sock.send(bytes([byte]))
    message = pair.channel.poll()
    assert message is not None
    assert message.payload == bytes(40)
    assert len(message.fds) == 1
    message.close_fds()
    assert pair.channel.poll() is None


def test_between_messages_nothing_is_half(pair: Pair) -> None:
    assert not pair.channel.is_mid_message
    pair.sock.send(raw_message(1, b"abc"))
    assert pair.channel.poll() is not None
    assert not pair.channel.is_mid_message


def test_a_payload_may_be_empty_or_as_long_as_the_limit(pair: Pair) -> None:
    for payload in (b"", bytes(MAX_PAYLOAD)):
        pair.sock.send(raw_message(1, payload))
        assert pair.channel.receive(1.0).payload == payload


def test_unknown_requests_have_a_number_for_a_name(pair: Pair) -> None:
    pair.sock.send(raw_message(0xFFFF_FFFF))
    assert pair.channel.receive(1.0).name == "request 4294967295"


def test_each_direction_has_its_own_names() -> None:
    sock, ours = socket.socketpair()
    channel = Channel(ours, requests=BackendRequest)
    sock.send(raw_message(2))
    assert channel.receive(1.0).name == "CONFIG_CHANGE_MSG"
    channel.close()
    sock.close()


def test_a_payload_is_taken_apart_only_if_it_has_the_size(pair: Pair) -> None:
    pair.sock.send(raw_message(8, VRING_STATE.pack(1, 256)) + raw_message(8, bytes(7)))
    assert pair.channel.unpack(pair.channel.receive(1.0), VRING_STATE) == (1, 256)
    short = pair.channel.receive(1.0)
    with pytest.raises(VhostUserError, match="SET_VRING_NUM: payload of 7 bytes, not 8"):
        pair.channel.unpack(short, VRING_STATE)
    pair.sock.send(raw_message(1))
    assert pair.channel.receive(1.0).request == 1  # the framing was right


# What a peer can do wrong


def assert_broken(pair: Pair, problem: str, kind: type[VhostUserError] = VhostUserError) -> None:
    """The next message is an error that says ``problem``, and everything is from then on."""
    for _ in range(2):
        with pytest.raises(VhostUserError) as caught:
            pair.channel.receive(0.05, what="the reply to GET_FEATURES")
        assert str(caught.value) == f"{PEER}: {problem}"
        assert type(caught.value) is kind
    with pytest.raises(kind):
        pair.channel.send(Request.GET_FEATURES)
    with pytest.raises(kind):
        pair.channel.poll()


@pytest.mark.parametrize("version", [0, 2, 3])
def test_another_version_is_refused(
    pair: Pair, pipe: tuple[int, int], version: int
) -> None:
    send_raw(pair.sock, raw_message(1, flags=version), pipe)
    assert_broken(pair, f"GET_FEATURES: protocol version {version}, not 1")


@pytest.mark.parametrize("size", [MAX_PAYLOAD + 1, 0xFFFF_FFFF])
def test_an_oversized_message_is_refused_before_it_is_read(
    pair: Pair, pipe: tuple[int, int], size: int
) -> None:
    send_raw(pair.sock, raw_message(25, size=size), pipe)
    assert_broken(pair, f"SET_CONFIG: payload of {size} bytes, the limit is 4096")


def test_more_fds_than_a_message_may_have(pair: Pair, pipe: tuple[int, int]) -> None:
    send_raw(pair.sock, raw_message(5, bytes(8)), [pipe[0]] * (MAX_FDS + 1))
    assert_broken(
        pair,
        "the reply to GET_FEATURES: more file descriptors than 8, or than this process can open",
    )


def test_more_fds_than_a_message_may_have_in_pieces(
    pair: Pair, pipe: tuple[int, int]
) -> None:
    data = raw_message(5, bytes(8))
    for at in range(0, len(data), 4):
        send_raw(pair.sock, data[at : at + 4], [pipe[0]] * 3)
    assert_broken(
        pair,
        "the reply to GET_FEATURES: more file descriptors than 8, or than this process can open",
    )


def test_a_message_that_never_comes(pair: Pair) -> None:
    before_s = time.monotonic()
    assert_broken(pair, "the reply to GET_FEATURES did not come within 0.05 s")
    assert 0.05 <= time.monotonic() - before_s < patient(1)


@pytest.mark.parametrize("length", [1, 11, 12, 19])
def test_half_a_message_and_no_more(
    pair: Pair, pipe: tuple[int, int], length: int
) -> None:
    send_raw(pair.sock, raw_message(12, U64.pack(0))[:length], pipe)
    assert_broken(pair, "the reply to GET_FEATURES did not come whole within 0.05 s")


def test_a_peer_that_hangs_up(pair: Pair) -> None:
    pair.sock.close()
    assert_broken(
        pair, "the peer has hung up, the reply to GET_FEATURES was due", PeerClosedError
    )


def test_a_peer_that_hangs_up_in_the_middle_of_a_message(
    pair: Pair, pipe: tuple[int, int]
) -> None:
    send_raw(pair.sock, raw_message(12, U64.pack(0))[:15], pipe)
    pair.sock.close()
    assert_broken(
        pair,
        "the peer has hung up in the middle of a message, the reply to GET_FEATURES was due",
        PeerClosedError,
    )


def test_a_peer_that_hangs_up_with_our_message_unread(pair: Pair) -> None:
    pair.channel.send(Request.SET_OWNER)
    pair.sock.close()
    assert_broken(
        pair, "the peer has hung up, the reply to GET_FEATURES was due", PeerClosedError
    )


def test_a_peer_that_hangs_up_before_we_send(pair: Pair) -> None:
    pair.sock.close()
    with pytest.raises(PeerClosedError, match="the peer has hung up, before SET_OWNER"):
        pair.channel.send(Request.SET_OWNER)


@pytest.mark.parametrize("timeout_s", [0.0, 0.05])
def test_a_peer_that_does_not_read(pair: Pair, timeout_s: float) -> None:
    def fill() -> None:
        for _ in range(10_000):
            pair.channel.send(Request.SET_CONFIG, bytes(MAX_PAYLOAD), timeout_s=timeout_s)

    with pytest.raises(VhostUserError, match="SET_CONFIG: the peer does not read what it is sent"):
        fill()
    with pytest.raises(VhostUserError, match="does not read"):
        pair.channel.poll()


def test_a_peer_that_clears_o_nonblock(pair: Pair) -> None:
    """Who has given us the socket shares the flag; nothing rests on it."""
    os.set_blocking(pair.channel.fileno(), True)
    assert pair.channel.poll() is None

    def talk() -> None:
        for _ in range(10_000):
            pair.channel.send(Request.SET_CONFIG, bytes(MAX_PAYLOAD))

    with pytest.raises(VhostUserError, match="the peer does not read what it is sent"):
        talk()


def test_hanging_up_is_heard_by_whoever_waits_for_the_socket(pair: Pair) -> None:
    assert not select.select([pair.channel], [], [], 0)[0]
    pair.channel.hang_up("enough")
    assert select.select([pair.channel], [], [], 0)[0]
    assert pair.sock.recv(1) == b""
    for _ in range(2):
        with pytest.raises(VhostUserError, match=f"^{PEER}: enough$"):
            pair.channel.poll()


def test_a_closed_channel_says_so(pair: Pair) -> None:
    pair.channel.close()
    assert pair.channel.fileno() == -1
    with pytest.raises(VhostUserError, match="the connection is closed"):
        pair.channel.send(Request.SET_OWNER)
    pair.channel.close()


def test_closing_drops_the_fds_of_half_a_message(pair: Pair, pipe: tuple[int, int]) -> None:
    send_raw(pair.sock, raw_message(12, U64.pack(0))[:3], pipe)
    assert pair.channel.poll() is None  # the fixture counts file descriptors


# Any bytes, in any pieces

MESSAGES = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 5, 37, 1 << 31]),
        st.sampled_from([VERSION, VERSION | REPLY, VERSION | NEED_REPLY, 0xFFFF_FFFD, 0, 2]),
        st.binary(max_size=20),
        st.sampled_from([0, 0, 0, -1, 1, MAX_PAYLOAD]),
    ),
    max_size=4,
)


@settings(max_examples=80, deadline=None)
@given(messages=MESSAGES, tail=st.binary(max_size=14), cuts=st.lists(st.integers(1, 30)),
       with_fd=st.lists(st.booleans(), max_size=8))
def test_bytes_mean_the_same_in_whatever_pieces_they_come(
    messages: list[tuple[int, int, bytes, int]], tail: bytes, cuts: list[int], with_fd: list[bool]
) -> None:
    data = tail.join(
        raw_message(request, payload, flags=flags, size=max(0, len(payload) + lie))
        for request, flags, payload, lie in messages
    )
    before = open_fds()
    whole = received(data, [], [])
    assert received(data, cuts, with_fd) == whole
    assert open_fds() == before


def received(data: bytes, cuts: list[int], with_fd: list[bool]) -> list[str]:
    """What a channel makes of ``data``, cut into pieces, some of which bring a file descriptor."""
    pair, pieces = Pair(), []
    for cut in cuts:
        pieces.append(data[:cut])
        data = data[cut:]
    pieces.append(data)
    seen: list[str] = []
    flags = itertools.chain(with_fd, itertools.repeat(False))
    null = os.open(os.devnull, os.O_RDONLY)
    try:
        for piece, has_fd in zip(pieces, flags, strict=False):
            if piece:
                send_raw(pair.sock, piece, [null] if has_fd else [])
            while message := pair.channel.poll():
                seen.append(shown(message))
        pair.sock.close()
        while message := pair.channel.poll():
            seen.append(shown(message))
    except VhostUserError as error:
        seen.append(str(error))
    finally:
        os.close(null)
        pair.close()
    return seen


def shown(message: Message) -> str:
    message.close_fds()
    return f"{message.request} {message.flags} {message.payload.hex()}"
