"""Chains that a pass took and did not serve: the next pass serves them, each once and whole.

The device gives chains back after PASS_BYTES of zeroed room (``Ring.untake``), and whenever a
queue is stopped.  ``test_ring_model.py`` does it at random.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from pyvmm.virtio.block import BlockConfig
from pyvmm.virtio.block.config import MAX_WRITE_ZEROES_SECTORS
from pyvmm.virtio.device import PASS_BYTES
from pyvmm.virtio.spec import BlockFeature, Feature
from tests.support.packed_driver import PackedDriver
from tests.support.rig import make_rig
from tests.support.virtio_driver import BlockDriver, Descriptor, readable, writable

OUT, WRITE_ZEROES = 1, 13
BASE = int(Feature.VERSION_1 | BlockFeature.FLUSH | BlockFeature.WRITE_ZEROES)
ZERO_BYTES = MAX_WRITE_ZEROES_SECTORS * 512
WRITES = 4


@pytest.mark.parametrize("size", [64, 61], ids=["64", "61"])
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("ring", ["split", "packed"])
@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_fault_1_writes_behind_many_write_zeroes(
    tmp_path: Path, ring: str, indirect: bool, size: int, pieces: int
) -> None:
    """The pass ends after PASS_BYTES of write-zeroes; the writes behind them are not lost."""
    if ring == "split" and size & (size - 1):
        pytest.skip("a split ring has a power of 2")
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(2 * ZERO_BYTES)
    rig = make_rig(path, config=BlockConfig(queue_size=64))
    kind = PackedDriver if ring == "packed" else BlockDriver
    driver = kind(rig.transport, rig.memory, size=size)
    features = BASE | (int(Feature.RING_PACKED) if ring == "packed" else 0)
    driver.start(features | (int(Feature.INDIRECT_DESC) if indirect else 0))
    free, offered, statuses = 0, [], []

    def offer(request_type: int, sector: int, data: bytes, cuts: int) -> None:
        nonlocal free
        step = len(data) // cuts
        chain = [readable(driver.header(request_type, sector), 16)]
        chain += [readable(driver.put(data[i : i + step]), step) for i in range(0, len(data), step)]
        statuses.append(driver.status_byte())
        chain.append(writable(statuses[-1], 1))
        placed: list[Descriptor] = [driver.indirect(chain)] if indirect else chain
        driver.place(placed, free)
        offered.append((free, 1))
        free += len(placed)

    for lap in range(3):  # the ring's end lies in another chain each time
        free, offered, statuses = 0, [], []
        zeroes = PASS_BYTES // ZERO_BYTES
        for _ in range(zeroes):
            offer(WRITE_ZEROES, 0, struct.pack("<QII", 0, MAX_WRITE_ZEROES_SECTORS, 0), 1)
        for i in range(WRITES):
            offer(OUT, 100 * i, bytes([16 * lap + i + 1]) * 1024, pieces)
        while rig.transport.service(0) is not None:
            pass
        assert driver.reap() == offered
        assert [rig.memory.read_int(gpa, 1) for gpa in statuses] == [0] * len(offered)
        disk = rig.disk
        for i in range(WRITES):
            assert disk[51200 * i : 51200 * i + 1024] == bytes([16 * lap + i + 1]) * 1024
        assert disk.count(0) == len(disk) - WRITES * 1024
    assert not driver.needs_reset
    rig.transport.close()
    rig.backend.close()
