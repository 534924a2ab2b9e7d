"""The front end's connection: the handshake, its end, and what a back end can spoil."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import PeerClosedError, VhostUserError
from pyvmm.vhost_user.frontend import Frontend
from pyvmm.vhost_user.protocol import (
    PROTOCOL_FEATURES,
    U64,
    VERSION,
    ProtocolFeature,
    Request,
)
from tests.support.vhost_rig import ExportRig
from tests.support.vhost_user_peers import (
    ALL_PROTOCOL_FEATURES,
    PEER,
    TIMEOUT_S,
    ScriptedBackend,
    connected,
    open_fds,
    raw_message,
    send_raw,
)

# The handshake


def test_the_handshake(peer: ScriptedBackend) -> None:
    peer.shake_hands(features=0x1_0000_0206, queues=4, mem_slots=32)
    frontend = Frontend(peer.channel)
    chosen = (
        ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIG
        | ProtocolFeature.CONFIGURE_MEM_SLOTS
    )  # fmt: skip
    assert peer.said() == [
        "SET_OWNER",
        "GET_FEATURES",
        "GET_PROTOCOL_FEATURES",
        f"SET_PROTOCOL_FEATURES {U64.pack(chosen).hex()}",
        "GET_QUEUE_NUM",
        "GET_MAX_MEM_SLOTS",
    ]
    assert frontend.features == 0x1_0000_0206
    assert (frontend.max_queues, frontend.max_mem_regions) == (4, 32)
    assert frontend.protocol_features == chosen
    assert frontend.peer == PEER
    frontend.close()


def test_a_back_end_without_protocol_features(peer: ScriptedBackend) -> None:
    frontend = connected(peer, features=2, protocol_features=None)
    assert (frontend.features, frontend.max_queues, frontend.max_mem_regions) == (2, 1, 8)
    peer.say_number(Request.GET_FEATURES, 2)
    frontend.set_features(2)
    assert peer.said() == [f"SET_FEATURES {U64.pack(2).hex()}", "GET_FEATURES"]
    with pytest.raises(VhostUserError, match="does not offer its configuration space"):
        frontend.get_config(0, 8)
    with pytest.raises(VhostUserError, match="does not offer its configuration space"):
        frontend.set_config(32, b"\1")


def test_more_queues_than_the_protocol_can_name(peer: ScriptedBackend) -> None:
    assert connected(peer, queues=1 << 40).max_queues == 256


@pytest.mark.parametrize(
    ("answers", "problem"),
    [
        ({"queues": 0}, "GET_QUEUE_NUM: 0 is less than 1"),
        ({"mem_slots": 0}, "GET_MAX_MEM_SLOTS: 0 is less than 1"),
    ],
)
def test_a_back_end_that_offers_nothing(
    peer: ScriptedBackend, answers: dict[str, int], problem: str
) -> None:
    with pytest.raises(VhostUserError, match=f"{PEER}: {problem}"):
        connected(peer, **answers)
    assert peer.channel.fileno() == -1


@pytest.mark.parametrize("answered", range(4))
def test_a_back_end_that_falls_silent_in_the_handshake(
    peer: ScriptedBackend, answered: int
) -> None:
    names = ["GET_FEATURES", "GET_PROTOCOL_FEATURES", "GET_QUEUE_NUM", "GET_MAX_MEM_SLOTS"]
    numbers = [PROTOCOL_FEATURES, ALL_PROTOCOL_FEATURES, 1, 8]
    for name, number in zip(names[:answered], numbers, strict=False):
        peer.say_number(Request[name], number)
    with pytest.raises(VhostUserError) as caught:
        Frontend(peer.channel, timeout_s=TIMEOUT_S)
    problem = f"the reply to {names[answered]} did not come within 0.05 s"
    if not answered:
        problem += " (is that a vhost-user back end?)"
    assert str(caught.value) == f"{PEER}: {problem}"
    assert peer.channel.fileno() == -1


def test_a_back_end_that_hangs_up_in_the_handshake(peer: ScriptedBackend) -> None:
    peer.say_number(Request.GET_FEATURES, PROTOCOL_FEATURES)
    peer.sock.shutdown(socket.SHUT_WR)
    with pytest.raises(
        PeerClosedError, match="has hung up, the reply to GET_PROTOCOL_FEATURES was due"
    ):
        Frontend(peer.channel)
    assert peer.channel.fileno() == -1


@settings(max_examples=60, deadline=None)
@given(data=st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.builds(
            raw_message, st.sampled_from([1, 15, 17, 36]), st.binary(min_size=8, max_size=9),
            flags=st.sampled_from([5, 5, 5, 1, 13]),
        ),
    ),
    max_size=5,
), with_fd=st.booleans())  # fmt: skip
def test_whatever_a_back_end_says_first_is_a_session_or_one_error(
    data: list[bytes], with_fd: bool
) -> None:
    before = open_fds()
    with ScriptedBackend() as peer, open(os.devnull) as null:  # noqa: PTH123
        for piece in filter(None, data):
            send_raw(peer.sock, piece, [null.fileno()] if with_fd else [])
        peer.sock.shutdown(socket.SHUT_WR)
        problem = ""
        try:
            frontend = Frontend(peer.channel)
        except VhostUserError as error:
            problem = str(error)
        else:
            assert frontend.max_queues >= 1
            frontend.close()
        assert not problem or problem.startswith(f"{PEER}: ")
    assert open_fds() == before


def test_no_socket(tmp_path: Path) -> None:
    with pytest.raises(VhostUserError, match=r"no-such: cannot connect .* No such file"):
        Frontend.connect(str(tmp_path / "no-such"))
    (tmp_path / "file").write_text("")
    for name in ("file", "."):
        with pytest.raises(VhostUserError, match=r"cannot connect .*: it is no socket$"):
            Frontend.connect(str(tmp_path / name))
    with pytest.raises(VhostUserError, match=r"^vhost-user socket: its path is empty$"):
        Frontend.connect("")
    with pytest.raises(VhostUserError, match=r"cannot .*its path has 200 bytes, the limit is 107$"):
        Frontend.connect("x" * 200)


def test_a_socket_that_is_left_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
    with pytest.raises(VhostUserError, match=r"cannot connect .*: Connection refused$"):
        Frontend.connect(path)
    monkeypatch.setenv("PYVMM_LAB", "1")  # where a socket of the host's is only a name
    with pytest.raises(VhostUserError, match=r"refused \(in the lab: sockets .* under /tmp"):
        Frontend.connect(path)


def test_a_back_end_that_is_in_use(tmp_path: Path) -> None:
    with ExportRig(tmp_path / "socket") as rig, ThreadPoolExecutor(1) as threads:
        rig.connect()
        connecting = threads.submit(Frontend.connect, rig.path)
        while not connecting.done():
            rig.turn()
            time.sleep(0.001)
        with pytest.raises(PeerClosedError, match=r"the back end has hung up.*may be in use\)"):
            connecting.result()


def test_a_socket_that_nobody_serves(tmp_path: Path) -> None:
    before = open_fds()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        with pytest.raises(VhostUserError, match="the reply to GET_FEATURES did not come"):
            Frontend.connect(str(tmp_path / "socket"), timeout_s=TIMEOUT_S)
    assert open_fds() == before


@pytest.mark.parametrize("makes_room", [True, False])
def test_a_back_end_that_is_slow_to_accept(tmp_path: Path, makes_room: bool) -> None:
    """Others are waiting, as many as its backlog holds: there may be room soon."""
    before = open_fds()
    with contextlib.ExitStack() as stack:

        def unix() -> socket.socket:
            return stack.enter_context(socket.socket(socket.AF_UNIX))

        listener, first = unix(), unix()
        listener.bind(str(tmp_path / "socket"))
        listener.listen(0)
        first.connect(str(tmp_path / "socket"))
        with pytest.raises(BlockingIOError):
            nonblocking(unix()).connect(str(tmp_path / "socket"))
        if makes_room:
            room = threading.Timer(0.1, lambda: stack.enter_context(listener.accept()[0]))
            room.start()
            stack.callback(room.join)
        problem = "reply to GET_FEATURES" if makes_room else "cannot connect .*its backlog is full"
        with pytest.raises(VhostUserError, match=problem):
            Frontend.connect(str(tmp_path / "socket"), timeout_s=0.3)
    assert open_fds() == before


def nonblocking(sock: socket.socket) -> socket.socket:
    sock.setblocking(False)
    return sock


# The connection


def test_looking_leaves_the_reply_to_whoever_waits_for_it(peer: ScriptedBackend) -> None:
    peer.shake_hands()
    frontend = Frontend(peer.channel, timeout_s=10)
    peer.heard()
    with ThreadPoolExecutor(2) as threads:
        setting = threads.submit(frontend.set_features, 0)
        while not peer.heard():
            time.sleep(0.001)
        looking = threads.submit(frontend.check)
        with pytest.raises(TimeoutError):
            looking.result(0.05)  # one exchange at a time: it waits for this one
        peer.acknowledge(Request.SET_FEATURES)
        setting.result(10)
        looking.result(10)


def test_a_back_end_that_is_quiet_is_well(peer: ScriptedBackend) -> None:
    frontend = connected(peer)
    frontend.check()
    assert frontend.fileno() == peer.channel.fileno()


def test_a_back_end_that_has_gone_is_told_again_and_again(peer: ScriptedBackend) -> None:
    frontend = connected(peer)
    peer.hang_up()
    for _ in range(2):
        with pytest.raises(PeerClosedError, match=f"^{PEER}: the peer has hung up$"):
            frontend.check()
    with pytest.raises(PeerClosedError, match="hung up"):
        frontend.set_features(0)
    with pytest.raises(PeerClosedError, match="hung up"):
        frontend.stop_queue(0)


@pytest.mark.parametrize("flags", [VERSION, VERSION | 4])
def test_a_back_end_that_says_what_nobody_asked(
    peer: ScriptedBackend, eventfd_pair: tuple[int, int], flags: int
) -> None:
    frontend = connected(peer)
    send_raw(peer.sock, raw_message(1, U64.pack(0), flags=flags), eventfd_pair)
    with pytest.raises(VhostUserError, match="GET_FEATURES: nobody has asked for it"):
        frontend.check()
    with pytest.raises(VhostUserError, match="nobody has asked"):
        frontend.check()


def test_a_session_that_was_closed(peer: ScriptedBackend) -> None:
    with connected(peer) as frontend:
        pass
    with pytest.raises(VhostUserError, match="the connection is closed"):
        frontend.check()
    frontend.close()
