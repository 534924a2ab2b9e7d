"""The agent's port: found, opened, bytes both ways as fast as the slower side, closed, reopened."""

from __future__ import annotations

import pytest

from pyvmm.virtio.port.device import (
    CONTROL_TRANSMIT,
    MAX_CHAIN_BYTES,
    MAX_WAITING_BYTES,
    PORT_0_TRANSMIT,
    TRANSMIT,
)
from pyvmm.virtio.spec import ConsoleFeature, Feature, PortEvent, Register
from tests.support.port_rig import ADD, HOST_CLOSES, HOST_OPENS, NAME, PortRig
from tests.support.virtio_driver import Used, VirtioDriver, readable


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def rig(request: pytest.FixtureRequest) -> PortRig:
    return PortRig(packed=request.param)


def test_the_driver_finds_one_port_with_its_name_and_a_host_that_listens(rig: PortRig) -> None:
    assert rig.control_in.reg(Register.DEVICE_ID) == 3
    assert rig.control_in.offered & ConsoleFeature.MULTIPORT
    assert rig.transport.read(Register.CONFIG + 4, 4) == 2, "max_nr_ports"
    assert rig.make_ready() == [ADD, NAME, HOST_OPENS]
    assert rig.heard == []


def test_without_a_host_the_port_is_there_and_closed(rig: PortRig) -> None:
    mute = PortRig(packed=rig.is_packed, listens=False)
    assert mute.make_ready() == [ADD, NAME]
    mute.say(PortEvent.PORT_OPEN, 1)
    assert mute.told() == []
    assert mute.device.receive(b"x") == 1, "and waits for a reader"
    mute.send(b"nobody listens")
    assert mute.data_out.reap() == [Used(0, 0)]


def test_a_driver_that_knows_no_ports_is_refused() -> None:
    """It would take the device for one more console."""
    rig = PortRig()
    assert not rig.control_in.negotiate(int(Feature.VERSION_1))


def test_bytes_go_both_ways_once_the_guest_has_opened_the_port(rig: PortRig) -> None:
    rig.make_ready()
    assert rig.device.receive(b"early") == 0
    rig.say(PortEvent.PORT_OPEN, 1)
    assert rig.heard == [True]
    assert rig.rooms == 1
    assert rig.device.receive(b"to the guest") == 12
    assert rig.read(6) == b"to the"
    assert rig.read(64) == b" guest"
    assert rig.read(64) == b""
    rig.send(b"to the host")
    assert rig.heard == [True, b"to the host"]
    assert rig.data_out.reap() == [Used(0, 0)]


def test_a_buffer_that_waits_is_filled_when_there_is_something(rig: PortRig) -> None:
    rig.open()
    assert rig.read(16) == b""
    rig.device.receive(b"late")
    rig.settle()
    assert rig.data_in.reap() == [Used(0, 4)]


def test_bytes_for_a_guest_that_does_not_read_are_bounded(rig: PortRig) -> None:
    rig.open()
    flood = bytes(range(256)) * 1024
    assert rig.device.receive(flood) == MAX_WAITING_BYTES
    assert rig.device.receive(flood) == 0
    rooms = rig.rooms
    assert rig.read(4096) == flood[:4096]
    assert rig.rooms == rooms + 1
    assert rig.device.receive(flood[MAX_WAITING_BYTES:]) == 4096


def test_bytes_for_a_host_that_takes_none_stay_in_the_ring(rig: PortRig) -> None:
    rig.open()
    rig.appetite = 3
    rig.send(b"abcde", 0)
    rig.send(b"fgh", 1)
    rig.send(b"ij", 2)
    assert rig.heard_bytes == b"abc"
    assert rig.data_out.reap() == [Used(0, 0)], "one chain's rest is the device's, no more"
    rig.appetite = 4
    rig.settle()
    assert rig.heard_bytes == b"abc", "nobody asks the host before it says so"
    rig.device.more_room()
    rig.settle()
    assert rig.heard_bytes == b"abcdefg"
    rig.appetite = 1 << 20
    rig.device.more_room()
    rig.settle()
    assert rig.heard_bytes == b"abcdefghij"
    assert rig.data_out.reap() == [Used(1, 0), Used(2, 0)]


def test_a_guest_that_reopens_the_port_is_a_new_one_for_the_host(rig: PortRig) -> None:
    rig.open()
    rig.device.receive(b"for the one before")
    rig.send(b"last words")
    rig.say(PortEvent.PORT_OPEN, 0)
    assert rig.heard == [True, b"last words", False]
    assert rig.device.receive(b"x") == 0
    rig.say(PortEvent.PORT_OPEN, 1)
    assert rig.heard[-1] is True
    assert rig.told() == [], "the host's side stays open"
    assert rig.read(64) == b"", "no bytes of the session before"
    rig.device.receive(b"new")
    rig.settle()
    assert rig.data_in.reap() == [Used(0, 3)]


