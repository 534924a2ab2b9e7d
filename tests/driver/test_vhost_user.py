"""The vhost-user transport, against a back end that a test tells what to say: what is said.

What becomes of refusals, and of a back end that is gone or wicked, is in
``test_vhost_user_failures.py``.
"""

from __future__ import annotations

import os
import select
import struct
from pathlib import Path

import pytest

from pyvmm.driver.errors import TransportError
from pyvmm.driver.memory import SharedMemory
from pyvmm.driver.queue import VirtioBlkQueue
from pyvmm.driver.vhost_user import VhostUserTransport
from pyvmm.vhost_user.protocol import (
    MEM_REGION,
    MEM_TABLE,
    PROTOCOL_FEATURES,
    SINGLE_MEM_REGION,
    U64,
    VRING_ADDR,
    VRING_STATE,
    ProtocolFeature,
    Request,
)
from pyvmm.virtio.spec import BlockFeature, Feature
from tests.support.eventfds import MOST, fill, interrupted
from tests.support.live_backend import LiveBackend
from tests.support.vhost_user_queues import V1, layouts, set_up

# The handshake


def test_the_order_of_messages(backend: LiveBackend, path: Path, memory: SharedMemory) -> None:
    with VhostUserTransport(path) as transport:
        set_up(transport, memory, count=1)
        transport.unmap_mem_region(memory.address, memory.length)
    assert backend.names == [
        "SET_OWNER",
        "GET_FEATURES",
        "GET_PROTOCOL_FEATURES",
        "SET_PROTOCOL_FEATURES",
        "GET_QUEUE_NUM",
        "GET_MAX_MEM_SLOTS",
        "SET_FEATURES",
        "ADD_MEM_REG",
        "SET_VRING_NUM",
        "SET_VRING_BASE",
        "SET_VRING_ADDR",
        "SET_VRING_CALL",
        "SET_VRING_KICK",
        "SET_VRING_ENABLE",
        "REM_MEM_REG",
        "GET_VRING_BASE",
    ]


def test_what_the_device_has(transport: VhostUserTransport) -> None:
    assert transport.features == V1 | Feature.RING_PACKED
    assert transport.max_queues == 4
    assert transport.max_mem_regions == 32
    assert transport.max_queue_size == 1024


def test_the_configuration_space(backend: LiveBackend, transport: VhostUserTransport) -> None:
    space = bytes(range(60))
    backend.answers[Request.GET_CONFIG] = lambda asked: asked.payload[:12] + space
    assert transport.get_config(0, 60) == space
    assert transport.get_config(20, 40) == space[20:]


def test_a_configuration_space_that_is_too_short(
    backend: LiveBackend, transport: VhostUserTransport
) -> None:
    backend.answers[Request.GET_CONFIG] = b""
    with pytest.raises(TransportError, match="no 60 bytes of configuration"):
        transport.get_config(0, 60)
    transport.check()


# Memory


def test_memory_is_told_by_its_address_in_this_process(
    backend: LiveBackend, transport: VhostUserTransport, memory: SharedMemory
) -> None:
    start = memory.address + 4096
    transport.map_mem_region(start, 8192, memory.fd, 4096)
    told = SINGLE_MEM_REGION.unpack(backend.messages[-1].payload)
    assert told == (start, 8192, start, 4096)
    (fd,) = backend.brought_by(Request.ADD_MEM_REG)
    assert os.fstat(fd).st_ino == os.fstat(memory.fd).st_ino
    transport.unmap_mem_region(start, 8192)
    assert backend.names[-1] == "REM_MEM_REG"
    assert SINGLE_MEM_REGION.unpack(backend.messages[-1].payload) == told


def test_a_back_end_without_memory_slots_gets_tables(path: Path, memory: SharedMemory) -> None:
    features = ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIG
    with (
        LiveBackend(path, protocol_features=features) as backend,
        VhostUserTransport(path) as transport,
    ):
        assert (transport.max_queues, transport.max_mem_regions) == (1, 8)
        for offset in (0, 8192):
            transport.map_mem_region(memory.address + offset, 4096, memory.fd, offset)
        payload = backend.messages[-1].payload
        assert backend.names[-2:] == ["SET_MEM_TABLE", "SET_MEM_TABLE"]
        assert MEM_TABLE.unpack_from(payload) == (2, 0)
        assert [one[3] for one in MEM_REGION.iter_unpack(payload[8:])] == [0, 8192]


def test_a_region_too_many_is_not_sent(
    backend: LiveBackend, path: Path, memory: SharedMemory
) -> None:
    backend.answers[Request.GET_MAX_MEM_SLOTS] = U64.pack(1)
    with VhostUserTransport(path) as transport:
        transport.map_mem_region(memory.address, 4096, memory.fd)
        with pytest.raises(TransportError, match="one too many: the limit is 1"):
            transport.map_mem_region(memory.address + 4096, 4096, memory.fd, 4096)
        assert backend.names.count("ADD_MEM_REG") == 1


