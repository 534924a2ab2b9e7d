"""A disk that another process serves, behind virtio-mmio: what the guest is offered, and what
the back end is told, by the example of a scripted one."""

from __future__ import annotations

import os
import struct

import pytest

from pyvmm.errors import StateError, VhostUserError
from pyvmm.vhost_user.frontend import Frontend
from pyvmm.vhost_user.protocol import CONFIG, VRING_STATE, MemoryRegion, Request
from pyvmm.virtio.spec import BlockFeature, Feature, Register
from tests.support.vhost_user_disk import (
    FEATURES,
    RAM_BYTES,
    RING_REQUESTS,
    SPACE_BYTES,
    VERSION_1,
    Script,
    config_space,
    eventfds,
    is_readable,
    scripted,
)
from tests.support.vhost_user_peers import PEER, ScriptedBackend
from tests.support.virtio_driver import RAM_BASE

# What the guest is offered


def test_what_needs_more_than_a_kick_is_not_passed_on() -> None:
    everything = (1 << 64) - 1
    space = config_space(size_max=4096).ljust(72, b"\0")
    with scripted(features=everything, space=space) as script:
        offered = script.driver.offered
    assert offered & 0xFFFFFF == sum(BlockFeature)  # all that 5.2.3 has
    assert offered >> 24 == int(
        Feature.INDIRECT_DESC | Feature.EVENT_IDX | Feature.VERSION_1 | Feature.RING_PACKED
        | Feature.IN_ORDER | Feature.RING_RESET
    ) >> 24  # fmt: skip


def test_a_limit_of_no_bytes_is_none() -> None:
    features = FEATURES | BlockFeature.SIZE_MAX
    with scripted(features=features) as script:
        assert not script.driver.offered & BlockFeature.SIZE_MAX
    with scripted(features=features, space=config_space(size_max=4096)) as script:
        assert script.driver.offered & BlockFeature.SIZE_MAX


@pytest.mark.parametrize(
    ("wanted", "has", "features", "queues"),
    [(2, 4, FEATURES, 2), (4, 3, FEATURES, 3), (8, 8, FEATURES, 4), (2, 0, VERSION_1, 1)],
)
def test_queues_are_what_is_wanted_and_there(
    wanted: int, has: int, features: int, queues: int
) -> None:
    with scripted(features=features, space=config_space(queues=has), queues=wanted) as script:
        assert len(script.device.queues) == queues
        shown = int.from_bytes(script.device.read_config(34, 2), "little")
        assert shown == (queues if features & BlockFeature.MQ else has)


def test_configuration_space_is_the_back_ends(script: Script) -> None:
    space = script.device.read_config(0, 100)
    assert space[:SPACE_BYTES] == config_space(queues=2)
    assert space[SPACE_BYTES:] == bytes(100 - SPACE_BYTES)
    assert script.device.read_config(4096, 4) == bytes(4)
    assert script.device.capacity_sectors == 64
    assert script.transport.page[Register.CONFIG : Register.CONFIG + 8] == space[:8]


def test_a_chain_is_no_longer_than_a_queue() -> None:
    with scripted(space=config_space(seg_max=1022)) as script:
        assert script.device.read_config(12, 4) == struct.pack("<I", 254)


@pytest.mark.parametrize(
    ("feature", "length"),
    [(BlockFeature.FLUSH, 36), (BlockFeature.DISCARD, 57), (BlockFeature.WRITE_ZEROES, 57),
     (BlockFeature.SECURE_ERASE, 72)],
)  # fmt: skip
def test_only_configuration_that_must_be_there_is_asked_for(
    feature: BlockFeature, length: int
) -> None:
    with ScriptedBackend() as peer, eventfds(1) as fds:
        peer.shake_hands(features=VERSION_1 | feature)
        frontend = Frontend(peer.channel)
        peer.heard()
        peer.say(Request.GET_CONFIG, CONFIG.pack(0, length, 0) + bytes(length))
        fds.device(frontend)
        (question,) = peer.heard()
        assert question.payload == CONFIG.pack(0, length, 0) + bytes(length)


@pytest.mark.parametrize(
    ("features", "space", "problem"),
    [
        (0, config_space(), "a legacy device: it does not offer VIRTIO_F_VERSION_1"),
        (FEATURES, config_space(queues=0), "GET_CONFIG: num_queues is 0"),
        (FEATURES, None, "has no 36 bytes of configuration"),
    ],
)
def test_a_back_end_that_is_no_disk(features: int, space: bytes | None, problem: str) -> None:
    with ScriptedBackend() as peer, eventfds(1) as fds:
        peer.shake_hands(features=features)
        frontend = Frontend(peer.channel)
        answer = b"" if space is None else CONFIG.pack(0, len(space), 0) + space
        peer.say(Request.GET_CONFIG, answer)
        with pytest.raises(VhostUserError, match=f"{PEER}: .*{problem}"):
            fds.device(frontend)


# The life of the device


def test_the_queues_are_handed_over_at_driver_ok(script: Script) -> None:
    script.start()
    heard = script.heard()
    assert [name for name, _ in heard] == [
        "SET_FEATURES", "GET_CONFIG", "ADD_MEM_REG", *(request.name for request in RING_REQUESTS)
    ]  # fmt: skip
    payloads = dict(heard)
    (ram,) = script.memory.regions
    expected = MemoryRegion(RAM_BASE, RAM_BYTES, ram.host_address, 0)
    assert payloads["ADD_MEM_REG"] == struct.pack("=8xQQQQ", *expected)
    driver, shift = script.driver, ram.host_address - RAM_BASE
    assert payloads["SET_VRING_ADDR"] == struct.pack(
        "=IIQQQQ", 0, 0, driver.desc + shift, driver.used + shift, driver.avail + shift, 0
    )
    assert payloads["SET_VRING_NUM"] == VRING_STATE.pack(0, 16)
    assert payloads["SET_VRING_BASE"] == VRING_STATE.pack(0, 0)
    script.say_stopped()


