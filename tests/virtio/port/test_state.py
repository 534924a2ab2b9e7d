"""``save`` and ``restore`` of the agent's port: how it stands, and what is on its way."""

from __future__ import annotations

import pytest

from pyvmm.virtio.spec import PortEvent, Register
from tests.support.port_rig import ADD, HOST_CLOSES, HOST_OPENS, NAME, PortRig
from tests.support.virtio_states import assert_plain


def moved(rig: PortRig, *, listens: bool = True) -> PortRig:
    """Another rig over the same RAM that goes on where ``rig`` was saved."""
    state, page, ram = rig.transport.save(), bytes(rig.transport.page), rig.memory.regions[0].view
    assert_plain(state)
    other = PortRig(packed=rig.is_packed, listens=listens)
    other.memory.regions[0].view[:] = ram
    other.transport.restore(state)
    assert other.transport.save() == state
    assert bytes(other.transport.page) == page
    for driver, old in (
        (other.control_in, rig.control_in), (other.control_out, rig.control_out),
        (other.data_in, rig.data_in), (other.data_out, rig.data_out),
    ):
        driver.__dict__.update(
            {name: value for name, value in old.__dict__.items()
             if name not in ("registers", "memory")}
        )
    other._buffers = dict(rig._buffers)
    # As board.state.catch_up does before the guest goes on.
    for queue in range(6):
        other.serve(queue)
    other.refresh()
    return other


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def rig(request: pytest.FixtureRequest) -> PortRig:
    return PortRig(packed=request.param)


def test_a_port_that_is_closed_goes_on_as_if_nothing_had_been(rig: PortRig) -> None:
    rig.make_ready()
    other = moved(rig)
    assert other.told() == []
    other.say(PortEvent.PORT_OPEN, 1)
    other.send(b"hello")
    assert other.heard == [True, b"hello"]


def test_an_open_port_is_hung_up_for_a_host_that_has_not_heard_its_beginning(
    rig: PortRig,
) -> None:
    rig.open()
    rig.send(b"HELLO")
    rig.device.receive(b"the middle of a message")
    other = moved(rig)
    assert other.told() == [HOST_CLOSES]
    other.send(b"the other half", 1)
    assert other.heard == []
    assert other.read(64) == b""
    other.say(PortEvent.PORT_OPEN, 0)
    assert other.told() == [HOST_OPENS]
    other.say(PortEvent.PORT_OPEN, 1)
    other.send(b"HELLO", 2)
    assert other.heard == [True, b"HELLO"]


def test_bytes_that_the_host_has_not_taken_are_in_the_state(rig: PortRig) -> None:
    rig.open()
    rig.appetite = 1
    rig.send(b"xyz")
    rig.device.receive(b"abc")
    state = rig.device.save()
    assert (state["for_host"], state["for_guest"]) == (b"yz", b"abc")
    moved(rig).settle()


def test_a_guest_that_closes_the_port_while_it_moves_needs_no_hang_up(rig: PortRig) -> None:
    rig.open()
    other = moved(rig)
    other.settle()
    other.say(PortEvent.PORT_OPEN, 0)
    assert other.told() == [HOST_CLOSES, HOST_OPENS]
    other.say(PortEvent.PORT_OPEN, 1)
    assert other.heard == [True]


@pytest.mark.parametrize("listens", [False, True])
def test_a_host_that_is_not_the_same_is_told_to_the_driver(listens: bool) -> None:
    rig = PortRig(listens=not listens)
    rig.make_ready()
    assert moved(rig, listens=listens).told() == [HOST_OPENS if listens else HOST_CLOSES]


def test_messages_that_wait_for_buffers_are_sent_by_the_next_machine(rig: PortRig) -> None:
    rig.start()
    # All eight buffers are used up by answers to a driver that repeats itself.
    for _ in range(8):
        rig.say(PortEvent.DEVICE_READY, 1)
    rig.say(PortEvent.DEVICE_READY, 1)
    rig.say(PortEvent.PORT_READY, 1)
    other = moved(rig)
    assert other.told() == [ADD] * 8
    assert other.told() == [ADD, NAME, HOST_OPENS]


def test_a_device_that_no_driver_has_found(rig: PortRig) -> None:
    other = moved(rig)
    assert other.device.receive(b"x") == 0
    assert other.make_ready() == [ADD, NAME, HOST_OPENS]
    assert other.control_in.reg(Register.STATUS) == 15
