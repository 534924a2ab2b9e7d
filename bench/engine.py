"""What one block request costs the device itself: no guest, no exits, no thread in between.

    python bench/engine.py [--quick] [--only split]

A prepared virtqueue is offered again and again and ``process_queue`` timed: ns per request, the
least of many rounds.  Columns are what is under the device: nothing ("ring"), a disk in memory,
a file in the page cache.  ``random`` sectors cannot be merged, ``sequential`` ones can.

Rows called "loop" have one request at a time go all the way: from the write into the doorbell's
eventfd through epoll, the I/O loop, the transport and the device to the write into the
interrupt's.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import struct
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from pyvmm.memory import GuestMemory
from pyvmm.run.io_loop import IoLoop, IoSource
from pyvmm.storage.backend import BlockBackend
from pyvmm.storage.memory import MemoryBackend
from pyvmm.storage.raw import RawBackend
from pyvmm.virtio.block import BlockConfig, BlockDevice
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.spec import (
    BlockFeature,
    BlockRequestType,
    DescriptorFlag,
    Feature,
    PackedFlag,
    Register,
)

REQUESTS = 64
"""Different requests in a queue; every depth divides it."""
DISK_BYTES = 64 << 20
RING, DRIVER_AREA, DEVICE_AREA = 0x1000, 0x8000, 0xA000
REQUEST_STRIDE = 0x1000  # a header, a status byte and an indirect table
REQUESTS_AT = 0x10_0000
STATUS_AT, TABLE_AT = 0x20, 0x100
DATA_AT = 0x100_0000
RAM_BYTES = 48 << 20

NEXT, WRITE, INDIRECT = (int(flag) for flag in DescriptorFlag)
AVAIL, USED = int(PackedFlag.AVAIL), int(PackedFlag.USED)
FEATURES = int(
    Feature.VERSION_1 | Feature.INDIRECT_DESC | Feature.EVENT_IDX | BlockFeature.FLUSH
)
Descriptor = tuple[int, int, int]
"""gpa, length, flags."""


class Shape(NamedTuple):
    """What the requests of a row are: ``segments`` buffers of ``segment_bytes`` each."""

    name: str
    type: BlockRequestType = BlockRequestType.IN
    segments: int = 1
    segment_bytes: int = 4096
    indirect: bool = True
    sequential: bool = False


SHAPES = (
    Shape("4k read, random"),
    Shape("4k read, sequential", sequential=True),
    Shape("4k write, random", BlockRequestType.OUT),
    Shape("4k write, sequential", BlockRequestType.OUT, sequential=True),
    Shape("4k read, random, direct", indirect=False),
    Shape("128k read, 32 segments", segments=32, sequential=True),
    Shape("flush", BlockRequestType.FLUSH, segments=0),
)
DEPTHS = (1, 32)


class NullBackend(MemoryBackend):
    """A disk that moves nothing."""

    def readv(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Done."""

    def writev(
        self, buffers: Sequence[memoryview], offset: int, *, durable: bool = False
    ) -> None:
        """Done."""


class Interrupts:
    """Counts what the device sends."""

    def __init__(self) -> None:
        self.used = 0

    def notify_used(self, queue_index: int) -> None:
        """One more."""
        self.used += 1

    def notify_config(self) -> None:
        """Not looked at."""


def lay_out(memory: GuestMemory, shape: Shape, index: int) -> list[Descriptor]:
    """Write request ``index`` of a row into RAM; its chain."""
    at = REQUESTS_AT + index * REQUEST_STRIDE
    length = shape.segments * shape.segment_bytes
    page = index * length // 4096 if shape.sequential else random.randrange(DISK_BYTES // 4096)
    memory.write(at, struct.pack("<IIQ", shape.type, 0, page * 8))
    data = DATA_AT + index * length
    flags = WRITE if shape.type == BlockRequestType.IN else 0
    return [
        (at, 16, 0),
        *(
            (data + i * shape.segment_bytes, shape.segment_bytes, flags)
            for i in range(shape.segments)
        ),
        (at + STATUS_AT, 1, WRITE),
    ]


