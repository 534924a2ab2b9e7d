"""Our back end with a front end that means well: its rings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.vhost_user.protocol import (
    MEM_REGION,
    MEM_TABLE,
    PROTOCOL_FEATURES,
    U64,
    VRING_NO_FD,
    VRING_STATE,
    Request,
)
from pyvmm.virtio.block import BlockConfig, BlockDevice
from pyvmm.virtio.rate_limit import RateLimit
from pyvmm.virtio.spec import Feature
from tests.support.vhost_rig import (
    ALL_PROTOCOL,
    FEATURES,
    PACKED,
    QUEUE_SIZE,
    RAM_BYTES,
    ExportRig,
    ScriptedFrontend,
    held,
)
from tests.support.virtio_driver import RAM_BASE, readable, writable

IN, OUT, FLUSH = 0, 1, 4
WRITEBACK = 32
KINDS = pytest.mark.parametrize("features", [FEATURES, PACKED], ids=["split", "packed"])


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[ExportRig]:
    before = held()
    with ExportRig(tmp_path / "s") as rig:
        yield rig
    assert held() == before


@pytest.fixture
def frontend(rig: ExportRig) -> ScriptedFrontend:
    return rig.connect()


def test_what_is_offered(rig: ExportRig, frontend: ScriptedFrontend) -> None:
    offered = U64.unpack(frontend.ask(Request.GET_FEATURES))[0]
    device = BlockDevice(rig.config, rig.backend)
    assert offered == device.avail_features & ~int(Feature.RING_RESET) | PROTOCOL_FEATURES
    assert U64.unpack(frontend.ask(Request.GET_PROTOCOL_FEATURES))[0] == ALL_PROTOCOL
    assert U64.unpack(frontend.ask(Request.GET_QUEUE_NUM))[0] == 8
    frontend.negotiate()
    assert U64.unpack(frontend.ask(Request.GET_MAX_MEM_SLOTS))[0] == 32


@KINDS
def test_requests_are_served(rig: ExportRig, frontend: ScriptedFrontend, features: int) -> None:
    driver = frontend.start(features)
    for indirect in (False, True):
        assert driver.request(IN, 7, room=512, indirect=indirect) == (0, 513, b"\7" * 512)
        assert frontend.calls() == 1
    assert driver.request(OUT, 7, data=b"x" * 1024) == (0, 1, b"")
    assert driver.request(FLUSH) == (0, 1, b"")
    assert rig.disk[7 * 512 : 9 * 512] == b"x" * 1024
    assert rig.reports == []


@KINDS
def test_a_stopped_ring_goes_on_where_it_was(
    frontend: ScriptedFrontend, features: int
) -> None:
    driver = frontend.start(features)
    for turn in range(2 * QUEUE_SIZE):
        assert driver.request(IN, turn, room=512).data == bytes([turn]) * 512
        if turn % 5 == 4:
            base = frontend.stop()
            frontend.set_up(driver, base)
            frontend.run()
        elif turn % 5 == 2:
            for enable in (0, 1):
                payload = VRING_STATE.pack(0, enable)
                assert frontend.ack(Request.SET_VRING_ENABLE, payload) == 0


@KINDS
def test_what_waits_while_the_ring_is_stopped_needs_no_kick(
    frontend: ScriptedFrontend, features: int
) -> None:
    driver = frontend.start(features)
    base = frontend.stop()
    driver.place([readable(driver.header(FLUSH), 16), writable(driver.status_byte(), 1)])
    frontend.kick()
    assert driver.reap() == []
    frontend.set_up(driver, base)
    frontend.run()
    assert driver.reap() == [(0, 1)]
    assert frontend.calls() == 1


def test_a_disabled_ring_is_not_served(frontend: ScriptedFrontend) -> None:
    driver = frontend.start()
    assert frontend.ack(Request.SET_VRING_ENABLE, VRING_STATE.pack(0, 0)) == 0
    driver.submit([readable(driver.header(FLUSH), 16), writable(driver.status_byte(), 1)])
    assert driver.reap() == []
    assert frontend.ack(Request.SET_VRING_ENABLE, VRING_STATE.pack(0, 1)) == 0
    assert driver.reap() == [(0, 1)]


def test_without_protocol_features_rings_start_enabled(frontend: ScriptedFrontend) -> None:
    frontend.send(Request.SET_OWNER)
    frontend.send(Request.SET_FEATURES, U64.pack(FEATURES))
    table = MEM_TABLE.pack(1, 0) + MEM_REGION.pack(*frontend.region)
    frontend.send(Request.SET_MEM_TABLE, table, [frontend.ram_fd])
    driver = frontend.driver()
    frontend.send(Request.SET_VRING_NUM, VRING_STATE.pack(0, driver.size))
    frontend.send(Request.SET_VRING_ADDR, frontend.addresses(driver))
    frontend.send(Request.SET_VRING_KICK, U64.pack(0), [frontend.kick_fds[0]])
    frontend.send(Request.SET_VRING_CALL, U64.pack(0), [frontend.call_fds[0]])
    assert driver.request(IN, 1, room=512).data == b"\1" * 512


def test_a_late_call_eventfd_hears_of_what_was_used_before(frontend: ScriptedFrontend) -> None:
    driver = frontend.start()
    assert frontend.ack(Request.SET_VRING_CALL, U64.pack(VRING_NO_FD)) == 0
    assert driver.request(FLUSH).status == 0
    assert frontend.calls() == 0
    assert frontend.ack(Request.SET_VRING_CALL, U64.pack(0), [frontend.call_fds[0]]) == 0
    assert frontend.calls() == 1


def test_a_call_eventfd_that_is_full(frontend: ScriptedFrontend) -> None:
    driver = frontend.start()
    os.eventfd_write(frontend.call_fds[0], (1 << 64) - 2)
    assert driver.request(FLUSH).status == 0
    assert driver.request(FLUSH).status == 0


def test_a_kick_eventfd_that_is_never_empty(frontend: ScriptedFrontend) -> None:
    driver = frontend.start()
    os.eventfd_write(frontend.kick_fds[0], 1 << 40)
    for sector in range(5):
        assert driver.request(IN, sector, room=512).data == bytes([sector]) * 512


def test_a_kick_and_a_call_in_place_of_others(frontend: ScriptedFrontend) -> None:
    driver = frontend.start()
    frontend.kick_fds.reverse()
    frontend.call_fds.reverse()
    frontend.run()
    frontend.calls()
    assert driver.request(FLUSH).status == 0
    assert frontend.calls() == 1
    os.eventfd_write(frontend.kick_fds[7], 1)
    frontend.rig.turn()
    assert frontend.calls() == 0


def test_eight_queues(frontend: ScriptedFrontend) -> None:
    frontend.negotiate()
    frontend.share()
    for index in range(8):
        driver = frontend.driver(index)
        driver._top = RAM_BASE + index * (RAM_BYTES // 8)
        driver.desc, driver.avail = driver.alloc(256, 16), driver.alloc(64, 2)
        driver.used = driver.alloc(256, 4)
        frontend.set_up(driver)
        frontend.run(index)
        assert driver.request(IN, index, room=512).data == bytes([index]) * 512
        assert frontend.calls(index) == 1
    assert frontend.stop(3) == 1
    assert driver.request(IN, 9, room=512).data == b"\x09" * 512


def test_a_rate_limited_ring_stops_without_loss(tmp_path: Path) -> None:
    config = BlockConfig(queue_size=QUEUE_SIZE, rate_limit=RateLimit(ops_per_s=10, ops_burst=2))
    with ExportRig(tmp_path / "s", config=config) as rig:
        frontend = rig.connect()
        driver = frontend.start()
        for head in (0, 2, 4, 6):
            chain = [readable(driver.header(FLUSH), 16), writable(driver.status_byte(), 1)]
            driver.place(chain, head)
        frontend.kick()
        assert rig.delay_s == pytest.approx(0.1)
        assert driver.reap() == [(0, 1), (2, 1)]
        assert frontend.stop() == 2
        assert rig.delay_s is None
        frontend.set_up(driver, 2)
        frontend.run()
        assert driver.reap() == []
        rig.now_s += 0.1
        rig.turn()
        assert driver.reap() == [(4, 1)]
        rig.now_s += 0.2
        rig.turn()
        assert driver.reap() == [(6, 1)]
