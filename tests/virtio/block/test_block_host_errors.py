"""What the host refuses a disk leaves nothing behind: no view of guest RAM, in any backend.

An exception that a local variable of its own traceback keeps is a cycle: it holds every buffer of
the call until a garbage collection, and a run's RAM could not be closed at its end.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import gc
import mmap
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pyvmm
from pyvmm.memory import GuestMemory
from pyvmm.storage.backend import BlockBackend
from pyvmm.storage.nbd import NbdBackend
from pyvmm.storage.open import DiskSource, open_backend
from pyvmm.virtio.block import BlockConfig, BlockDevice
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.spec import BlockRequestType, Feature
from tests.support.nbd_servers import agree, read_exactly, reply, request, scripted
from tests.support.virtio_driver import RAM_BASE, BlockDriver, readable, writable

SECTOR = 512
SECTORS = 64
FAR = 40
"""A sector behind the new end of a file that was cut off."""
IN, OUT, FLUSH, DISCARD, WRITE_ZEROES = (
    int(kind)
    for kind in (
        BlockRequestType.IN, BlockRequestType.OUT, BlockRequestType.FLUSH,
        BlockRequestType.DISCARD, BlockRequestType.WRITE_ZEROES,
    )
)  # fmt: skip
OK, IOERR = 0, 1
CALLS = ("os.preadv", "os.pwritev", "os.fdatasync", "pyvmm.storage.raw.fallocate")

Break = Callable[[], None]
Opened = tuple[BlockBackend, Break]
"""A disk, and what makes it fail from then on."""


class Place:
    """Where a disk is opened."""

    def __init__(
        self, folder: Path, stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.image = folder / "disk.img"
        self.image.write_bytes(os.urandom(SECTORS * SECTOR))
        self.store = folder / "store"
        self.script = folder / "script"
        self.socket = folder / "s"
        self.stack = stack
        self.monkeypatch = monkeypatch

    def open(self, *, overlay: bool = False, script: str = "") -> BlockBackend:
        if script:
            self.script.write_text(script)
        source = DiskSource(
            location=str(self.image), snapshot=overlay, overlay=str(self.store) if overlay else "",
            faults=str(self.script) if script else "",
        )  # fmt: skip
        backend = open_backend(source, report=lambda line: None)
        self.stack.callback(backend.close)
        return backend

    def fail_calls(self, number: int) -> None:
        """Every system call on a file answers ``number``."""

        def call(*_arguments: object) -> int:
            raise OSError(number, os.strerror(number))

        for name in CALLS:
            self.monkeypatch.setattr(name, call)


def cut(*, overlay: bool = False, is_store: bool = False) -> Callable[[Place], Opened]:
    def make(place: Place) -> Opened:
        disk = place.open(overlay=overlay)
        if is_store:
            disk.writev([memoryview(bytes(SECTORS * SECTOR))], 0)
        path = place.store if is_store else place.image
        return disk, lambda: os.truncate(path, SECTOR)

    return make


def calls(number: int, *, overlay: bool = False) -> Callable[[Place], Opened]:
    def make(place: Place) -> Opened:
        return place.open(overlay=overlay), lambda: place.fail_calls(number)

    return make


def scripted_faults(script: str, *, overlay: bool = False) -> Callable[[Place], Opened]:
    return lambda place: (place.open(script=script, overlay=overlay), lambda: None)


def nbd(number: int) -> Callable[[Place], Opened]:
    """A server that answers ``number``; with 0 one that leaves instead."""

    def make(place: Place) -> Opened:
        def serve(connection: socket.socket) -> None:
            agree(connection, SECTORS * SECTOR)
            while True:
                _, command, cookie, _, length = request(connection)
                if command == 2 or not number:
                    return
                read_exactly(connection, length if command == 1 else 0)
                connection.sendall(reply(cookie, number))

        place.stack.enter_context(scripted(place.socket, serve))
        disk = NbdBackend(f"nbd+unix:///?socket={place.socket}", report=lambda line: None)
        place.stack.callback(disk.close)
        return disk, lambda: None

    return make


DISKS: dict[str, Callable[[Place], Opened]] = {
    "a file that became shorter": cut(),
    "a file, no room": calls(errno.ENOSPC),
    "a file, a bad disk": calls(errno.EIO),
    "an overlay, its store shorter": cut(overlay=True, is_store=True),
    "an overlay, its base shorter": cut(overlay=True),
    "an overlay, no room": calls(errno.ENOSPC, overlay=True),
    "an overlay, a bad disk": calls(errno.EIO, overlay=True),
    "a faulty disk": scripted_faults("any *: ENOSPC"),
    "a faulty disk, short and torn": scripted_faults(
        "read *: short 512\nwrite *: torn 512\nflush *: EIO\nany *: EIO"
    ),
    "a faulty overlay": scripted_faults("any *: EIO", overlay=True),
    "an NBD server, no room": nbd(errno.ENOSPC),
    "an NBD server, an error unknown to it": nbd(12345),
    "an NBD server that leaves": nbd(0),
}


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def offer_all(driver: BlockDriver) -> list[int]:
    """Every kind of request twice, and in neighbours that are merged; where the statuses will be.

    Flushes are first and last: a failure of the first is latched.
    """
    ranges = driver.put(struct.pack("<QII", FAR, 8, 0))
    statuses = []
    for number, kind in enumerate((FLUSH, IN, IN, OUT, OUT, DISCARD, WRITE_ZEROES, FLUSH) * 2):
        statuses.append(driver.status_byte())
        chain = [readable(driver.header(kind, FAR + 2 * (number % 8)), 16)]
        if kind in (IN, OUT):
            of_data = writable if kind == IN else readable
            # In the second half it is no plain chain of one buffer.
            pieces = 1 if number < 8 else 2
            chain += [of_data(driver.alloc(1024 // pieces), 1024 // pieces)] * pieces
        elif kind != FLUSH:
            chain.append(readable(ranges, 16))
        driver.place([driver.indirect([*chain, writable(statuses[-1], 1)])], number)
    return statuses


@pytest.mark.usefixtures("both_paths", "no_collection")
@pytest.mark.parametrize("writeback", [True, False], ids=["volatile", "durable"])
@pytest.mark.parametrize("make", DISKS.values(), ids=DISKS)
def test_fault_11_an_error_keeps_no_guest_ram(
    make: Callable[[Place], Opened], writeback: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ram = mmap.mmap(-1, 1 << 20)
    with contextlib.ExitStack() as stack, monkeypatch.context() as patch:
        backend, spoil = make(Place(tmp_path, stack, patch))
        memory = GuestMemory.over(ram, RAM_BASE)
        device = BlockDevice(BlockConfig(queue_size=16, writeback=writeback), backend)
        transport = MmioTransport(device, memory, lambda: None, report=print)
        driver = BlockDriver(transport, memory, size=16)
        driver.start(driver.offered & ~int(Feature.EVENT_IDX | Feature.RING_PACKED))
        spoil()
        for _ in range(2):
            statuses = offer_all(driver)
            driver.notify()
            while transport.service(0) is not None:
                pass
            assert len(driver.reap()) == len(statuses)
            answers = [memory.read_int(gpa, 1) for gpa in statuses]
            assert set(answers) <= {OK, IOERR}
            assert IOERR in answers
        transport.close()
        memory.close()
    ram.close()  # a BufferError while there is a view


WITHOUT_GUEST_RAM = ("launcher/", "testing/", "pytest_plugin/", "matrix/", "cli/test.py")


def test_fault_11_no_function_keeps_the_exception_that_it_raises() -> None:
    """Nothing is raised from a local variable that outlives the handler, in all that a machine's
    process runs.  The rooms left out drive such processes and have no guest RAM."""
    found = []
    package = Path(pyvmm.__file__).parent
    for path in sorted(package.rglob("*.py")):
        if str(path.relative_to(package)).startswith(WITHOUT_GUEST_RAM):
            continue
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                found += [f"{path}:{line}" for line in kept_exceptions(function)]
    assert found == []


def kept_exceptions(function: ast.FunctionDef) -> Iterator[int]:
    """The lines of ``function`` where an exception is kept in a name or an attribute."""
    caught = {
        node.name for node in ast.walk(function)
        if isinstance(node, ast.ExceptHandler) and node.name
    }
    kept = {
        node.id for node in ast.walk(function)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    for node in ast.walk(function):
        if isinstance(node, ast.Raise):
            raised = node.exc.values if isinstance(node.exc, ast.BoolOp) else [node.exc]
            if any(isinstance(one, ast.Name) and one.id in kept - caught for one in raised):
                yield node.lineno
        elif (
            isinstance(node, ast.Assign | ast.AnnAssign)
            and isinstance(node.value, ast.Name)
            and node.value.id in caught
        ):
            yield node.lineno