class SplitLoad:
    """The driver's half of a split ring whose requests are already in place."""

    size = 256

    def __init__(self, memory: GuestMemory, shape: Shape) -> None:
        table = bytearray()
        heads = []
        for index in range(REQUESTS):
            heads.append(len(table) // 16)
            chain = lay_out(memory, shape, index)
            if shape.indirect:
                gpa = REQUESTS_AT + index * REQUEST_STRIDE + TABLE_AT
                inner = self._linked(chain, 0)
                memory.write(gpa, inner)
                table += struct.pack("<QIHH", gpa, len(inner), INDIRECT, 0)
            else:
                table += self._linked(chain, heads[-1])
        memory.write(RING, table)
        avail = heads * (self.size // REQUESTS)
        memory.write(DRIVER_AREA + 4, struct.pack(f"<{self.size}H", *avail))
        self._avail = memory.view(DRIVER_AREA, 4).cast("H")

    @staticmethod
    def _linked(chain: list[Descriptor], first: int) -> bytes:
        last = len(chain) - 1
        return b"".join(
            struct.pack("<QIHH", gpa, length, flags, 0)
            if i == last
            else struct.pack("<QIHH", gpa, length, flags | NEXT, first + i + 1)
            for i, (gpa, length, flags) in enumerate(chain)
        )

    def close(self) -> None:
        """Let go of RAM."""
        self._avail.release()

    def offer(self, count: int) -> None:
        """Make the next ``count`` requests available."""
        self._avail[1] = self._avail[1] + count & 0xFFFF

    def served(self, memory: GuestMemory) -> bool:
        """Whether every request offered is back."""
        return self._avail[1] == memory.read_int(DEVICE_AREA + 2, 2)


class PackedLoad:
    """The same for a packed ring: what the device overwrote is copied back."""

    def __init__(self, memory: GuestMemory, shape: Shape) -> None:
        laps = [bytearray(), bytearray()]
        for index in range(REQUESTS):
            chain = lay_out(memory, shape, index)
            if shape.indirect:
                gpa = REQUESTS_AT + index * REQUEST_STRIDE + TABLE_AT
                inner = b"".join(struct.pack("<QIHH", g, n, 0, flags) for g, n, flags in chain)
                memory.write(gpa, inner)
                chain = [(gpa, len(inner), INDIRECT)]
            for lap, owner in zip(laps, (AVAIL, USED), strict=True):
                for i, (gpa, length, flags) in enumerate(chain):
                    link = NEXT if i < len(chain) - 1 else 0
                    lap += struct.pack("<QIHH", gpa, length, index, flags | link | owner)
        self._laps = [bytes(lap) for lap in laps]
        self.size = len(laps[0]) // 16
        self._stride = len(laps[0]) // REQUESTS
        self._ring = memory.view(RING, len(laps[0]))
        self._ring[:] = self._laps[1]  # no slot is available in the first lap
        self._offered = 0

    def close(self) -> None:
        """Let go of RAM."""
        self._ring.release()

    def offer(self, count: int) -> None:
        """Make the next ``count`` requests available."""
        lap, first = divmod(self._offered, REQUESTS)
        begin, end = first * self._stride, (first + count) * self._stride
        self._ring[begin:end] = self._laps[lap % 2][begin:end]
        self._offered += count

    def served(self, memory: GuestMemory) -> bool:
        """Whether the request offered last is back."""
        lap, last = divmod(self._offered - 1, REQUESTS)
        flags = memory.read_int(RING + last * self._stride + 14, 2)
        return flags & (AVAIL | USED) == (0 if lap % 2 else AVAIL | USED)


def measure_ns(
    backend: BlockBackend, shape: Shape, *, packed: bool, depth: int, rounds: int
) -> float:
    """ns per request, the least of ``rounds``."""
    random.seed(5)
    with GuestMemory([(0, RAM_BYTES)]) as memory:
        load = PackedLoad(memory, shape) if packed else SplitLoad(memory, shape)
        device = BlockDevice(BlockConfig(), backend)
        device.set_acked_features(FEATURES | (Feature.RING_PACKED if packed else 0))
        queue = device.queues[0]
        queue.size = load.size
        queue.descriptor_area, queue.driver_area, queue.device_area = (
            RING, DRIVER_AREA, DEVICE_AREA,
        )
        queue.ready = True
        device.activate(memory, Interrupts())
        best = float("inf")
        passes = max(1, 64 // depth)
        clock, process, offer = time.perf_counter_ns, device.process_queue, load.offer
        for _ in range(rounds):
            spent = 0
            for _ in range(passes):
                offer(depth)
                start = clock()
                process(0)
                spent += clock() - start
            best = min(best, spent / (passes * depth))
        for index in range(REQUESTS):
            status = memory.read_int(REQUESTS_AT + index * REQUEST_STRIDE + STATUS_AT, 1)
            if status or not load.served(memory):
                raise RuntimeError(f"{shape.name}: request {index} has status {status}")
        device.reset()
        load.close()
    return best


def set_up(write: Callable[[int, int, int], None], load: SplitLoad | PackedLoad) -> None:
    """What a driver writes into the registers until its queue runs."""
    packed = isinstance(load, PackedLoad)
    features = FEATURES | (Feature.RING_PACKED if packed else 0)
    for status in (1, 3):
        write(Register.STATUS, 4, status)
    for word in (0, 1):
        write(Register.DRIVER_FEATURES_SEL, 4, word)
        write(Register.DRIVER_FEATURES, 4, features >> 32 * word & 0xFFFF_FFFF)
    write(Register.STATUS, 4, 11)
    write(Register.QUEUE_NUM, 4, load.size)
    for register, area in (
        (Register.QUEUE_DESC_LOW, RING),
        (Register.QUEUE_DRIVER_LOW, DRIVER_AREA),
        (Register.QUEUE_DEVICE_LOW, DEVICE_AREA),
    ):
        write(register, 4, area)
    write(Register.QUEUE_READY, 4, 1)
    write(Register.STATUS, 4, 15)


def measure_loop_ns(
    backend: BlockBackend, shape: Shape, *, packed: bool, rounds: int, requests: int = 64
) -> float:
    """ns from doorbell to interrupt and back, one request at a time, the least of ``rounds``."""
    random.seed(5)
    doorbell, irq = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
    with GuestMemory([(0, RAM_BYTES)]) as memory:
        load = PackedLoad(memory, shape) if packed else SplitLoad(memory, shape)
        transport = MmioTransport(
            BlockDevice(BlockConfig(), backend), memory,
            functools.partial(os.eventfd_write, irq, 1), report=print, keep_used=True,
        )
        set_up(transport.write, load)
        serve, offer, clock = transport.service, load.offer, time.perf_counter_ns
        best, left, started = float("inf"), rounds * requests, 0

        def service() -> float | None:
            nonlocal best, left, started
            delay_s = serve(0)
            left -= 1
            if left % requests == 0:
                best = min(best, (clock() - started) / requests)
                if not left:
                    loop.stop()
                started = clock()
            offer(1)
            os.eventfd_write(doorbell, 1)
            return delay_s

        loop = IoLoop([IoSource(doorbell, service)])
        offer(1)
        os.eventfd_write(doorbell, 1)
        started = clock()
        loop.run()
        transport.close()
        load.close()
    for fd in (doorbell, irq):
        os.close(fd)
    return best


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    arguments = parser.parse_args()
    rounds = 100 if arguments.quick else 1000
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "disk.img"
        image.write_bytes(random.randbytes(1 << 20) * (DISK_BYTES >> 20))
        raw = RawBackend(str(image), report=print)
        backends: list[BlockBackend] = [
            NullBackend(bytearray(DISK_BYTES)), MemoryBackend(bytearray(DISK_BYTES)), raw,
        ]
        print(f"{'ns per request':44}{'ring':>9}{'memory':>9}{'file':>9}")
        for shape in SHAPES:
            for kind in ("split", "packed"):
                row = f"{shape.name}, loop, {kind}"
                if arguments.only in row:
                    loops = [
                        measure_loop_ns(
                            backend, shape, packed=kind == "packed",
                            rounds=max(rounds // 10 // max(shape.segments, 1), 5),
                        )
                        for backend in backends
                    ]
                    print(f"{row:44}" + "".join(f"{cell:9.0f}" for cell in loops))
        for shape in SHAPES:
            for depth in DEPTHS:
                for kind in ("split", "packed"):
                    row = f"{shape.name}, depth {depth}, {kind}"
                    if arguments.only not in row:
                        continue
                    cells = [
                        measure_ns(
                            backend, shape, packed=kind == "packed", depth=depth,
                            rounds=max(rounds // max(shape.segments, 1), 20),
                        )
                        for backend in backends
                    ]
                    print(f"{row:44}" + "".join(f"{cell:9.0f}" for cell in cells))
        raw.close()


if __name__ == "__main__":
    main()