def test_bytes_that_a_slow_host_has_not_taken_are_gone_when_the_guest_closes(
    rig: PortRig,
) -> None:
    rig.open()
    rig.appetite = 2
    for head in range(3):
        rig.send(b"abcd", head)
    rig.say(PortEvent.PORT_OPEN, 0)
    assert len(rig.data_out.reap()) == 3
    rig.appetite = 100
    rig.say(PortEvent.PORT_OPEN, 1)
    rig.device.more_room()
    rig.settle()
    assert rig.heard == [True, b"ab", False, True]


@pytest.mark.parametrize("order", [(TRANSMIT, CONTROL_TRANSMIT), (CONTROL_TRANSMIT, TRANSMIT)])
def test_the_order_of_two_doorbells_does_not_matter(order: tuple[int, int]) -> None:
    rig = PortRig()
    rig.make_ready()
    message = rig.control_out.put(bytes([1, 0, 0, 0, PortEvent.PORT_OPEN, 0, 1, 0]))
    rig.control_out.place([readable(message, 8)])
    rig.data_out.place([readable(rig.data_out.put(b"hello"), 5)])
    for queue in order:
        rig.transport.service(queue)
    assert rig.heard == [True, b"hello"]


def test_a_hang_up_ends_the_session_until_the_guest_has_closed_the_port(rig: PortRig) -> None:
    rig.open()
    rig.device.receive(b"nonsense")
    rig.device.hang_up()
    assert rig.told() == [HOST_CLOSES]
    assert rig.heard == [True, False]
    rig.send(b"still talking")
    assert rig.data_out.reap() == [Used(0, 0)]
    assert rig.read(64) == b""
    assert rig.device.receive(b"x") == 0
    rig.say(PortEvent.PORT_OPEN, 0)
    assert rig.told() == [HOST_OPENS]
    rig.say(PortEvent.PORT_OPEN, 1)
    rig.send(b"hello again", 1)
    assert rig.heard == [True, False, True, b"hello again"]


def test_a_hang_up_of_a_closed_port_is_nothing(rig: PortRig) -> None:
    rig.make_ready()
    rig.device.hang_up()
    assert rig.told() == []
    rig.say(PortEvent.PORT_OPEN, 1)
    assert rig.heard == [True]


def test_a_reset_closes_the_port_and_the_next_driver_finds_it_anew(rig: PortRig) -> None:
    rig.open()
    rig.device.receive(b"for the first")
    rig.control_in.set(Register.STATUS, 0)
    assert rig.heard == [True], "the host is told on the device's thread, not the vCPU's"
    rig.settle()
    assert rig.heard == [True, False]
    assert rig.make_ready() == [ADD, NAME, HOST_OPENS]
    rig.say(PortEvent.PORT_OPEN, 1)
    assert rig.heard == [True, False, True]
    assert rig.read(64) == b""


def test_a_reset_and_a_new_driver_before_the_thread_looks_are_told_in_order(rig: PortRig) -> None:
    rig.open()
    rig.control_in.set(Register.STATUS, 0)
    assert rig.device.receive(b"too late for the one, too early for the other") == 0
    rig.open()
    assert rig.heard == [True, False, True]


def test_a_huge_chain_is_cut(rig: PortRig) -> None:
    rig.open()
    gpa = rig.data_out.alloc(MAX_CHAIN_BYTES)
    rig.data_out.submit([readable(gpa, MAX_CHAIN_BYTES), readable(gpa, 100)])
    rig.settle()
    assert len(rig.heard_bytes) == MAX_CHAIN_BYTES
    assert rig.data_out.reap() == [Used(0, 0)]


def test_bytes_to_port_0_are_for_nobody() -> None:
    rig = PortRig()
    port_0 = VirtioDriver(
        rig.transport, rig.memory, index=PORT_0_TRANSMIT, bottom=rig.data_out.bottom + (1 << 18)
    )
    rig.data_out.restart()
    negotiate = rig.control_in.negotiate

    def with_port_0(features: int | None = None) -> bool:
        done = negotiate(features)
        port_0.setup_queue()
        return done

    rig.control_in.negotiate = with_port_0  # type: ignore[method-assign]
    rig.open()
    port_0.submit([readable(port_0.put(b"boo"), 3)])
    rig.settle()
    assert port_0.reap() == [Used(0, 0)]
    assert rig.heard == [True]
