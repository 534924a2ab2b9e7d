"""States that are none: only StateError comes of them, and a device that works afterwards."""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import StateError
from pyvmm.memory import GuestMemory
from pyvmm.storage.memory import MemoryBackend
from pyvmm.virtio.block import BlockConfig, BlockDevice
from pyvmm.virtio.console.device import ConsoleDevice
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.entropy.device import EntropyDevice
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.port.device import PortDevice
from pyvmm.virtio.rate_limit import RateLimit
from pyvmm.virtio.spec import BlockFeature, ConsoleFeature, Feature, Register
from tests.support.packed_driver import PackedDriver
from tests.support.rig import make_rig
from tests.support.virtio_driver import RAM_BASE, BlockDriver, VirtioDriver
from tests.support.virtio_states import assert_plain, junk, replaced, walk, without

FEATURES = int(Feature.VERSION_1 | Feature.RING_RESET | BlockFeature.FLUSH)
REGISTERS = ("device", "common", "queues", 0, "registers")
RING = ("device", "common", "queues", 0, "ring")


class Subject:
    """A transport, and the state that its active device was saved in."""

    def __init__(
        self, transport: MmioTransport, memory: GuestMemory, driver: VirtioDriver, features: int
    ) -> None:
        self.transport, self.memory, self.driver = transport, memory, driver
        self.features = features
        driver.start(features)
        if isinstance(driver, BlockDriver):
            driver.request(0, 1, room=512)
        self.state = transport.save()
        assert_plain(self.state)

    def restore(self, state: object) -> bool:
        """True if ``state`` was taken.  RAM and interrupts are left alone, and no doorbell, nor a
        reset, makes anything raise afterwards."""
        ram = bytes(self.memory.regions[0].view)
        try:
            self.transport.restore(state)
        except StateError:
            taken = False
            assert self.transport.read(Register.STATUS, 4) == 0
        else:
            taken = True
            again = self.transport.save()
            assert_plain(again)
            self.transport.restore(again)
            assert self.transport.save() == again
        assert bytes(self.memory.regions[0].view) == ram
        for index in range(-1, 4):
            self.transport.service(index)
        self.transport.write(Register.QUEUE_SEL, 4, 0)
        self.transport.write(Register.QUEUE_READY, 4, 0)
        self.transport.write(Register.STATUS, 4, 0)
        self.driver.start(self.features)
        return taken


def block(features: int) -> Subject:
    config = BlockConfig(queue_size=16, queues=2, rate_limit=RateLimit(ops_per_s=1 << 40))
    device = BlockDevice(config, MemoryBackend(bytearray(64 * 512)), clock=lambda: 5.0)
    memory = GuestMemory.over(bytearray(1 << 16), RAM_BASE)
    transport = MmioTransport(device, memory, lambda: None, report=lambda _: None)
    kind = PackedDriver if features & Feature.RING_PACKED else BlockDriver
    return Subject(transport, memory, kind(transport, memory), features)


def bare(device: VirtioDevice, features: int = 0) -> Subject:
    memory = GuestMemory.over(bytearray(1 << 16), RAM_BASE)
    transport = MmioTransport(device, memory, lambda: None, report=lambda _: None)
    driver = VirtioDriver(transport, memory)
    return Subject(transport, memory, driver, features | Feature.VERSION_1)


MAKERS: dict[str, Callable[[], Subject]] = {
    "split": lambda: block(FEATURES),
    "packed": lambda: block(FEATURES | int(Feature.RING_PACKED)),
    "console": lambda: bare(ConsoleDevice(lambda _: None, lambda: None, clock=lambda: 5.0)),
    "entropy": lambda: bare(EntropyDevice()),
    "port": lambda: bare(PortDevice(), ConsoleFeature.MULTIPORT),
}


@pytest.fixture(scope="module", params=sorted(MAKERS))
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    subject = MAKERS[request.param]()
    yield subject
    subject.transport.close()


@given(state=junk)
@settings(max_examples=50, deadline=None)
def test_junk_is_refused(subject: Subject, state: object) -> None:
    assert not subject.restore(state)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_state_with_something_else_in_places_is_refused_or_good(
    subject: Subject, data: st.DataObject
) -> None:
    state: object = subject.state
    for _ in range(data.draw(st.integers(1, 3))):
        path, old = data.draw(st.sampled_from(list(walk(state))))
        if data.draw(st.integers(0, 4)) == 0:
            state = without(state, path)
        else:
            close = [st.integers(old - 2, old + 2)] if type(old) is int else []
            state = replaced(state, path, data.draw(st.one_of(junk, *close)))
    subject.restore(state)


def test_bytes_that_were_flipped_are_refused_or_good(subject: Subject) -> None:
    """As from a file: each state is one that a reader of plain data would let pass."""
    rng = random.Random(7)
    text = repr(subject.state).encode()
    read = 0
    for _ in range(3000):
        flipped = bytearray(text)
        for _ in range(rng.choice((1, 1, 3))):
            flipped[rng.randrange(len(flipped))] = rng.choice(b"0123456789TrueFalseNone'x[]{},: ")
        try:
            state = ast.literal_eval(flipped.decode())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        read += 1
        subject.restore(state)
    assert read > 50


