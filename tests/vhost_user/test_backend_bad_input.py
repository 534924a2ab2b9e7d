"""Our back end with a front end that means ill: one clear error each, nothing leaked, and the
front end beside it unharmed."""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.vhost_user.protocol import (
    CONFIG,
    MAX_PAYLOAD,
    MEM_TABLE,
    NEED_REPLY,
    PROTOCOL_FEATURES,
    REPLY,
    SINGLE_MEM_REGION,
    U64,
    VERSION,
    VRING_ADDR,
    VRING_NO_FD,
    VRING_STATE,
    Request,
)
from pyvmm.vhost_user.session import HALF_MESSAGE_S, MESSAGES_PER_TURN
from pyvmm.virtio.spec import Feature
from tests.support.vhost_pair import IN, Pair
from tests.support.vhost_rig import (
    ALL_PROTOCOL,
    FEATURES,
    PACKED,
    QUEUE_SIZE,
    RAM_BYTES,
    USER_BASE,
    ScriptedFrontend,
    held,
)
from tests.support.virtio_driver import RAM_BASE, readable, writable

FIRST, NONE = U64.pack(0), U64.pack(VRING_NO_FD)
REGION = SINGLE_MEM_REGION.pack(0, 4096, 0, 0)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    before = held()
    pair = Pair(tmp_path / "s")
    yield pair
    pair.rig.close()
    assert held() == before


def message(request: int, payload: bytes = b"", *, flags: int = VERSION, size: int = -1) -> bytes:
    """A message whose ``size`` may be a lie."""
    return struct.pack("=III", request, flags, len(payload) if size < 0 else size) + payload


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (message(Request.GET_FEATURES, flags=0), "GET_FEATURES: protocol version 0, not 1"),
        (message(Request.GET_FEATURES, flags=3), "protocol version 3"),
        (message(Request.SET_FEATURES, size=MAX_PAYLOAD + 1), f"payload of {MAX_PAYLOAD + 1}"),
        (message(Request.SET_FEATURES, size=0xFFFF_FFFF), f"the limit is {MAX_PAYLOAD}"),
        (message(Request.GET_FEATURES, flags=VERSION | REPLY), "a reply that nobody asked for"),
        (message(Request.SET_FEATURES, b"1234"), "SET_FEATURES: payload of 4 bytes, not 8"),
        (message(Request.SET_OWNER, b"x"), "SET_OWNER: payload of 1 bytes, not 0"),
        (message(Request.SET_MEM_TABLE, b"x"), "SET_MEM_TABLE: a payload of 1 bytes"),
        (message(Request.SET_MEM_TABLE, MEM_TABLE.pack(1, 0)), "0 file descriptors for 1 regions"),
        (message(Request.SET_MEM_TABLE, MEM_TABLE.pack(0xFFFF_FFFF, 0)), "4294967295 regions"),
        (message(Request.SET_VRING_ADDR, bytes(39)), "SET_VRING_ADDR: payload of 39 bytes, not 40"),
        (message(Request.GET_CONFIG, b"short"), "GET_CONFIG: a payload of 5 bytes"),
        (message(Request.GET_CONFIG, CONFIG.pack(0, 9, 0) + b"x"), "GET_CONFIG: a payload of 13"),
        (message(Request.SET_CONFIG, CONFIG.pack(0, 0, 0) + b"x"), "SET_CONFIG: a payload of 13"),
        (message(Request.SET_VRING_KICK, FIRST), "SET_VRING_KICK: 0 file descriptors, not 1"),
        (message(Request.ADD_MEM_REG, REGION), "ADD_MEM_REG: 0 file descriptors, not 1"),
        (message(Request.SET_BACKEND_REQ_FD), "SET_BACKEND_REQ_FD: 0 file descriptors, not 1"),
    ],
)
def test_malformed_messages_end_the_connection(pair: Pair, data: bytes, problem: str) -> None:
    pair.bad.negotiate()
    pair.bad.raw(data)
    pair.assert_hung_up(problem)


