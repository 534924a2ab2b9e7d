"""The vhost-user transport, against a back end that refuses, is gone, or is wicked.

What a back end can do wrong in messages is judged in ``tests/vhost_user/test_frontend.py``; here
is what becomes of it in the driver half.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.driver.errors import DeviceBrokenError, TransportError
from pyvmm.driver.memory import SharedMemory
from pyvmm.driver.vhost_user import VhostUserTransport
from pyvmm.vhost_user.channel import Message
from pyvmm.vhost_user.protocol import (
    U64,
    Request,
)
from tests.support.live_backend import REFUSED, LiveBackend, hang_up
from tests.support.patience import patient
from tests.support.vhost_user_queues import V1, fds_open, layouts, set_up

Act = Callable[[VhostUserTransport], object]

# Refusals change nothing


@pytest.mark.parametrize("request_", [
    Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.SET_VRING_ADDR,
    Request.SET_VRING_CALL, Request.SET_VRING_KICK, Request.SET_VRING_ENABLE,
])
def test_a_refused_queue_ends_those_before_it(
    backend: LiveBackend,
    transport: VhostUserTransport,
    memory: SharedMemory,
    request_: Request,
) -> None:
    def refuse_second(message: Message) -> bytes:
        return REFUSED if message.payload[0] == 1 else U64.pack(0)

    transport.negotiate(V1)
    transport.map_mem_region(memory.address, memory.length, memory.fd)
    before = fds_open()
    backend.answers[request_] = refuse_second
    with pytest.raises(TransportError, match=rf"disk\.sock: {request_.name}: .*refuses"):
        transport.setup_queues(layouts(memory))
    kept = sum(len(fds) for place, fds in backend.fds.items() if place > 7)
    assert len(fds_open()) == len(before) + kept  # what is left is the back end's
    assert backend.names[-2:] == ["GET_VRING_BASE", "GET_VRING_BASE"]
    del backend.answers[request_]
    transport.setup_queues(layouts(memory))
    transport.check()


def test_refused_features_and_memory(
    backend: LiveBackend, transport: VhostUserTransport, memory: SharedMemory
) -> None:
    backend.answers[Request.SET_FEATURES] = backend.answers[Request.ADD_MEM_REG] = REFUSED
    with pytest.raises(TransportError, match=r"SET_FEATURES: .*refuses"):
        transport.negotiate(V1)
    with pytest.raises(TransportError, match=r"ADD_MEM_REG: .*refuses"):
        transport.map_mem_region(memory.address, 4096, memory.fd)
    assert transport.acked_features == 0
    assert transport.regions == ()
    transport.check()


# A back end that is gone or wicked


ACTS: dict[Request, Act] = {
    Request.SET_FEATURES: lambda transport: transport.negotiate(V1),
    Request.GET_CONFIG: lambda transport: transport.get_config(0, 60),
}


@pytest.mark.parametrize("request_", ACTS)
def test_a_back_end_that_hangs_up_is_gone_for_good(
    backend: LiveBackend, transport: VhostUserTransport, request_: Request
) -> None:
    backend.answers[request_] = hang_up
    with pytest.raises(DeviceBrokenError, match=rf"disk\.sock: .*hung up.* {request_.name}"):
        ACTS[request_](transport)
    for act in (*ACTS.values(), VhostUserTransport.check):
        with pytest.raises(DeviceBrokenError, match="hung up"):
            act(transport)


@pytest.mark.parametrize("request_", ACTS)
def test_a_reply_that_never_comes(
    backend: LiveBackend, transport: VhostUserTransport, request_: Request
) -> None:
    backend.answers[request_] = None
    before_s = time.monotonic()
    with pytest.raises(DeviceBrokenError, match=rf"{request_.name} did not come within 0\.2 s"):
        ACTS[request_](transport)
    assert time.monotonic() - before_s < patient(2)
    with pytest.raises(DeviceBrokenError, match="did not come"):
        transport.check()


def test_a_queue_that_is_not_stopped_in_time(path: Path, memory: SharedMemory) -> None:
    with LiveBackend(path) as backend:
        backend.answers[Request.GET_VRING_BASE] = None
        with VhostUserTransport(path, stop_timeout_s=0.1) as transport:
            set_up(transport, memory)
            before_s = time.monotonic()
            transport.stop()
            assert 0.1 <= time.monotonic() - before_s < patient(2)
            with pytest.raises(DeviceBrokenError, match="GET_VRING_BASE did not come within"):
                transport.check()


def test_a_back_end_that_goes_while_queues_run(path: Path, memory: SharedMemory) -> None:
    before = fds_open()
    with LiveBackend(path) as backend:
        transport = VhostUserTransport(path)
        set_up(transport, memory)
        transport.check()
        backend.answers[Request.GET_CONFIG] = hang_up
        with pytest.raises(DeviceBrokenError):
            transport.get_config(0, 8)
        assert select.select([transport], [], [], 5)[0]
        for _ in range(2):
            with pytest.raises(DeviceBrokenError, match="hung up"):
                transport.check()
        transport.notify(0)  # harmless
        with pytest.raises(DeviceBrokenError, match="hung up"):
            transport.unmap_mem_region(memory.address, memory.length)
        transport.stop()
        transport.close()
    assert fds_open() == before


def test_a_back_end_that_speaks_unasked(
    backend: LiveBackend, transport: VhostUserTransport, memory: SharedMemory
) -> None:
    set_up(transport, memory)
    backend.say(Request.GET_FEATURES)
    assert select.select([transport], [], [], 5)[0]
    with pytest.raises(DeviceBrokenError, match="nobody has asked for it"):
        transport.check()


def test_a_handshake_that_fails_leaves_nothing_open(path: Path) -> None:
    before = fds_open()
    with LiveBackend(path) as backend:
        backend.answers[Request.GET_QUEUE_NUM] = hang_up
        with pytest.raises(TransportError, match=r"disk\.sock: .*hung up.* GET_QUEUE_NUM"):
            VhostUserTransport(path)
    assert fds_open() == before


def test_a_socket_nobody_listens_on(path: Path) -> None:
    before = fds_open()
    with pytest.raises(TransportError, match=r"disk\.sock: cannot connect .*: No such file"):
        VhostUserTransport(path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    with pytest.raises(TransportError, match="Connection refused"):
        VhostUserTransport(path)
    assert fds_open() == before


def test_what_no_message_could_say(
    backend: LiveBackend, transport: VhostUserTransport, path: Path
) -> None:
    with pytest.raises(TransportError, match="configuration 1000"):
        transport.get_config(1000, 8)
    for timeouts in ({"timeout_s": 0.0}, {"timeout_s": -1.0}, {"stop_timeout_s": 0.0}):
        with pytest.raises(TransportError, match="be patient"):
            VhostUserTransport(path, **timeouts)
    with pytest.raises(TransportError, match="path is empty") as caught:
        VhostUserTransport("")
    assert caught.value.__suppress_context__  # one line of what went wrong is enough
    transport.check()


def test_a_closed_transport(backend: LiveBackend, path: Path) -> None:
    transport = VhostUserTransport(path)
    transport.close()
    transport.close()
    for act in (*ACTS.values(), VhostUserTransport.check):
        with pytest.raises(TransportError, match="the transport is closed"):
            act(transport)
