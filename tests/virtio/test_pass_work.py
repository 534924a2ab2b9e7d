"""A pass does a bounded amount of work, whatever the work is made of.

Nothing is timed here: what one pass takes from the ring is counted, in descriptors, ranges and
bytes.  A descriptor takes some 2 us and a range some 10 us, so these bounds are 20 to 40 ms.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pyvmm.memory import GuestMemory
from pyvmm.storage.memory import MemoryBackend
from pyvmm.storage.open import DiskSource, open_backend
from pyvmm.virtio.block import BlockConfig, BlockDevice
from pyvmm.virtio.console.device import MAX_HOLD_S, ConsoleDevice
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.entropy.device import EntropyDevice
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.port.device import CONTROL_TRANSMIT, RECEIVE, TRANSMIT
from pyvmm.virtio.rate_limit import RateLimit
from pyvmm.virtio.spec import BlockRequestType, Feature
from tests.support.general_path import without_fast_path
from tests.support.packed_driver import PackedDriver
from tests.support.port_rig import PortRig
from tests.support.vhost_rig import FEATURES, PACKED, ExportRig
from tests.support.virtio_driver import (
    RAM_BASE,
    BlockDriver,
    Descriptor,
    VirtioDriver,
    readable,
    writable,
)

MOST_DESCRIPTORS = 10_000
MOST_RANGES = 1_200
MOST_REFUSED_RANGES = 4_200
MOST_CALLS = 4_200
"""Calls to the host for the pieces that an overlay's reads fall into."""
FAR = 1 << 32
"""GPA of a region of RAM that the ring is not in."""
FAR_BYTES = 1 << 20
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = (
    int(kind)
    for kind in (
        BlockRequestType.IN, BlockRequestType.OUT, BlockRequestType.FLUSH,
        BlockRequestType.GET_ID, BlockRequestType.DISCARD, BlockRequestType.WRITE_ZEROES,
    )
)  # fmt: skip
SIZE = 256

Data = Callable[[VirtioDriver], list[Descriptor]]


def far(length: int, count: int, buffer: Callable[[int, int], Descriptor] = writable) -> Data:
    """``count`` buffers of ``length`` bytes, not where the ring is."""
    return lambda driver: [buffer(FAR + 600 * n, length) for n in range(count)]


def near(length: int, count: int, buffer: Callable[[int, int], Descriptor] = writable) -> Data:
    """The same beside the ring; all in one place."""
    return lambda driver: [buffer(driver.alloc(length), length)] * count


def ranges(count: int, *, pieces: int = 1, sectors: int = 1) -> Data:
    """``count`` ranges to discard or zero, in ``pieces`` buffers."""

    def make(driver: VirtioDriver) -> list[Descriptor]:
        raw = b"".join(struct.pack("<QII", n * sectors, sectors, 0) for n in range(count))
        at, length = driver.put(raw), len(raw) // pieces
        return [readable(at + n * length, length) for n in range(pieces)]

    return make


def ranges_and_one_outside(driver: VirtioDriver) -> list[Descriptor]:
    """32 ranges, the last of which is not on the disk: none is done."""
    good = b"".join(struct.pack("<QII", n, 1, 0) for n in range(31))
    raw = good + struct.pack("<QII", 1 << 40, 1, 0)
    return [readable(driver.put(raw), len(raw))]


class Kind:
    """One kind of request, of which a queue is full, and how many ranges each has; a pass takes
    at most so many of ``most_ranges``."""

    def __init__(
        self, name: str, request_type: int, data: Data, ranges: int = 0,
        most_ranges: int = MOST_RANGES,
    ) -> None:
        self.name = name
        self.most_ranges = most_ranges
        self.type = request_type
        self.data = data
        self.ranges = ranges


