"""Wicked front ends of ``pyvmm export``, beside a good one that must not notice."""

from __future__ import annotations

import array
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.driver.errors import DeviceBrokenError, TransportError
from pyvmm.driver.memory import SharedMemory
from pyvmm.driver.transport import QueueLayout
from pyvmm.driver.vhost_user import VhostUserTransport
from pyvmm.vhost_user.protocol import HEADER, Request
from pyvmm.virtio.spec import Feature
from tests.support.driver_client import Client
from tests.support.eventfds import fill
from tests.support.export_process import Export
from tests.support.patience import patient
from tests.support.shared_export import SharedExport, make_image, open_fds

V1 = int(Feature.VERSION_1)


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedExport]:
    """A read-only export: many front ends at once."""
    shared = SharedExport(tmp_path_factory.mktemp("crowded"), ",ro")
    with shared.export:
        yield shared


@pytest.fixture(scope="module")
def bystander(crowded: SharedExport) -> Iterator[Client]:
    """A front end that has nothing to do with the others."""
    with Client(VhostUserTransport(crowded.path), queues=2) as client:
        yield client


@pytest.fixture
def unharmed(crowded: SharedExport, bystander: Client) -> Iterator[Callable[[], None]]:
    """What a test has done, and may call to see: the others are served, no descriptor of the
    export is left over, and it runs."""


    def serve() -> None:
        content = bystander.read(512, 512, index=1)
        assert content == crowded.image.read_bytes()[512:1024]
        bystander.transport.check()

    def check() -> None:
        serve()
        until_s = time.monotonic() + patient(5)
        while len(open_fds(crowded.pid)) > before:
            assert time.monotonic() < until_s, "the export has not closed what it got"
            time.sleep(0.002)
        assert crowded.export.process.poll() is None

    serve()  # what came before is done with, too
    before = len(open_fds(crowded.pid))
    yield check
    check()


def queue_at(address: int, size: int = 8) -> QueueLayout:
    return QueueLayout(size, address, address + 0x400, address + 0x800)


Descriptor = tuple[int, int, int, int]
"""Offset in the memory, length, flags, next."""


def ring(
    memory: SharedMemory, *descriptors: Descriptor, avail_idx: int = 1
) -> list[QueueLayout]:
    """One split queue at the beginning of ``memory``, with a chain from descriptor 0 on."""
    for number, (offset, length, flags, following) in enumerate(descriptors):
        address = memory.address + offset
        struct.pack_into("<QIHH", memory.view, 16 * number, address, length, flags, following)
    struct.pack_into("<HHH", memory.view, 0x400, 0, avail_idx, 0)
    return [queue_at(memory.address)]


@pytest.mark.parametrize(("descriptors", "avail_idx", "words"), [
    ([(4096, 16, 1, 1), (4096, 16, 1, 0)], 1, "chain is longer than the queue size 8"),
    ([(4096, 16, 1, 4000)], 1, "descriptor 4000 in a table of 8"),
    ([], 9, "avail.idx is 9 ahead in a queue of 8"),
])
def test_a_malformed_ring(
    crowded: SharedExport,
    unharmed: Callable[[], None],
    descriptors: list[Descriptor],
    avail_idx: int,
    words: str,
) -> None:
    """The queue is stopped, and the export says why."""
    with SharedMemory(8192) as memory, VhostUserTransport(crowded.path) as transport:
        transport.negotiate(V1)
        transport.map_mem_region(memory.address, memory.length, memory.fd)
        transport.setup_queues(ring(memory, *descriptors, avail_idx=avail_idx))
        transport.notify(0)
        crowded.export.wait_for(words)
        transport.check()


def test_an_eventfd_that_a_write_would_wait_for(
    crowded: SharedExport, unharmed: Callable[[], None]
) -> None:
    """A front end fills its call eventfd up and clears O_NONBLOCK, which it shares: the export,
    which has one thread, is held up for a moment, and the connection ends."""
    with SharedMemory(8192) as memory, VhostUserTransport(crowded.path) as transport:
        transport.negotiate(V1)
        transport.map_mem_region(memory.address, memory.length, memory.fd)
        transport.setup_queues(ring(memory, (5000, 16, 1, 1), (4096, 1, 2, 0), avail_idx=0))
        transport.check()
        fill(transport.completion_fd(0))
        struct.pack_into("<H", memory.view, 0x402, 1)
        transport.notify(0)
        assert select.select([transport], [], [], 10)[0]
        with pytest.raises(DeviceBrokenError, match="hung up"):
            transport.check()
    crowded.export.wait_for("whose O_NONBLOCK it has cleared, held a write up")


