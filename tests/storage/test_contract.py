"""What every kind of backend keeps: the same tests over all of them."""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from pyvmm.storage.backend import BlockBackend
from pyvmm.storage.faulty import FaultyBackend
from pyvmm.storage.freezing import freeze
from pyvmm.storage.memory import MemoryBackend
from pyvmm.storage.open import DiskSource, open_backend
from tests.support.nbd_servers import nbdkit, qemu_nbd
from tests.support.patience import patient
from tests.support.power_cut import RecordingBackend
from tests.support.raw_disks import room

SECTORS = 67  # the last block of 4 KiB is cut off
CONTENT = b"".join(bytes([i]) * 512 for i in range(SECTORS))

Open = Callable[[ExitStack, Path], BlockBackend]


def image(directory: Path) -> Path:
    path = directory / "disk.img"
    path.write_bytes(CONTENT)
    return path


def from_source(stack: ExitStack, source: DiskSource) -> BlockBackend:
    return stack.enter_context(closing(open_backend(source, report=print)))


def raw(stack: ExitStack, directory: Path) -> BlockBackend:
    return from_source(stack, DiskSource(location=str(image(directory))))


def memory(stack: ExitStack, directory: Path) -> BlockBackend:
    return MemoryBackend(bytearray(CONTENT))


def snapshot(stack: ExitStack, directory: Path) -> BlockBackend:
    return from_source(stack, DiskSource(location=str(image(directory)), snapshot=True))


def overlay(stack: ExitStack, directory: Path) -> BlockBackend:
    return from_source(stack, DiskSource(
        location=str(image(directory)), snapshot=True, overlay=str(directory / "disk.overlay")
    ))


def clone(stack: ExitStack, directory: Path) -> BlockBackend:
    """Over a frozen disk that has been written and put back, with a layer of its own."""
    disk = snapshot(stack, directory)
    for content in (bytes(len(CONTENT)), CONTENT):
        disk.writev([memoryview(content)], 0)
        frozen = stack.enter_context(closing(freeze(disk)))
    return stack.enter_context(closing(frozen.open(report=print)))


def faulty(stack: ExitStack, directory: Path) -> BlockBackend:
    return FaultyBackend(memory(stack, directory), ())


def recording(stack: ExitStack, directory: Path) -> BlockBackend:
    return RecordingBackend(memory(stack, directory))


def nbd_nbdkit(stack: ExitStack, directory: Path) -> BlockBackend:
    socket = directory / "socket"
    stack.enter_context(nbdkit(socket, "file", str(image(directory))))
    return from_source(stack, DiskSource(location=f"nbd+unix:///?socket={socket}"))


def nbd_qemu(stack: ExitStack, directory: Path) -> BlockBackend:
    socket = directory / "socket"
    stack.enter_context(qemu_nbd(socket, image(directory), "--discard=unmap"))
    return from_source(stack, DiskSource(location=f"nbd+unix:///disk?socket={socket}"))


KINDS: list[Open] = [
    raw, memory, snapshot, overlay, clone, faulty, recording, nbd_nbdkit, nbd_qemu
]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlockBackend]:
    with ExitStack() as stack:
        yield request.param(stack, tmp_path)


def content(disk: BlockBackend, offset: int = 0, length: int | None = None) -> bytes:
    buffers = room(disk.size_bytes - offset if length is None else length)
    disk.readv(buffers, offset)
    return bytes(buffers[0])


def test_what_it_is(disk: BlockBackend) -> None:
    assert disk.size_bytes == len(CONTENT)
    assert (disk.read_only, disk.block_size) == (False, 512)
    assert disk.can_discard
    assert disk.can_write_zeroes
    assert disk.refresh_size() == len(CONTENT)
    assert content(disk) == CONTENT


def test_scattered_transfers(disk: BlockBackend) -> None:
    disk.writev([memoryview(b"a" * 100), memoryview(b""), memoryview(b"b" * 924)], 7 * 512)
    buffers = room(50, 0, 974)
    disk.readv(buffers, 7 * 512)
    assert b"".join(buffers) == b"a" * 100 + b"b" * 924
    expected = CONTENT[: 7 * 512] + b"a" * 100 + b"b" * 924 + CONTENT[9 * 512 :]
    assert content(disk) == expected


def test_the_last_sector(disk: BlockBackend) -> None:
    disk.writev([memoryview(b"z" * 512)], len(CONTENT) - 512)
    assert content(disk, len(CONTENT) - 1024) == CONTENT[-1024:-512] + b"z" * 512


