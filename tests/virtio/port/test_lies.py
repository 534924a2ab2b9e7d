"""A guest that lies on the agent's port: nothing breaks, nothing grows, and it works afterwards."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.virtio.port.device import MAX_WAITING_BYTES
from pyvmm.virtio.spec import PortEvent, Register
from tests.support.port_rig import ADD, HOST_OPENS, NAME, PortRig
from tests.support.virtio_driver import RAM_BASE, Used, readable, writable


def works(rig: PortRig) -> bool:
    """True if a driver that begins anew has a port that carries bytes both ways."""
    rig.control_in.set(Register.STATUS, 0)
    rig.settle()
    assert rig.make_ready() == [ADD, NAME, HOST_OPENS]
    rig.say(PortEvent.PORT_OPEN, 1)
    rig.heard.clear()
    rig.appetite = 100
    rig.send(b"up", 5)
    rig.device.receive(b"down")
    return rig.heard == [b"up"] and rig.read(16) == b"down"


@pytest.mark.parametrize(
    "message", [b"", b"\1", struct.pack("<IHH", 1, 6, 1)[:7], b"\xff" * 8, b"\xff" * 4096,
                struct.pack("<IHH", 0, 6, 1), struct.pack("<IHH", 2, 6, 1),
                struct.pack("<IHH", 1, 6 << 8, 1), struct.pack("<IHH", 1, 7, 1) + b"another name"],
    ids=lambda message: message[:12].hex() or "empty",
)  # fmt: skip
def test_a_control_message_that_means_nothing_is_ignored(message: bytes) -> None:
    rig = PortRig()
    rig.make_ready()
    rig.send_control(message)
    assert (rig.told(), rig.heard, rig.reports) == ([], [], [])
    assert works(rig)


def test_a_port_that_the_driver_has_not_made_is_not_opened() -> None:
    rig = PortRig()
    rig.start()
    rig.say(PortEvent.PORT_OPEN, 1)
    assert rig.heard == []
    rig.send(b"x")
    assert rig.heard == []


def test_a_driver_that_failed_is_told_nothing() -> None:
    rig = PortRig()
    rig.start()
    rig.say(PortEvent.DEVICE_READY, 0)
    assert rig.told() == []
    rig.say(PortEvent.DEVICE_READY, 1)
    rig.say(PortEvent.PORT_READY, 0)
    assert rig.told() == [ADD]


def test_a_driver_that_repeats_itself_is_answered_once_for_all_and_fills_no_memory() -> None:
    rig = PortRig()
    rig.start()
    for driver in (rig.control_in,):
        driver.want_interrupts(False)
    for _ in range(2000):
        rig.say(PortEvent.DEVICE_READY, 1)
        rig.say(PortEvent.PORT_READY, 1)
    assert len(rig.told()) <= 8, "as many as it has buffers"
    assert len(repr(rig.device.save())) < 4000
    assert works(rig)


def test_a_buffer_outside_ram_carries_nothing_and_stops_nothing() -> None:
    rig = PortRig()
    rig.open()
    rig.data_out.submit([readable(5, 100)])
    rig.data_in.submit([writable((1 << 64) - 2, 4)])
    rig.device.receive(b"lost?")
    rig.settle()
    assert (rig.data_out.reap(), rig.data_in.reap()) == ([Used(0, 0)], [Used(0, 0)])
    assert rig.read(16) == b"lost?"
    rig.control_out.submit([readable(RAM_BASE - 1, 8)])
    rig.settle()
    assert rig.reports == []
    assert works(rig)


def test_a_buffer_too_small_for_a_message_gets_a_part_of_it() -> None:
    rig = PortRig()
    rig.start()
    rig.control_in.set(Register.STATUS, 0)
    for driver in (rig.control_in, rig.control_out, rig.data_in, rig.data_out):
        driver.restart()
    assert rig.control_in.negotiate(rig.control_in.offered & ~(1 << 34 | 1 << 29))
    rig.control_in.setup_queue()
    rig.control_out.setup_queue()
    rig.control_in.set(Register.STATUS, 15)
    rig.control_in.submit([writable(rig.control_in.alloc(4), 4)])
    rig.say(PortEvent.DEVICE_READY, 1)
    assert rig.control_in.reap() == [Used(0, 4)]


def test_a_malformed_ring_stops_the_device_until_a_reset() -> None:
    rig = PortRig()
    rig.open()
    rig.memory.write_int(rig.data_out.avail + 2, 2, 4711)
    rig.data_out.notify()
    assert rig.control_in.needs_reset
    assert len(rig.reports) == 1
    rig.control_in.set(Register.STATUS, 0)
    rig.settle()
    assert rig.heard == [True, False]
    assert works(rig)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("say"), st.integers(0, 9), st.integers(0, 2), st.integers(0, 2)),
        st.tuples(st.just("junk"), st.binary(max_size=24)),
        st.tuples(st.just("send"), st.binary(max_size=40)),
        st.tuples(st.just("read"), st.integers(1, 40)),
        st.tuples(st.just("receive"), st.integers(0, MAX_WAITING_BYTES + 1)),
        st.tuples(st.just("appetite"), st.integers(0, 60)),
        st.sampled_from([("hang up",), ("room",), ("reset",), ("refresh",), ("told",)]),
    ),
    max_size=40,
)  # fmt: skip


@given(steps=steps, packed=st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_host_hears_whole_sessions_whatever_the_guest_does(
    steps: list[tuple[object, ...]], packed: bool
) -> None:
    """Opened, bytes, closed; and only what was sent while it was open, in order."""
    rig = PortRig(packed=packed)
    rig.make_ready()
    sent = waiting = readers = 0
    for step in steps:
        match step:
            case ("say", int(event), int(value), int(port)):
                rig.say(event, value, port)
            case ("junk", bytes(message)):
                rig.send_control(message)
            case ("send", bytes(data)) if waiting < rig.data_out.size:
                rig.send(data or b"-", sent % rig.data_out.size)
                sent, waiting = sent + 1, waiting + 1
            case ("read", int(length)) if not readers:
                rig.data_in.submit([writable(rig.data_in.alloc(length), length)])
                readers = 1
            case ("receive", int(length)):
                assert rig.device.receive(bytes(length)) <= MAX_WAITING_BYTES
            case ("appetite", int(appetite)):
                rig.appetite = appetite
            case ("hang up",):
                rig.device.hang_up()
            case ("room",):
                rig.device.more_room()
            case ("reset",):
                rig.control_in.set(Register.STATUS, 0)
                rig.make_ready()
                waiting = readers = 0
            case ("refresh",):
                rig.device.refresh()
            case ("told",):
                rig.told()
        rig.settle()
        waiting -= len(rig.data_out.reap())
        readers -= len(rig.data_in.reap())
    opened = False
    for one in rig.heard:
        assert (not opened) if one is True else opened, rig.heard
        opened = one if isinstance(one, bool) else opened
    assert rig.reports == []
    assert works(rig)
