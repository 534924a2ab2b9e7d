"""Front ends that make the export wait in a write to an eventfd of theirs: the flag that forbids it
is theirs, too.  What ends the wait is a signal here, and ``pyvmm.run.serving`` in an export."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.vhost_user.protocol import U64, Request
from tests.support.eventfds import fill, interrupted
from tests.support.vhost_pair import Pair
from tests.support.vhost_rig import RAM_BYTES, held
from tests.support.virtio_driver import BlockDriver, readable, writable

IN = 0
PROBLEM = "an eventfd that it has filled up, and whose O_NONBLOCK it has cleared, held a write up"


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    before = held()
    pair = Pair(tmp_path / "s")
    with pair.rig:
        yield pair
    assert held() == before


def offer_read(driver: BlockDriver) -> None:
    status = driver.status_byte()
    driver.place([
        readable(driver.header(IN, 3), 16), writable(driver.alloc(512), 512), writable(status, 1)
    ])  # fmt: skip


def test_a_call_that_waits(pair: Pair) -> None:
    driver = pair.bad.start()
    fill(pair.bad.call_fds[0])
    offer_read(driver)
    with interrupted():
        pair.bad.kick()
    pair.assert_hung_up(PROBLEM)


def test_a_call_that_waits_when_it_is_given(pair: Pair) -> None:
    pair.bad.start()
    full = pair.bad.call_fds[1]
    fill(full)
    # The flag the export sets is cleared again before it writes: the worst case, made sure of.
    with pytest.MonkeyPatch.context() as patch, interrupted():
        patch.setattr(os, "set_blocking", lambda fd, blocking: None)
        pair.bad.send(Request.SET_VRING_CALL, U64.pack(0), [full])
    pair.assert_hung_up(PROBLEM)


def test_an_err_that_waits(pair: Pair) -> None:
    driver = pair.bad.start()
    err = pair.bad.call_fds[2]
    assert pair.bad.ack(Request.SET_VRING_ERR, U64.pack(0), [err]) == 0
    fill(err)
    driver.offer(9999)
    with interrupted():
        pair.bad.kick()
    stopped, hung_up = pair.rig.reports
    assert "ring 0 stopped until it is set up anew" in stopped
    assert PROBLEM in hung_up
    assert pair.bad.is_closed()


def test_one_wait_is_all_it_gets(pair: Pair) -> None:
    """Its other rings may have work in the same turn."""
    driver = pair.bad.start()
    other = pair.bad.driver(1)
    for name in ("desc", "avail", "used"):  # the two have no byte of their rings in common
        setattr(other, name, getattr(driver, name) + RAM_BYTES // 2)
    pair.bad.set_up(other)
    pair.bad.run(1)
    for fd in pair.bad.call_fds[:2]:
        fill(fd)
    offer_read(driver)
    offer_read(other)
    os.eventfd_write(pair.bad.kick_fds[1], 1)
    eventfd_writer = pair.rig.server.eventfd_writer
    before = eventfd_writer.turn
    with interrupted():
        pair.bad.kick()
    assert eventfd_writer.turn == before + 2
    pair.assert_hung_up(PROBLEM)


@pytest.mark.parametrize("request_", [Request.SET_VRING_CALL, Request.SET_VRING_ERR])
def test_one_that_is_only_forgotten_is_not_waited_for(pair: Pair, request_: Request) -> None:
    """O_NONBLOCK is set on what comes, so a full one costs nothing."""
    driver = pair.bad.start()
    full = pair.bad.call_fds[1]
    fill(full)
    assert pair.bad.ack(request_, U64.pack(0), [full]) == 0
    assert not os.get_blocking(full)
    assert driver.request(IN, 3, room=512).data == b"\3" * 512
    assert pair.rig.reports == []