@pytest.mark.parametrize(
    ("request_", "payload", "count", "wanted"),
    [
        (Request.GET_FEATURES, b"", 1, "1 file descriptors, not 0"),
        (Request.SET_FEATURES, U64.pack(FEATURES), 8, "8 file descriptors, not 0"),
        (Request.SET_VRING_CALL, FIRST, 2, "2 file descriptors, not 1"),
        (Request.SET_VRING_ERR, NONE, 1, "1 file descriptors, not 0"),
        (Request.ADD_MEM_REG, REGION, 2, "2 file descriptors, not 1"),
        (Request.REM_MEM_REG, REGION, 2, "2 file descriptors, not 0 to 1"),
        (Request.SET_MEM_TABLE, MEM_TABLE.pack(1, 0) + REGION[8:], 3, "3 file descriptors for 1"),
    ],
)
def test_too_many_file_descriptors(
    pair: Pair, request_: int, payload: bytes, count: int, wanted: str
) -> None:
    pair.bad.negotiate()
    pair.bad.raw(message(request_, payload), [pair.bad.ram_fd] * count)
    pair.assert_hung_up(wanted)


def test_more_file_descriptors_than_a_message_may_have(pair: Pair) -> None:
    pair.bad.raw(message(Request.SET_OWNER), [pair.bad.ram_fd] * 40)
    pair.assert_hung_up("more file descriptors than 8")


REFUSED = [
    (Request.SET_FEATURES, U64.pack(FEATURES | 1 << 63), "bits 0x8000000000000000 were not"),
    (Request.SET_FEATURES, U64.pack(FEATURES | int(Feature.RING_RESET)), "bits 0x10000000000 "),
    (Request.SET_FEATURES, U64.pack(0), "VIRTIO_F_VERSION_1 was not accepted"),
    (Request.SET_PROTOCOL_FEATURES, U64.pack(ALL_PROTOCOL | 2), "bits 0x2 were not offered"),
    (Request.SET_VRING_NUM, VRING_STATE.pack(2, 4), "ring 2 of 2"),
    (Request.SET_VRING_NUM, VRING_STATE.pack(0xFFFF_FFFF, 4), "ring 4294967295 of 2"),
    (Request.SET_VRING_NUM, VRING_STATE.pack(0, 0), "size 0 of ring 0 is not within 1 to 16"),
    (Request.SET_VRING_NUM, VRING_STATE.pack(0, 17), "size 17 of ring 0 is not within 1 to 16"),
    (Request.SET_VRING_BASE, VRING_STATE.pack(2, 0), "ring 2 of 2"),
    (Request.SET_VRING_ENABLE, VRING_STATE.pack(9, 1), "ring 9 of 2"),
    (Request.SET_VRING_ADDR, VRING_ADDR.pack(7, 0, 0, 0, 0, 0), "ring 7 of 2"),
    (Request.SET_VRING_ADDR, VRING_ADDR.pack(0, 0, 64, 0, 0, 0), "ring 0 at 0x40, which is in no"),
    (Request.SET_VRING_KICK, NONE, "no file descriptor, and this back end does not poll"),
    (Request.SET_VRING_CALL, U64.pack(VRING_NO_FD | 255), "ring 255 of 2"),
    (Request.REM_MEM_REG, REGION, "is not mapped"),
    (Request.SET_LOG_BASE, bytes(16), "this back end does not serve it"),
    (Request.GET_INFLIGHT_FD, bytes(24), "this back end does not serve it"),
    (Request.SET_STATUS, FIRST, "this back end does not serve it"),
    (999, b"", "this back end does not serve it"),
]


@pytest.mark.parametrize(("request_", "payload", "problem"), REFUSED)
def test_what_is_refused_is_acknowledged_so(
    pair: Pair, request_: int, payload: bytes, problem: str
) -> None:
    pair.bad.negotiate()
    assert pair.bad.ack(request_, payload) == 1
    pair.assert_reported(problem)
    assert not pair.bad.is_closed()
    assert U64.unpack(pair.bad.ask(Request.GET_QUEUE_NUM))[0] == 2


@pytest.mark.parametrize(("request_", "payload", "problem"), REFUSED)
def test_what_is_refused_without_reply_ack_ends_the_connection(
    pair: Pair, request_: int, payload: bytes, problem: str
) -> None:
    pair.bad.negotiate()
    pair.bad.send(request_, payload)
    pair.assert_hung_up(problem)


@pytest.mark.parametrize(
    ("request_", "payload", "feature"),
    [
        (Request.GET_CONFIG, CONFIG.pack(0, 1, 0) + b"x", "CONFIG"),
        (Request.SET_CONFIG, CONFIG.pack(0, 1, 0) + b"x", "CONFIG"),
        (Request.GET_MAX_MEM_SLOTS, b"", "CONFIGURE_MEM_SLOTS"),
        (Request.REM_MEM_REG, REGION, "CONFIGURE_MEM_SLOTS"),
        (Request.RESET_DEVICE, b"", "RESET_DEVICE"),
    ],
)
def test_what_was_not_negotiated(
    pair: Pair, request_: int, payload: bytes, feature: str
) -> None:
    pair.bad.negotiate(protocol=0)
    pair.bad.send(request_, payload, flags=NEED_REPLY)
    pair.assert_hung_up(f"the protocol feature {feature} was not negotiated")


