"""The micro-benchmark of the queue engine measures something, for every row it prints."""

from __future__ import annotations

import pytest

from bench.engine import DISK_BYTES, SHAPES, NullBackend, Shape, measure_ns


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_every_row_can_be_measured(shape: Shape, packed: bool) -> None:
    disk = NullBackend(bytearray(DISK_BYTES))
    assert measure_ns(disk, shape, packed=packed, depth=32, rounds=2) > 0
