"""What every transport checks before its device is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from pyvmm.driver import DeviceBrokenError, SharedMemory, TransportError
from pyvmm.driver.transport import QueueLayout, Transport
from pyvmm.virtio.spec import BlockFeature, Feature
from tests.support.driver_rigs import FakeTransport, open_fds

V1 = int(Feature.VERSION_1)
PAGE = 4096


@pytest.fixture
def transport() -> Iterator[FakeTransport]:
    before = open_fds()
    with FakeTransport(V1 | int(BlockFeature.FLUSH)) as transport:
        yield transport
    assert open_fds() == before


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    with SharedMemory(4 * PAGE) as memory:
        yield memory


def layout(size: int = 8) -> QueueLayout:
    return QueueLayout(size, 0, 0, 0)


def test_only_what_is_offered_can_be_negotiated(transport: FakeTransport) -> None:
    with pytest.raises(TransportError, match="0x2000 were not offered"):
        transport.negotiate(V1 | int(BlockFeature.DISCARD))
    with pytest.raises(TransportError, match="VERSION_1"):
        transport.negotiate(int(BlockFeature.FLUSH))
    assert transport.calls == []
    transport.negotiate(V1)
    assert transport.acked_features == V1


@pytest.mark.parametrize(
    ("address", "length", "offset", "problem"),
    [
        (PAGE, 0, 0, "whole pages"),
        (PAGE, -PAGE, 0, "whole pages"),
        (PAGE + 1, PAGE, 0, "whole pages"),
        (PAGE, 512, 0, "whole pages"),
        (PAGE, PAGE, 1, "whole pages"),
        (PAGE, PAGE, -PAGE, "whole pages"),
        (-PAGE, PAGE, 0, "2\\^64"),
        ((1 << 64) - PAGE, 2 * PAGE, 0, "2\\^64"),
    ],
)
def test_a_region_there_cannot_be(
    transport: FakeTransport, address: int, length: int, offset: int, problem: str
) -> None:
    with pytest.raises(TransportError, match=problem):
        transport.map_mem_region(address, length, 0, offset)
    assert transport.calls == []


def test_a_region_without_an_fd(transport: FakeTransport) -> None:
    with pytest.raises(TransportError, match="has no fd"):
        transport.map_mem_region(PAGE, PAGE, -1)


def test_regions_do_not_overlap(transport: FakeTransport, memory: SharedMemory) -> None:
    middle = memory.address + PAGE
    transport.map_mem_region(middle, 2 * PAGE, memory.fd, PAGE)
    for address, length in ((middle, PAGE), (middle - PAGE, 2 * PAGE), (middle - PAGE, 4 * PAGE)):
        with pytest.raises(TransportError, match="overlaps"):
            transport.map_mem_region(address, length, memory.fd)
    transport.map_mem_region(memory.address, PAGE, memory.fd)
    transport.map_mem_region(middle + 2 * PAGE, PAGE, memory.fd, 3 * PAGE)
    with pytest.raises(TransportError, match="the limit is 3"):
        transport.map_mem_region(PAGE, PAGE, memory.fd)


def test_is_mapped_is_about_one_region(transport: FakeTransport, memory: SharedMemory) -> None:
    start = memory.address
    transport.map_mem_region(start, PAGE, memory.fd)
    transport.map_mem_region(start + PAGE, PAGE, memory.fd, PAGE)
    assert transport.is_mapped(start, PAGE)
    assert transport.is_mapped(start + PAGE, PAGE)
    assert not transport.is_mapped(start + PAGE - 1, 2)
    assert not transport.is_mapped(start - 1, 2)
    assert not transport.is_mapped(start + 2 * PAGE - 1, 2)


def test_unmapping_takes_what_was_mapped(transport: FakeTransport, memory: SharedMemory) -> None:
    transport.map_mem_region(memory.address, 2 * PAGE, memory.fd)
    for address, length in ((memory.address, PAGE), (memory.address + PAGE, PAGE)):
        with pytest.raises(TransportError, match="is not mapped"):
            transport.unmap_mem_region(address, length)
    transport.unmap_mem_region(memory.address, 2 * PAGE)
    assert transport.regions == ()
    assert transport.calls == ["map", "unmap"]


def test_a_region_that_is_refused_is_not_mapped(
    transport: FakeTransport, memory: SharedMemory
) -> None:
    transport.refusal = DeviceBrokenError("no")
    with pytest.raises(DeviceBrokenError, match="no"):
        transport.map_mem_region(memory.address, PAGE, memory.fd)
    with pytest.raises(DeviceBrokenError, match="no"):
        transport.alloc_queue_mem(PAGE, lambda: None)
    assert transport.regions == ()


def test_queue_memory_goes_last(transport: FakeTransport) -> None:
    released: list[str] = []
    memory = transport.alloc_queue_mem(100, lambda: released.append("views"))
    assert transport.is_mapped(memory.address, PAGE)
    with pytest.raises(TransportError, match="holds queues"):
        transport.unmap_mem_region(memory.address, memory.length)
    assert released == []
    transport.close()
    assert released == ["views"]
    assert transport.calls == ["map", "close"]
    assert not transport.is_mapped(memory.address, PAGE)


def test_queues_come_once_and_after_features(transport: FakeTransport) -> None:
    with pytest.raises(TransportError, match="after features"):
        transport.setup_queues([layout()])
    transport.negotiate(V1)
    for queues, problem in (
        ([], "0 queues are not within 1 to 2"),
        ([layout()] * 3, "3 queues are not within 1 to 2"),
        ([layout(257)], "queue size 257 is not within 1 to 256"),
        ([layout(), layout(0)], "queue size 0 is not within 1 to 256"),
    ):
        with pytest.raises(TransportError, match=problem):
            transport.setup_queues(queues)
    transport.setup_queues([layout()])
    with pytest.raises(TransportError, match="once"):
        transport.setup_queues([layout()])
    with pytest.raises(TransportError, match="once"):
        transport.negotiate(V1)
    assert transport.calls == ["negotiate", "setup_queues"]


def test_stopping_is_for_good(transport: FakeTransport) -> None:
    transport.stop()
    transport.negotiate(V1)
    transport.setup_queues([layout()])
    transport.stop()
    transport.stop()
    assert transport.calls == ["negotiate", "setup_queues", "stop"]
    with pytest.raises(TransportError, match="once"):
        transport.negotiate(V1)
    with pytest.raises(TransportError, match="once"):
        transport.setup_queues([layout()])


def test_closing_stops_first_and_is_for_good(transport: FakeTransport) -> None:
    transport.negotiate(V1)
    transport.setup_queues([layout()])
    transport.close()
    transport.close()
    assert transport.calls == ["negotiate", "setup_queues", "stop", "close"]
    later: list[Callable[[Transport], object]] = [
        lambda t: t.negotiate(V1),
        lambda t: t.map_mem_region(PAGE, PAGE, 0),
        lambda t: t.unmap_mem_region(PAGE, PAGE),
        lambda t: t.setup_queues([layout()]),
        lambda t: t.alloc_queue_mem(PAGE, lambda: None),
    ]
    for call in later:
        with pytest.raises(TransportError, match="is closed"):
            call(transport)