def test_a_packed_ring_begins_with_its_wrap_counters_set() -> None:
    features = FEATURES | Feature.RING_PACKED
    with scripted(features=features) as script:
        script.say_negotiated()
        script.peer.acknowledge(Request.ADD_MEM_REG, *RING_REQUESTS)
        script.driver.negotiate(features)
        script.driver.setup_queue(avail=script.driver.used, used=script.driver.used + 4)
        script.driver.set(Register.STATUS, 15)
        assert dict(script.heard())["SET_VRING_BASE"] == VRING_STATE.pack(0, 0x8000_8000)
        script.say_stopped(0x8000_8000)


def test_a_reset_takes_the_queues_back_and_keeps_the_memory(script: Script) -> None:
    script.start()
    script.heard()
    script.say_stopped(3)
    script.driver.set(Register.STATUS, 0)
    assert script.names() == ["GET_VRING_BASE"]
    script.driver.set(Register.STATUS, 0)
    assert script.names() == []
    script.say_negotiated()
    script.peer.acknowledge(*RING_REQUESTS)
    script.driver.start(FEATURES)
    assert "ADD_MEM_REG" not in script.names()
    script.say_stopped()


def test_one_queue_is_reset_and_set_up_anew(script: Script) -> None:
    script.start()
    script.heard()
    script.say_stopped(5)
    script.driver.set(Register.QUEUE_RESET, 1)
    assert script.names() == ["GET_VRING_BASE"]
    script.driver.notify()  # no kick: there is no queue
    assert not is_readable(script.fds.kicks[0])
    script.peer.acknowledge(*RING_REQUESTS)
    script.driver.restart()
    script.driver.setup_queue()
    heard = dict(script.heard())
    assert list(heard) == [request.name for request in RING_REQUESTS]
    assert heard["SET_VRING_BASE"] == VRING_STATE.pack(0, 0)
    script.say_stopped()


def test_a_stopped_queue_says_where_its_ring_stands(script: Script) -> None:
    script.start()
    script.say_stopped(7)
    assert script.device.stop_queue(0) == 7
    assert not script.device.queues[0].ready
    assert script.device.stop_queue(0) == 0
    script.driver.notify()
    assert not is_readable(script.fds.kicks[0])


def test_a_notification_that_kvm_did_not_take_is_passed_on(script: Script) -> None:
    kick = script.fds.kicks[0]
    script.driver.notify()
    assert not is_readable(kick)
    script.start()
    script.driver.notify()
    script.driver.notify()
    assert os.eventfd_read(kick) == 2
    os.eventfd_write(kick, (1 << 64) - 2)  # the most a counter holds
    script.driver.notify()
    assert script.device.process_queue(0) is None
    assert os.eventfd_read(kick) == (1 << 64) - 2
    script.say_stopped()


def test_the_cache_mode_is_the_back_ends(script: Script) -> None:
    script.start()
    script.heard()
    script.peer.acknowledge(Request.SET_CONFIG)
    script.say_space(config_space(writeback=0))
    script.transport.write(Register.CONFIG + 32, 1, 0)
    assert script.heard()[0] == ("SET_CONFIG", CONFIG.pack(32, 1, 0) + b"\0")
    assert script.transport.read(Register.CONFIG + 32, 1) == 0
    script.peer.acknowledge(Request.SET_CONFIG, status=1)  # refused: nothing changes
    script.transport.write(Register.CONFIG + 32, 1, 1)
    assert script.transport.read(Register.CONFIG + 32, 1) == 0
    script.heard()
    for offset, value in ((0, 1), (32, 2), (33, 1)):
        script.transport.write(Register.CONFIG + offset, 1, value)
    assert script.names() == []
    script.say_stopped()


def test_the_cache_mode_is_not_switched_unasked(script: Script) -> None:
    script.transport.write(Register.CONFIG + 32, 1, 0)
    assert script.names() == []


def test_features_may_change_the_cache_mode(script: Script) -> None:
    script.say_negotiated(config_space(writeback=0))
    assert script.driver.negotiate(VERSION_1)
    assert script.transport.read(Register.CONFIG + 32, 1) == 0


def test_a_disk_that_grows(script: Script) -> None:
    script.say_space(config_space())
    assert not script.device.refresh()
    script.say_space(config_space(sectors=128))
    assert script.device.refresh()
    script.transport.config_changed()
    assert script.transport.read(Register.CONFIG, 4) == 128
    script.peer.say(Request.GET_CONFIG)
    assert not script.device.refresh()
    assert script.device.capacity_sectors == 128
    assert script.reasons == []


# State


def test_its_state_is_in_another_process_and_refused() -> None:
    with scripted() as script:
        script.driver.start(FEATURES)
        for act in (script.transport.save, lambda: script.transport.restore({})):
            with pytest.raises(StateError) as caught:
                act()
            assert "virtio block device" in str(caught.value)
        with pytest.raises(StateError, match="another process serves it"):
            script.transport.save()