def test_every_field_is_needed_and_no_other_is_known(subject: Subject) -> None:
    for path, value in [((), subject.state), *walk(subject.state)]:
        if path and isinstance(path[-1], str):
            assert not subject.restore(without(subject.state, path)), path
        if isinstance(value, dict):
            assert not subject.restore(replaced(subject.state, (*path, "new"), 0)), path


def test_no_field_is_taken_with_another_type(subject: Subject) -> None:
    optional = {"rate_limit", "descriptor_area", "driver_area", "device_area", "ring"}
    for path, value in walk(subject.state):
        others: tuple[object, ...] = (True, 0, 0.5, "", b"", [], {}, ())
        for other in others:
            if value is not None and type(other) is not type(value):
                assert not subject.restore(replaced(subject.state, path, other)), (path, other)
        if path[-1] not in optional and value is not None:
            assert not subject.restore(replaced(subject.state, path, None)), path


@pytest.mark.parametrize(
    ("kind", "path", "value", "error"),
    [
        ("split", (*RING, "used"), 1 << 16, "virtio block device, queue 0: split ring: used is not"
         " an integer of 0 to 65535"),
        ("split", (*RING, "available"), 18, "queue 0: split ring: available is 17 ahead of used,"
         " of a size of 16"),
        ("packed", (*RING, "available_slot"), 16, "queue 0: packed ring: available_slot is not an"
         " integer of 0 to 15"),
        ("packed", (*RING, "available_slot"), 0, "packed ring: available_slot is -3 ahead of used"),
        ("split", RING, None, "queue 0: split ring: the state is no dict"),
        ("split", (*REGISTERS, "size"), 17, "queue 0: queue size 17 is not within 1 to 16"),
        ("split", (*REGISTERS, "size"), 1 << 32, "queue 0: queue: size is not an integer of 0 to"),
        ("split", (*REGISTERS, "device_area"), 0, "queue 0: the used ring: guest memory 0x0"),
        ("split", (*REGISTERS, "ready"), False, "queue 0: ring is not None, and the queue is not"),
        ("split", ("device", "common", "queues"), [], "queues is not a list of 2"),
        ("split", ("device", "common", "features"), 1 << 63 | FEATURES, "are not some of those"),
        ("split", ("device", "common", "features"), 0, "active is true, but no features"),
        ("split", ("device", "writeback"), 1, "writeback is not a boolean"),
        ("split", ("device", "rate_limit", "ops_per_s"), 1 << 60, "rate limit: ops_per_s is not"),
        ("split", ("device", "rate_limit", "ops_level"), "nan", "ops_level is not a number up to"),
        ("split", ("device", "rate_limit", "ops_level"), "0x1p+2000", "ops_level is not a number"),
        ("split", ("device", "rate_limit", "bytes_level"), "0x0p+0", "bytes_level is not None"),
        ("split", ("device", "rate_limit", "bytes_burst"), 1, "bytes burst 1 without a rate"),
        ("split", ("status",), 16, "virtio block device, transport: status 0x10 is none that a"),
        ("split", ("status",), 11, "transport: status 0xb does not fit the interrupt line"),
        ("split", ("status",), 3, "transport: status 0x3 does not fit the features accepted"),
        ("split", ("reset_queues",), [0], "reset_queues has a queue that is ready"),
        ("split", ("reset_queues",), [2], "reset_queues is not a list of integers from 0 to 1"),
        ("split", ("reset_queues",), [True], "reset_queues is not a list of integers from 0 to 1"),
        ("split", ("interrupt", "status"), 4, "interrupt line: status is not an integer of 0 to 3"),
        ("console", ("device", "typed"), bytes(5000), "console device: typed is not 0 to 4096"),
        ("console", ("device", "columns"), 1 << 16, "columns is not an integer of 0 to 65535"),
        ("console", ("device", "input_held_ms"), 5001, "input_held_ms is not an integer of 0 to"),
        ("port", ("device", "for_guest"), bytes(65537), "for_guest is not 0 to 65536 bytes"),
        ("entropy", ("device", "queues", 0, "x"), 0, "virtio entropy device, queue 0: has no"),
    ],
)
def test_the_part_the_field_and_the_limit_are_named(
    kind: str, path: tuple[str | int, ...], value: object, error: str
) -> None:
    subject = MAKERS[kind]()
    with pytest.raises(StateError) as caught:
        subject.transport.restore(replaced(subject.state, path, value))
    assert error in str(caught.value)


def test_two_queues_in_one_place_are_refused() -> None:
    subject = MAKERS["split"]()
    queues = subject.state["device"]["common"]["queues"]  # type: ignore[index]
    state = replaced(subject.state, ("device", "common", "queues", 1), queues[0])
    with pytest.raises(StateError, match=r"overlaps the .* of another queue"):
        subject.transport.restore(state)
    assert subject.restore(subject.state)


def test_a_device_that_runs_takes_no_state(tmp_path: Path) -> None:
    rig = make_rig(tmp_path / "disk.img")
    rig.driver.start()
    with pytest.raises(StateError, match="it is active: a state needs a device that was reset"):
        rig.device.restore(rig.device.save(), rig.memory, rig.transport._interrupt)
