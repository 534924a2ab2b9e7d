"""A block device without its fast path, to compare the two."""

from __future__ import annotations

import pytest

from pyvmm.virtio.block import BlockDevice
from pyvmm.virtio.device import RingDevice


class GeneralBlockDevice(BlockDevice):
    """Serves every chain by the general path."""

    process_queue = RingDevice.process_queue
    _serve_ring = RingDevice._serve_ring


def without_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block device takes the general path from now on."""
    monkeypatch.setattr(BlockDevice, "process_queue", RingDevice.process_queue)
    monkeypatch.setattr(BlockDevice, "_serve_ring", RingDevice._serve_ring)
