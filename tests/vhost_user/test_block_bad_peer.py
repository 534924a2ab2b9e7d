"""A disk whose back end refuses, lies or goes: the guest's machine is unharmed, and one reason is
given."""

from __future__ import annotations

import os
import threading
import time

import pytest

from pyvmm.memory import GuestMemory
from pyvmm.run.io_loop import LAST_WAIT_S, IoLoop, IoSource
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.run.runner import JOIN_TIMEOUT_S
from pyvmm.vhost_user.frontend import STOP_TIMEOUT_S
from pyvmm.vhost_user.protocol import Request
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.spec import Register
from tests.support.eventfds import fill, interrupted
from tests.support.runner_rig import FakeVcpu, Rig
from tests.support.vhost_user_disk import (
    FEATURES,
    RAM_BYTES,
    RING_REQUESTS,
    EventfdSlot,
    Script,
    is_readable,
)
from tests.support.vhost_user_peers import PEER
from tests.support.virtio_driver import RAM_BASE, BlockDriver

# A back end that refuses


def test_features_that_are_refused(script: Script) -> None:
    script.peer.acknowledge(Request.SET_FEATURES, status=1)
    assert not script.driver.negotiate(FEATURES)
    (report,) = script.reports
    assert f"FEATURES_OK refused: {PEER}: SET_FEATURES: the back end refuses it" in report
    assert script.reasons == []


@pytest.mark.parametrize("refused", RING_REQUESTS)
def test_a_queue_that_is_refused_needs_a_reset(script: Script, refused: Request) -> None:
    script.say_negotiated()
    script.peer.acknowledge(Request.ADD_MEM_REG, *RING_REQUESTS)  # of queue 0
    script.peer.acknowledge(*RING_REQUESTS[: RING_REQUESTS.index(refused)])
    script.peer.acknowledge(refused, status=1)
    script.say_stopped()
    script.say_stopped(index=1)  # which may have begun half-way
    other = BlockDriver(script.transport, script.memory, index=1)
    other.desc, other.avail, other.used = (RAM_BASE + 0x8000 + 0x1000 * i for i in range(3))
    script.driver.negotiate(FEATURES)
    script.driver.setup_queue()
    other.setup_queue()
    script.driver.set(Register.STATUS, 15)
    assert script.driver.needs_reset
    assert script.names()[-3:] == [refused.name, "GET_VRING_BASE", "GET_VRING_BASE"]
    assert not script.device.is_activated
    assert f"{refused.name}: the back end refuses it" in script.reports[0]
    assert script.reasons == []
    script.say_negotiated()
    script.peer.acknowledge(*RING_REQUESTS)
    script.driver.start(FEATURES)
    script.say_stopped()


def test_a_queue_that_is_refused_when_it_is_set_up_anew(script: Script) -> None:
    script.start()
    script.say_stopped()
    script.driver.set(Register.QUEUE_RESET, 1)
    script.heard()
    script.peer.acknowledge(*RING_REQUESTS[:-1])
    script.peer.acknowledge(RING_REQUESTS[-1], status=1)
    script.say_stopped()
    script.driver.setup_queue()
    assert script.driver.needs_reset
    assert script.driver.reg(Register.QUEUE_READY) == 0
    assert script.names() == [*(request.name for request in RING_REQUESTS), "GET_VRING_BASE"]
    script.driver.notify()
    assert not is_readable(script.fds.kicks[0])
    assert script.reasons == []


def test_memory_that_is_refused_ends_it(script: Script) -> None:
    script.say_negotiated()
    script.peer.acknowledge(Request.ADD_MEM_REG, status=1)
    script.driver.start(FEATURES)
    (reason,) = script.reasons
    assert reason == f"{PEER}: ADD_MEM_REG: the back end refuses it (status 0x1)"


def test_private_memory_cannot_be_served(script: Script) -> None:
    with GuestMemory([(RAM_BASE, RAM_BYTES)]) as memory:
        transport = MmioTransport(
            script.device, memory, lambda: None, report=script.reports.append
        )
        driver = BlockDriver(transport, memory)
        script.say_negotiated()
        driver.negotiate(FEATURES)
        driver.setup_queue()
        driver.set(Register.STATUS, 15)
        assert driver.needs_reset
        assert "guest RAM is private memory" in script.reports[0]
        transport.close()


def test_a_malformed_queue_is_not_handed_over(script: Script) -> None:
    script.say_negotiated()
    script.driver.negotiate(FEATURES)
    script.driver.setup_queue(desc=RAM_BASE + RAM_BYTES - 16)
    assert script.driver.needs_reset
    assert script.names() == ["SET_FEATURES", "GET_CONFIG"]


# A back end that goes