def test_a_durable_write_and_flushes(disk: BlockBackend) -> None:
    disk.flush()
    disk.writev([memoryview(b"d" * 1024)], 512, durable=True)
    disk.writev([memoryview(b"e" * 512)], 1024, durable=True)
    disk.flush()
    assert content(disk, 0, 2048) == CONTENT[:512] + b"d" * 512 + b"e" * 512 + CONTENT[1536:2048]


@pytest.mark.parametrize("unmap", [False, True])
def test_write_zeroes(disk: BlockBackend, unmap: bool) -> None:
    disk.writev([memoryview(b"w" * 8192)], 8192)
    disk.write_zeroes(5 * 512, 30 * 512, unmap=unmap)
    assert content(disk) == CONTENT[: 5 * 512] + bytes(30 * 512) + CONTENT[35 * 512 :]
    disk.write_zeroes(40 * 512, 27 * 512, unmap=unmap)  # to the end
    disk.flush()
    assert content(disk, 35 * 512) == CONTENT[35 * 512 : 40 * 512] + bytes(27 * 512)


def test_a_discard_touches_nothing_else(disk: BlockBackend) -> None:
    disk.discard(8 * 512, 16 * 512)
    disk.flush()
    now = content(disk)
    assert now[: 8 * 512] == CONTENT[: 8 * 512]
    assert now[24 * 512 :] == CONTENT[24 * 512 :]
    disk.writev([memoryview(b"n" * 512)], 9 * 512)
    assert content(disk, 9 * 512, 512) == b"n" * 512


@pytest.mark.parametrize("offset", [-512, SECTORS * 512 - 511, SECTORS * 512, 1 << 62])
def test_nothing_outside_the_disk(disk: BlockBackend, offset: int) -> None:
    def zero(buffers: list[memoryview], offset: int) -> None:
        disk.write_zeroes(offset, 512, unmap=True)

    def durable(buffers: list[memoryview], offset: int) -> None:
        disk.writev(buffers, offset, durable=True)

    def discard(buffers: list[memoryview], offset: int) -> None:
        disk.discard(offset, 512)

    for transfer in (disk.readv, disk.writev, durable, zero, discard):
        with pytest.raises(OSError, match="leave the disk") as caught:
            transfer(room(512), offset)
        assert caught.value.errno == errno.EINVAL
    assert content(disk) == CONTENT
    disk.writev(room(512), 0, durable=True)  # a refusal is no failed flush
    disk.flush()


def test_nothing_is_fine(disk: BlockBackend) -> None:
    disk.readv([], 512)
    disk.writev([], len(CONTENT))
    disk.writev(room(0), 0, durable=True)
    disk.discard(512, 0)
    disk.write_zeroes(len(CONTENT), 0, unmap=True)
    assert content(disk) == CONTENT


def test_many_operations_against_a_model(disk: BlockBackend) -> None:
    rng = random.Random(3)
    model = bytearray(CONTENT)
    for number in range(300):
        first = rng.randrange(SECTORS)
        offset, length = first * 512, rng.randint(1, min(20, SECTORS - first)) * 512
        match rng.randrange(5):
            case 0:
                disk.write_zeroes(offset, length, unmap=rng.random() < 0.5)
                model[offset : offset + length] = bytes(length)
            case 1:
                disk.discard(offset, length)
                model[offset : offset + length] = content(disk, offset, length)
            case 2:
                assert content(disk, offset, length) == model[offset : offset + length]
            case _:
                data = bytes([number % 255 + 1]) * length
                cut = rng.randrange(length)
                disk.writev(
                    [memoryview(data)[:cut], memoryview(data)[cut:]], offset,
                    durable=rng.random() < 0.05,
                )
                model[offset : offset + length] = data
        if number % 100 == 99:
            disk.flush()
    assert content(disk) == model


def test_fault_5_a_hurry_harms_nothing_that_is_done_in_time(disk: BlockBackend) -> None:
    disk.hurry(float("inf"))
    disk.writev([memoryview(b"h" * 512)], 512)
    thread = threading.Thread(target=disk.hurry, args=(time.monotonic() + patient(30),))
    thread.start()
    thread.join()
    disk.flush()
    assert content(disk, 0, 1536) == CONTENT[:512] + b"h" * 512 + CONTENT[1024:1536]
    disk.hurry(time.monotonic())
    disk.close()
    disk.hurry(time.monotonic())


def test_close_can_be_repeated(disk: BlockBackend) -> None:
    disk.close()
    disk.close()