KINDS = [
    Kind("254 x 512 bytes outside near", IN, far(512, 254)),
    Kind("254 x 512 bytes outside near, written", OUT, far(512, 254, readable)),
    Kind("254 x 512 bytes near", IN, near(512, 254)),
    Kind("2-byte pieces", IN, lambda driver: [*far(2, 253)(driver), writable(FAR, 6)]),
    Kind("2-byte pieces, wrong length", OUT, far(2, 254, readable)),
    Kind("32 ranges to discard", DISCARD, ranges(32), 32),
    Kind("32 ranges to discard, in 128 pieces", DISCARD, ranges(32, pieces=128), 32),
    Kind("32 ranges to zero", WRITE_ZEROES, ranges(32), 32),
    Kind("32 large ranges to zero", WRITE_ZEROES, ranges(32, sectors=16), 32),
    Kind("32 ranges to discard, one outside", DISCARD, ranges_and_one_outside, 32,
         MOST_REFUSED_RANGES),
    Kind("32 ranges to zero, one outside", WRITE_ZEROES, ranges_and_one_outside, 32,
         MOST_REFUSED_RANGES),
    Kind("GET_ID 254 x 1 byte", GET_ID, near(1, 254)),
    Kind("GET_ID 254 x 1 byte outside near", GET_ID, far(1, 254)),
    Kind("GET_ID of empty buffers", GET_ID, near(0, 254)),
    Kind("FLUSH with 254 buffers", FLUSH, near(1, 254)),
    Kind("no such type", 77, near(1, 254)),
    Kind("bad RAM at the end", IN, lambda driver: [*near(512, 253)(driver), writable(5, 512)]),
    Kind("empty buffers to read", IN, near(0, 254)),
]


class Taken:
    """What a pass took: the length of each chain, and the ranges, by what a driver gets back."""

    def __init__(self, kind: Kind, chain_length: int) -> None:
        self._kind = kind
        self._length = chain_length

    def check(self, chains: int, *, is_last: bool) -> None:
        """A pass took ``chains``: no more than it may, and no less than is worth a pass."""
        descriptors, taken_ranges = chains * self._length, chains * self._kind.ranges
        assert descriptors <= MOST_DESCRIPTORS + self._length, "descriptors"
        assert taken_ranges <= self._kind.most_ranges + self._kind.ranges, "ranges"
        if not is_last:
            assert descriptors >= MOST_DESCRIPTORS // 10 or taken_ranges >= MOST_RANGES // 10


def fill(driver: BlockDriver, kind: Kind, *, indirect: bool) -> Taken:
    """Fill the ring with requests of ``kind``, which all have the same buffers."""
    header, status = driver.header(kind.type), driver.status_byte()
    chain = [readable(header, 16), *kind.data(driver), writable(status, 1)]
    offered = [driver.indirect(chain)] if indirect else chain
    for head in range(0, SIZE - len(offered) + 1, len(offered)):
        driver.place(offered, head)
    return Taken(kind, len(chain))


def count_passes(taken: Taken, driver: VirtioDriver, service: Callable[[], float | None]) -> int:
    """Serve until nothing is left; how many passes that took."""
    passes = 0
    while True:
        left = service()
        passes += 1
        taken.check(len(driver.reap()), is_last=left is None)
        if left is None:
            return passes
        assert left == 0.0