def assert_dead_and_harmless(script: Script, reason: str) -> None:
    """Lost is called once, and the guest can do what it likes."""
    assert script.reasons == [f"{PEER}: {reason}"]
    script.device.look()
    script.driver.notify()
    script.driver.set(Register.QUEUE_RESET, 1)
    script.driver.start(FEATURES)
    script.driver.notify()
    script.transport.write(Register.CONFIG + 32, 1, 0)
    assert not script.device.refresh()
    script.driver.set(Register.STATUS, 0)
    assert len(script.reasons) == 1
    assert script.device.capacity_sectors == 64


def test_a_back_end_that_hangs_up_is_seen_on_its_socket(script: Script) -> None:
    script.start()
    script.device.look()
    assert script.reasons == []
    script.peer.hang_up()
    assert is_readable(script.device.fileno())
    script.device.look()
    assert_dead_and_harmless(script, "the peer has hung up")


def test_a_back_end_that_dies_when_it_is_activated(script: Script) -> None:
    script.say_negotiated()
    script.peer.acknowledge(Request.ADD_MEM_REG, *RING_REQUESTS[:2])
    script.driver.start(FEATURES)
    assert_dead_and_harmless(script, "the reply to SET_VRING_ADDR did not come within 0.05 s")


def test_a_back_end_that_is_gone_before_features_ok(script: Script) -> None:
    script.peer.hang_up()
    script.driver.start(FEATURES)
    assert_dead_and_harmless(script, "the peer has hung up, before SET_FEATURES")


def test_a_back_end_that_is_gone_at_reset(script: Script) -> None:
    script.start()
    script.peer.hang_up()
    script.driver.set(Register.STATUS, 0)
    assert_dead_and_harmless(script, "the peer has hung up, before GET_VRING_BASE")


def test_a_back_end_that_lies_about_its_configuration(script: Script) -> None:
    script.start()
    script.say_space(b"short")
    assert not script.device.refresh()
    assert_dead_and_harmless(script, "GET_CONFIG: reply of 17 bytes, not 48")


def test_a_back_end_that_has_gone_is_looked_at_once(script: Script) -> None:
    """Its socket stays readable for good; a thread that waits for it must not spin."""
    script.start()
    script.peer.hang_up()
    doorbell = os.eventfd(0, os.EFD_NONBLOCK)
    looks: list[float] = []
    slot = EventfdSlot(script.fds.call, script.fds.kicks)
    (source,) = script.device.plug(slot)

    def look() -> float | None:
        looks.append(time.monotonic())
        os.eventfd_write(doorbell, 1)
        return source.service()

    def ring() -> float | None:
        if time.monotonic() < looks[0] + 0.1:
            return 0.02
        loop.stop()
        return None

    loop = IoLoop([source.replace(service=look), IoSource(doorbell, ring)])
    loop.run()
    os.close(doorbell)
    assert len(looks) == 1
    assert script.reasons == [f"{PEER}: the peer has hung up"]


def test_a_back_end_that_has_stopped_does_not_hold_up_the_end(script: Script) -> None:
    """Its queues are asked for, but not waited for as long as during the run."""
    script.start()
    script.frontend.limit_waits(time.monotonic() + 0.05)
    script.transport.close()
    assert len(script.reasons) == 1
    assert script.reasons[0].startswith(f"{PEER}: the reply to GET_VRING_BASE did not come")


def test_fault_5_a_reset_that_waits_for_a_stuck_back_end_ends_with_the_run(
    script: Script,
) -> None:
    """The guest has begun to wait before anybody knew that the run would end."""
    assert LAST_WAIT_S < JOIN_TIMEOUT_S < STOP_TIMEOUT_S
    script.start()
    rig = Rig()
    begun = threading.Event()

    def guest(vcpu: FakeVcpu) -> int:
        if not begun.is_set():
            begun.set()
            script.transport.write(Register.STATUS, 4, 0)
        return vcpu.halt()

    def end() -> None:
        begun.wait()
        time.sleep(0.2)  # until it waits
        rig.runner.finish(Outcome(Kind.TIMEOUT))

    def end_waits() -> None:
        script.device.hurry(LAST_WAIT_S + time.monotonic())

    stopper = threading.Thread(target=end)
    stopper.start()
    try:
        assert rig.run(guest, at_end=[end_waits]).kind is Kind.TIMEOUT
        assert rig.runner.stopped
    finally:
        stopper.join()
        rig.close()
    (reason,) = script.reasons
    assert reason.startswith(f"{PEER}: the reply to GET_VRING_BASE did not come within")



def test_a_kick_that_waits_is_ended_by_a_signal(script: Script) -> None:
    """A back end can stop its own guest so; the end of the run kicks the vCPU."""
    script.start()
    fill(script.fds.kicks[0])
    with interrupted():
        script.driver.notify()
    script.say_stopped()
