"""Our back end and rings that a front end lays out wrongly, or offers wrongly: each is stopped
alone, with one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyvmm.vhost_user.protocol import U64, VRING_STATE, Request
from pyvmm.virtio.block import BlockConfig
from pyvmm.virtio.rate_limit import RateLimit
from pyvmm.virtio.spec import Feature
from tests.support.vhost_rig import FEATURES, PACKED, QUEUE_SIZE, ExportRig, ScriptedFrontend
from tests.support.virtio_driver import BlockDriver, readable, writable

IN, FLUSH = 0, 4
VERSION_1 = int(Feature.VERSION_1)


def start(frontend: ScriptedFrontend, driver: BlockDriver) -> int:
    """Set the ring of ``driver`` up; the acknowledgement of its start: 0 for success."""
    index = driver.index
    frontend.set_up(driver)
    assert frontend.ack(Request.SET_VRING_ENABLE, VRING_STATE.pack(index, 1)) == 0
    kick = [frontend.kick_fds[index]]
    return frontend.ack(Request.SET_VRING_KICK, U64.pack(index), kick)


@pytest.mark.parametrize("name", ["desc", "avail", "used"])
@pytest.mark.parametrize("features", [VERSION_1, PACKED], ids=["split", "packed"])
def test_fault_10_parts_of_a_ring_that_overlap(tmp_path: Path, features: int, name: str) -> None:
    with ExportRig(tmp_path / "s") as rig:
        frontend = rig.connect()
        frontend.negotiate(features)
        frontend.share()
        driver = frontend.driver()
        good = driver.desc, driver.avail, driver.used
        others = {"desc": driver.avail & ~15, "avail": driver.used, "used": driver.desc + 16}
        setattr(driver, name, others[name])
        assert start(frontend, driver) == 1
        (report,) = rig.reports
        assert "SET_VRING_KICK: ring 0: the " in report
        assert " overlaps the " in report
        driver.desc, driver.avail, driver.used = good
        assert start(frontend, driver) == 0
        assert driver.request(IN, 5, room=512).data == b"\5" * 512


@pytest.mark.parametrize("features", [VERSION_1, PACKED], ids=["split", "packed"])
def test_fault_10_a_ring_in_another_that_runs(tmp_path: Path, features: int) -> None:
    with ExportRig(tmp_path / "s") as rig:
        frontend = rig.connect()
        driver = frontend.start(features)
        other = frontend.driver(1)
        places = other.desc, other.avail, other.used
        other.desc, other.avail, other.used = (gpa + 0x8000 for gpa in places)
        other.used = driver.used
        assert start(frontend, other) == 1
        (report,) = rig.reports
        assert "SET_VRING_KICK: ring 1: the " in report
        assert report.endswith(" of another queue")
        assert driver.request(IN, 5, room=512).data == b"\5" * 512
        # Where the other ring was there is room once that has stopped.
        frontend.stop()
        frontend.memory.write(other.used, bytes(4))
        assert start(frontend, other) == 0


def test_fault_10_a_held_head_that_is_offered_again(tmp_path: Path) -> None:
    config = BlockConfig(queue_size=QUEUE_SIZE, rate_limit=RateLimit(ops_per_s=10, ops_burst=1))
    with ExportRig(tmp_path / "s", config=config) as rig:
        frontend = rig.connect()
        driver = frontend.start(FEATURES)
        err_fd = os.eventfd(0, os.EFD_NONBLOCK)
        assert frontend.ack(Request.SET_VRING_ERR, U64.pack(0), [err_fd]) == 0
        for head in (0, 2):
            chain = [readable(driver.header(FLUSH), 16), writable(driver.status_byte(), 1)]
            driver.place(chain, head)
        driver.notify()
        assert driver.reap() == [(0, 1)]
        assert rig.delay_s
        driver.offer(2)
        for _ in range(3):
            rig.now_s += 0.1
            rig.turn()
        assert driver.reap() == [(2, 1)], "once, because it was taken in time"
        (report,) = rig.reports
        assert "ring 0 stopped until it is set up anew: the same head is available twice" in report
        assert os.eventfd_read(err_fd) == 1
        os.close(err_fd)