def test_data_outside_the_memory_that_is_shared(
    crowded: SharedExport, unharmed: Callable[[], None]
) -> None:
    """A request for memory nobody has shared is answered with IOERR; the rest of the ring works."""
    with SharedMemory(8192) as memory, VhostUserTransport(crowded.path) as transport:
        transport.negotiate(V1)
        transport.map_mem_region(memory.address, memory.length, memory.fd)
        memory.view[4096] = 0xFF
        far = 1 << 40
        transport.setup_queues(ring(memory, (5000, 16, 1, 1), (far, 512, 3, 2), (4096, 1, 2, 0)))
        transport.notify(0)
        until_s = time.monotonic() + patient(5)
        while memory.view[4096] == 0xFF and time.monotonic() < until_s:
            time.sleep(0.002)
        assert memory.view[4096] == 1


def test_rings_outside_the_memory_that_is_shared(
    crowded: SharedExport, unharmed: Callable[[], None]
) -> None:
    with SharedMemory(8192) as memory, VhostUserTransport(crowded.path) as transport:
        transport.negotiate(V1)
        transport.map_mem_region(memory.address, 4096, memory.fd)
        for address in (1 << 40, memory.address + 4096, (1 << 64) - 4096, memory.address + 0xC00):
            with pytest.raises(TransportError, match=r"SET_VRING_\w+: .*refuses"):
                transport.setup_queues([queue_at(address)])
        transport.setup_queues([queue_at(memory.address)])


def test_memory_that_could_shrink(crowded: SharedExport, unharmed: Callable[[], None]) -> None:
    """A SIGBUS for the export: refused unless it was told to trust it."""
    fd = os.memfd_create("shrinks", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 4096)
        with (
            VhostUserTransport(crowded.path) as transport,
            pytest.raises(TransportError, match=r"ADD_MEM_REG: .*refuses"),
        ):
            transport.map_mem_region(0x10000, 4096, fd)
        crowded.export.wait_for("--trust-memory")
    finally:
        os.close(fd)


def test_memory_that_could_shrink_from_a_front_end_that_is_trusted(
    tmp_path: Path
) -> None:
    image, path = make_image(tmp_path / "disk.img"), tmp_path / "disk.sock"
    fd = os.memfd_create("shrinks", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, 4096)
        with Export(image, path, "--trust-memory"), VhostUserTransport(path) as transport:
            transport.map_mem_region(0x10000, 4096, fd)
            transport.check()
    finally:
        os.close(fd)


@pytest.mark.parametrize(("length", "offset"), [(8192, 0), (4096, 4096), (1 << 50, 0)])
def test_a_region_that_does_not_fit_its_file(
    crowded: SharedExport, unharmed: Callable[[], None], length: int, offset: int
) -> None:
    with SharedMemory(4096) as memory, VhostUserTransport(crowded.path) as transport:
        with pytest.raises(TransportError, match=r"ADD_MEM_REG: .*refuses"):
            transport.map_mem_region(memory.address, length, memory.fd, offset)
        transport.map_mem_region(memory.address, 4096, memory.fd)


def send_raw(path: Path, pieces: list[tuple[bytes, int]]) -> None:
    """Send ``pieces``, each with so many file descriptors, for as long as somebody listens."""
    with socket.socket(socket.AF_UNIX) as sock, SharedMemory(4096) as memory:
        sock.settimeout(patient(5))
        sock.connect(str(path))
        try:
            for data, fds in pieces:
                rights = array.array("i", [memory.fd] * fds)
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if fds else []
                sock.sendmsg([data], ancillary)
        except (BrokenPipeError, ConnectionResetError):
            return


payloads = st.one_of(
    st.binary(max_size=64),
    st.lists(
        st.one_of(st.integers(0, 4), st.sampled_from([1 << 12, 1 << 63, (1 << 64) - 1])),
        max_size=6,
    ).map(lambda numbers: struct.pack(f"<{len(numbers)}Q", *numbers)),
)


@st.composite
def messages(draw: st.DrawFn) -> tuple[bytes, int]:
    """A message that might mean something, or not quite."""
    payload = draw(payloads)
    request = draw(st.one_of(st.sampled_from(Request).map(int), st.integers(0, (1 << 32) - 1)))
    size = draw(st.sampled_from([len(payload)] * 8 + [len(payload) + 1, 1 << 31]))
    flags = draw(st.sampled_from([1, 1, 1, 9, 9, 9, 0, 5, 0xFFFFFFFF]))
    return HEADER.pack(request, flags, size) + payload, draw(st.sampled_from([0] * 6 + [1, 2, 9]))


@settings(max_examples=100, deadline=None)
@given(pieces=st.lists(messages(), min_size=1, max_size=12))
def test_any_messages_at_all(
    crowded: SharedExport, bystander: Client, pieces: list[tuple[bytes, int]]
) -> None:
    """The export goes on, and serves the others."""
    send_raw(crowded.path, pieces)
    assert bystander.read(0, 512) == crowded.image.read_bytes()[:512]
    assert crowded.export.process.poll() is None


def test_after_all_that_nothing_is_left(unharmed: Callable[[], None]) -> None:
    unharmed()


def test_half_a_message(crowded: SharedExport, unharmed: Callable[[], None]) -> None:
    for length in range(13):
        send_raw(crowded.path, [((HEADER.pack(1, 1, 8) + b"x")[:length], 1 if length else 0)])