# Queues


@pytest.mark.parametrize("packed", [False, True])
def test_a_queue_as_it_is_told(
    backend: LiveBackend, transport: VhostUserTransport, memory: SharedMemory, packed: bool
) -> None:
    transport.negotiate(V1 | (int(Feature.RING_PACKED) if packed else 0))
    transport.map_mem_region(memory.address, memory.length, memory.fd)
    first, second = layouts(memory)
    transport.setup_queues([first, second])
    payloads = {
        message.name: message.payload for message in backend.messages  # the last of each
    }
    base = 0x8000_8000 if packed else 0
    assert VRING_STATE.unpack(payloads["SET_VRING_NUM"]) == (1, 16)
    assert VRING_STATE.unpack(payloads["SET_VRING_BASE"]) == (1, base)
    assert VRING_ADDR.unpack(payloads["SET_VRING_ADDR"]) == (
        1, 0, second.descriptor, second.device, second.driver, 0,
    )  # fmt: skip
    assert VRING_STATE.unpack(payloads["SET_VRING_ENABLE"]) == (1, 1)


def test_kick_and_call(
    backend: LiveBackend, transport: VhostUserTransport, memory: SharedMemory
) -> None:
    set_up(transport, memory)
    kicks, calls = (
        backend.brought_by(one) for one in (Request.SET_VRING_KICK, Request.SET_VRING_CALL)
    )
    transport.notify(1)
    assert select.select(kicks, [], [], 0)[0] == [kicks[1]]
    assert os.eventfd_read(transport.submission_fd(1)) == 1  # the same eventfd
    os.eventfd_write(calls[0], 1)
    fds = [transport.completion_fd(0), transport.completion_fd(1)]
    assert select.select(fds, [], [], 0)[0] == [fds[0]]
    assert os.eventfd_read(fds[0]) == 1


def test_a_kick_never_waits(transport: VhostUserTransport, memory: SharedMemory) -> None:
    """Whoever has the eventfd too can fill it up."""
    set_up(transport, memory)
    fill(transport.submission_fd(0), blocking=False)
    transport.notify(0)
    fill(transport.submission_fd(0))  # and clear O_NONBLOCK
    transport.notify(0)
    assert os.eventfd_read(transport.submission_fd(0)) == MOST
    transport.notify(0)
    assert os.eventfd_read(transport.submission_fd(0)) == 1


def test_a_kick_that_waits_all_the_same_is_ended_by_a_signal(
    transport: VhostUserTransport, memory: SharedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A back end may fill the eventfd up between the look for room and the write."""
    set_up(transport, memory)
    write = os.eventfd_write

    def fill_first(fd: int, value: int) -> None:
        monkeypatch.undo()
        fill(fd)
        write(fd, value)

    monkeypatch.setattr(os, "eventfd_write", fill_first)
    with interrupted():
        transport.notify(0)


@pytest.mark.parametrize("index", [-1, 2])
def test_a_queue_that_is_not_there(
    transport: VhostUserTransport, memory: SharedMemory, index: int
) -> None:
    set_up(transport, memory)
    for method in (transport.notify, transport.submission_fd, transport.completion_fd):
        with pytest.raises(TransportError, match=f"queue {index} is not set up; there are 2"):
            method(index)


def test_stopping_takes_every_queue_back_once(
    backend: LiveBackend, transport: VhostUserTransport, memory: SharedMemory
) -> None:
    set_up(transport, memory)
    transport.stop()
    transport.stop()
    asked = [message.payload for message in backend.messages if message.name == "GET_VRING_BASE"]
    assert asked == [VRING_STATE.pack(0, 0), VRING_STATE.pack(1, 0)]
    os.eventfd_write(transport.completion_fd(1), 1)  # still there, for what was completed


@pytest.mark.parametrize(("feature", "length"), [
    (0, 36), (BlockFeature.MQ, 36), (BlockFeature.DISCARD, 52), (BlockFeature.WRITE_ZEROES, 52),
])
def test_only_configuration_that_must_be_there_is_asked_for(
    backend: LiveBackend, path: Path, feature: int, length: int
) -> None:
    """A back end may refuse to show more than it has."""
    backend.answers[Request.GET_FEATURES] = U64.pack(V1 | feature | PROTOCOL_FEATURES)
    space = struct.pack("<QII18xH", 1000, 0, 62, 1).ljust(length, b"\0")
    backend.answers[Request.GET_CONFIG] = lambda message: (
        message.payload[:12] + space if len(message.payload) == 12 + length else b""
    )
    with VhostUserTransport(path) as transport:
        (queue,) = VirtioBlkQueue.setup_queues(transport, 1, 64)
        assert queue.capacity_bytes == 512_000