def ask_one_fd(bad: ScriptedFrontend, request: int, payload: bytes, fd: int) -> int:
    """Give ``fd``, close our own, and return the acknowledgement."""
    answer = bad.ack(request, payload, [fd])
    os.close(fd)
    return answer


def test_file_descriptors_that_are_no_eventfds(pair: Pair, tmp_path: Path) -> None:
    pair.bad.negotiate()
    for request_ in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
        for fd in (
            os.open(tmp_path, os.O_RDONLY),
            os.open("/dev/null", os.O_RDWR),
            os.memfd_create("x", os.MFD_CLOEXEC),
            os.pidfd_open(os.getpid()),
        ):
            assert ask_one_fd(pair.bad, request_, FIRST, fd) == 1
            assert "the file descriptor is no eventfd: it is " in pair.rig.reports.pop()
    assert ask_one_fd(pair.bad, Request.SET_BACKEND_REQ_FD, b"", os.eventfd(0)) == 1
    assert "is no socket" in pair.rig.reports.pop()
    with socket.socket(socket.AF_INET) as inet:
        assert pair.bad.ack(Request.SET_BACKEND_REQ_FD, b"", [inet.fileno()]) == 1
    pair.assert_reported("is no Unix stream socket")


def test_a_kick_that_comes_too_early(pair: Pair) -> None:
    bad = pair.bad
    bad.send(Request.SET_PROTOCOL_FEATURES, U64.pack(ALL_PROTOCOL))
    kick = [bad.kick_fds[0]]
    assert bad.ack(Request.SET_VRING_KICK, FIRST, kick) == 1
    assert "ring 0 has had no SET_VRING_NUM and SET_VRING_ADDR" in pair.rig.reports.pop()
    bad.share()
    driver = bad.driver()
    bad.set_up(driver)
    assert bad.ack(Request.SET_VRING_KICK, FIRST, kick) == 0
    assert bad.ack(Request.SET_VRING_ENABLE, VRING_STATE.pack(0, 1)) == 1
    pair.assert_reported("ring 0 cannot start before SET_FEATURES")
    assert bad.ack(Request.SET_FEATURES, U64.pack(int(Feature.VERSION_1))) == 0
    assert driver.request(IN, 5, room=512).data == b"\5" * 512


@pytest.mark.parametrize(
    ("where", "problem"),
    [
        ({"descriptor": USER_BASE + 8}, "the descriptor table at 0x100008 is not aligned to 16"),
        ({"descriptor": USER_BASE + RAM_BYTES - 16}, "the descriptor table: guest memory 0x1ffff0"),
        ({"avail": USER_BASE + 1}, "the available ring at 0x100001 is not aligned to 2"),
        ({"used": USER_BASE + RAM_BYTES - 4}, "the used ring: guest memory 0x1ffffc+0x86"),
        ({"base": 3}, "ring base 3 is not within"),
        ({"size": 3}, "queue size 3 is not a power of 2"),
    ],
)
def test_rings_that_cannot_be(pair: Pair, where: dict[str, int], problem: str) -> None:
    bad = pair.bad
    bad.negotiate(int(Feature.VERSION_1))
    bad.share()
    driver = bad.driver()
    bad.memory.write_int(driver.used + 2, 2, 0xFF00)
    size = where.get("size", QUEUE_SIZE)
    assert bad.ack(Request.SET_VRING_NUM, VRING_STATE.pack(0, size)) == 0
    base = where.get("base", 0xFF00)
    assert bad.ack(Request.SET_VRING_BASE, VRING_STATE.pack(0, base)) == 0
    user = [
        where.get(name, gpa - RAM_BASE + USER_BASE)
        for name, gpa in (
            ("descriptor", driver.desc), ("used", driver.used), ("avail", driver.avail)
        )
    ]
    assert bad.ack(Request.SET_VRING_ADDR, VRING_ADDR.pack(0, 0, *user, 0)) == 0
    assert bad.ack(Request.SET_VRING_ENABLE, VRING_STATE.pack(0, 1)) == 0
    assert bad.ack(Request.SET_VRING_KICK, FIRST, [bad.kick_fds[0]]) == 1
    pair.assert_reported(f"SET_VRING_KICK: ring 0: {problem}")
    bad.kick()
    assert len(pair.rig.reports) == 1