@pytest.fixture(params=["fast", "general", "limited"])
def limit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> RateLimit:
    """The paths of a block device: with a rate limit it has one of its own."""
    if request.param == "general":
        without_fast_path(monkeypatch)
    return RateLimit(ops_per_s=1 << 40) if request.param == "limited" else RateLimit()


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_fault_7_a_pass_over_a_disk_is_bounded(kind: Kind, packed: bool, limit: RateLimit) -> None:
    memory = GuestMemory.over(bytearray(1 << 20), RAM_BASE)
    memory.add(FAR, bytearray(FAR_BYTES))
    config = BlockConfig(queue_size=SIZE, rate_limit=limit)
    device = BlockDevice(config, MemoryBackend(bytearray(1 << 20)))
    reports: list[str] = []
    transport = MmioTransport(device, memory, lambda: None, report=reports.append)
    driver = (PackedDriver if packed else BlockDriver)(transport, memory, size=SIZE)
    features = driver.offered & ~int(Feature.EVENT_IDX | Feature.RING_PACKED)
    driver.start(features | (Feature.RING_PACKED if packed else 0))
    taken = fill(driver, kind, indirect=True)
    least = 6 if kind.most_ranges == MOST_RANGES else 2
    assert count_passes(taken, driver, lambda: transport.service(0)) >= least
    assert reports == []
    transport.close()


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("kind", KINDS[3:7], ids=lambda kind: kind.name)
def test_fault_7_a_pass_over_an_export_is_bounded(
    tmp_path: Path, kind: Kind, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = MemoryBackend(bytearray(1 << 20))
    done: list[int] = []
    with ExportRig(
        tmp_path / "socket", config=BlockConfig(queue_size=SIZE), backend=backend
    ) as rig:
        frontend = rig.connect()
        extra = 1 << 13 | 1 << 14  # DISCARD and WRITE_ZEROES
        driver = frontend.start((PACKED if packed else FEATURES) | extra, size=SIZE)
        monkeypatch.setattr(f"{__name__}.FAR", driver.alloc(200 << 10))
        taken = fill(driver, kind, indirect=True)
        process = BlockDevice.process_queue

        def counted(device: BlockDevice, index: int) -> float | None:
            left = process(device, index)
            done.append(len(driver.reap()))
            taken.check(done[-1], is_last=left is None)
            return left

        monkeypatch.setattr(BlockDevice, "process_queue", counted)
        driver.notify()
        assert sum(done) == SIZE
        assert len([one for one in done if one]) >= 6
        assert rig.reports == []


def test_fault_7_direct_chains_of_ranges_are_counted_too() -> None:
    """Three descriptors each, as plain as a chain can be: the fast path takes them all at once,
    and gives back what is too much."""
    memory = GuestMemory.over(bytearray(1 << 20), RAM_BASE)
    device = BlockDevice(BlockConfig(queue_size=SIZE), MemoryBackend(bytearray(1 << 20)))
    transport = MmioTransport(device, memory, lambda: None, report=print)
    driver = BlockDriver(transport, memory, size=SIZE)
    driver.start(driver.offered & ~int(Feature.EVENT_IDX | Feature.RING_PACKED))
    kind = Kind("direct", DISCARD, ranges(32), 32)
    taken = fill(driver, kind, indirect=False)
    assert count_passes(taken, driver, lambda: transport.service(0)) >= 2
    transport.close()


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_fault_7_a_pass_over_a_fragmented_overlay_is_bounded(
    tmp_path: Path, packed: bool, limit: RateLimit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other block is held, so that each block is a call of its own."""
    base = tmp_path / "base"
    base.write_bytes(bytes(1 << 20))
    backend = open_backend(
        DiskSource(location=str(base), snapshot=True, overlay=str(tmp_path / "o")), report=print
    )
    for offset in range(0, 1 << 20, 8192):
        backend.writev([memoryview(bytes(4096))], offset)
    memory = GuestMemory.over(bytearray(4 << 20), RAM_BASE)
    device = BlockDevice(BlockConfig(queue_size=64, rate_limit=limit), backend)
    transport = MmioTransport(device, memory, lambda: None, report=print)
    driver = (PackedDriver if packed else BlockDriver)(transport, memory, size=64)
    features = driver.offered & ~int(Feature.EVENT_IDX | Feature.RING_PACKED)
    driver.start(features | (Feature.RING_PACKED if packed else 0))
    chain = [
        readable(driver.header(IN), 16), writable(driver.alloc(1 << 20), 1 << 20),
        writable(driver.status_byte(), 1),
    ]  # fmt: skip
    for head in range(64):
        driver.place([driver.indirect(chain)], head)
    calls: list[int] = []
    preadv = os.preadv

    def counted(*arguments: Any) -> int:
        calls[-1] += 1
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", counted)
    left: float | None = 0.0
    while left is not None:
        calls.append(0)
        left = transport.service(0)
    assert sum(calls) == 64 * 256
    assert max(calls) <= MOST_CALLS + 256
    assert len(driver.reap()) == 64
    transport.close()
    backend.close()


# The other devices


def running(
    device: VirtioDevice, index: int, size: int
) -> tuple[MmioTransport, VirtioDriver]:
    """``device`` with its queue ``index`` set up."""
    memory = GuestMemory.over(bytearray(4 << 20), RAM_BASE)
    transport = MmioTransport(device, memory, lambda: None, report=print)
    driver = VirtioDriver(transport, memory, size=size, index=index)
    driver.start()
    return transport, driver


def offer_tables(driver: VirtioDriver, chain: Sequence[Descriptor]) -> None:
    """Fill the ring with tables of ``chain``."""
    table = driver.indirect(chain)
    for head in range(driver.size):
        driver.place([table], head)


@pytest.mark.parametrize("length", [0, 1, 1024])
def test_fault_7_a_pass_over_the_console_is_bounded(length: int) -> None:
    """However the text is cut: by descriptors, by bytes, and by calls of whoever shows it."""
    shown: list[bytes] = []
    device = ConsoleDevice(shown.append, lambda: None)
    transport, driver = running(device, 1, 64)
    offer_tables(driver, [readable(driver.alloc(length), length)] * 64)
    left: float | None = 0.0
    chains, passes = 0, 0
    while left is not None:
        shown.clear()
        left = transport.service(1)
        passes += 1
        done = len(driver.reap())
        chains += done
        assert sum(map(len, shown)) <= 2 * (64 << 10)
        assert len(shown) <= done, "one call a chain"
        assert done * 64 <= MOST_DESCRIPTORS
    assert chains == 64
    assert passes >= {0: 1, 1: 1, 1024: 32}[length]
    transport.close()


def test_fault_7_typed_bytes_ask_for_no_more_than_they_need() -> None:
    """A byte was typed: of 64 buffers the first gets it, and nothing is done with the rest."""
    asked: list[int] = []
    clock_s = iter([0.0, MAX_HOLD_S])  # when it is activated, and when it is asked for input
    device = ConsoleDevice(
        lambda data: None, lambda: asked.append(1), clock=lambda: next(clock_s)
    )
    transport, driver = running(device, 0, 64)
    gpa = driver.alloc(64)
    offer_tables(driver, [writable(gpa + n, 1) for n in range(64)])
    asked.clear()
    assert device.receive(b"x") == 1
    assert transport.service(0) is None
    assert [used.length for used in driver.reap()] == [1]
    assert asked == [1]
    transport.close()


def test_fault_7_a_pass_over_the_entropy_device_is_bounded() -> None:
    device = EntropyDevice()
    transport, driver = running(device, 0, 16)
    offer_tables(driver, [writable(driver.alloc(3), 3)] * 16)
    assert transport.service(0) is None, "16 tables of 16 are little"
    assert [used.length for used in driver.reap()] == [48] * 16
    transport.close()


@pytest.mark.parametrize("length", [0, 1, 1 << 10])
def test_fault_7_a_pass_over_the_agents_port_is_bounded(length: int) -> None:
    rig = PortRig()
    rig.open()
    chain = [readable(rig.data_out.alloc(length), length)] * 64
    offer_tables(rig.data_out, chain)
    left: float | None = 0.0
    chains = 0
    while left is not None:
        rig.heard.clear()
        left = rig.transport.service(TRANSMIT)
        done = len(rig.data_out.reap())
        chains += done
        assert len(rig.heard) <= done, "one call a chain"
        assert done * 64 <= MOST_DESCRIPTORS
    assert chains == rig.data_out.size


def test_fault_7_a_pass_over_the_ports_control_messages_serves_its_data_once() -> None:
    """Each close throws away all that waits: a queue full of them is as many passes."""
    rig = PortRig()
    rig.open()
    for event in range(rig.control_out.size):
        message = struct.pack("<IHH", 1, 6, event % 2)
        rig.control_out.place([readable(rig.control_out.put(message), 8)], event)
    rig.heard.clear()
    passes = 1
    while rig.transport.service(CONTROL_TRANSMIT) is not None:
        passes += 1
        assert len(rig.control_out.reap()) == 1
    assert passes == rig.control_out.size
    assert rig.heard == [False, True] * (passes // 2)


def test_fault_7_bytes_for_the_guest_ask_for_no_more_buffers_than_they_need() -> None:
    rig = PortRig()
    rig.open()
    gpa = rig.data_in.alloc(64)
    offer_tables(rig.data_in, [writable(gpa + n, 1) for n in range(64)])
    rig.device.receive(b"x")
    assert rig.transport.service(RECEIVE) is None
    assert [used.length for used in rig.data_in.reap()] == [1]