def test_a_running_ring_is_not_changed(pair: Pair) -> None:
    bad = pair.bad
    driver = bad.start(int(Feature.VERSION_1))
    assert bad.ack(Request.SET_VRING_ADDR, bad.addresses(driver)) == 0
    moved = VRING_ADDR.pack(0, 0, USER_BASE, USER_BASE + 1024, USER_BASE + 2048, 0)
    for request_, payload in (
        (Request.SET_VRING_NUM, VRING_STATE.pack(0, 8)),
        (Request.SET_VRING_BASE, VRING_STATE.pack(0, 0)),
        (Request.SET_VRING_ADDR, moved),
    ):
        assert bad.ack(request_, payload) == 1
        assert f"{request_.name}: ring 0 runs" in pair.rig.reports.pop()
    features = U64.pack(PACKED & ~int(Feature.INDIRECT_DESC) | PROTOCOL_FEATURES)
    assert bad.ack(Request.SET_FEATURES, features) == 1
    pair.assert_reported("other features while ring 0 runs")
    assert driver.request(IN, 1, room=512).data == b"\1" * 512


def test_a_broken_ring_stops_alone(pair: Pair) -> None:
    bad = pair.bad
    driver = bad.start(int(Feature.VERSION_1))
    err = os.eventfd(0, os.EFD_NONBLOCK)
    assert bad.ack(Request.SET_VRING_ERR, FIRST, [err]) == 0
    assert driver.request(IN, 1, room=512).data == b"\1" * 512
    bad.memory.write_int(driver.avail + 2, 2, 1000)
    bad.kick()
    pair.assert_reported("ring 0 stopped until it is set up anew: avail.idx is 999 ahead")
    assert os.eventfd_read(err) == 1
    os.close(err)
    bad.kick()
    assert len(pair.rig.reports) == 1
    bad.stop()
    driver.restart()
    bad.set_up(driver)
    bad.run()
    assert driver.request(IN, 1, room=512).data == b"\1" * 512


def test_half_a_message_has_its_time(pair: Pair) -> None:
    data = message(Request.SET_FEATURES, U64.pack(FEATURES))
    pair.bad.raw(data[:5])
    assert pair.rig.delay_s == HALF_MESSAGE_S
    pair.rig.now_s += HALF_MESSAGE_S - 1
    pair.bad.raw(data[5:15])
    assert pair.rig.delay_s == 1
    pair.bad.raw(data[15:])
    assert pair.rig.waits_for_ever()
    pair.rig.now_s += 100
    pair.bad.raw(data[:13])
    assert not pair.bad.is_closed()
    pair.rig.now_s += HALF_MESSAGE_S
    pair.rig.turn()
    pair.assert_hung_up("half a message, and no more of it within 5 s")


def test_a_peer_that_closes_in_the_middle_of_a_message(pair: Pair) -> None:
    pair.bad.raw(message(Request.SET_FEATURES, size=8))
    pair.bad.hang_up()
    pair.assert_reported("the peer has hung up in the middle of a message")


def test_a_peer_that_does_not_read(pair: Pair) -> None:
    pair.bad.socket.setblocking(False)
    for _ in range(10_000):
        try:
            pair.bad.raw(message(Request.GET_FEATURES) * 50)
        except BlockingIOError:
            break
        if pair.rig.reports:
            break
    pair.assert_hung_up("GET_FEATURES: the peer does not read what it is sent")


def test_a_peer_that_never_stops_talking_has_its_turn_only(pair: Pair) -> None:
    count = 3 * MESSAGES_PER_TURN
    with pair.bad.socket.dup() as other:
        other.sendall(message(Request.SET_OWNER) * count + message(Request.GET_QUEUE_NUM))
    answered = select.poll()
    answered.register(pair.bad.socket, select.POLLIN)
    for _ in range(3):
        pair.rig.server.service()
        assert not answered.poll(0)
    pair.rig.server.service()
    assert U64.unpack(pair.bad.reply(Request.GET_QUEUE_NUM))[0] == 2


def test_a_chain_with_nowhere_to_write(pair: Pair) -> None:
    """Descriptors of a front end's guest are no more trusted than those of ours."""
    driver = pair.bad.start(int(Feature.VERSION_1))
    status = driver.status_byte()
    driver.submit([readable(driver.header(IN, 0), 16), writable(status, 1 << 31)])
    assert driver.reap() == [(0, 0)]
    assert pair.rig.reports == []
