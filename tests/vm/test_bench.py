"""The bench's rows that boot Linux, once and short: that they measure, not what."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import peers
from bench.host import Host
from bench.rows import boot, guest_disk

pytestmark = pytest.mark.kvm


def test_a_guest_is_measured_by_fio_and_by_its_start(tmp_path: Path) -> None:
    host, ours = Host(tmp_path, 0.3), peers.load()["vmm"][0]
    disk = guest_disk.sample(host, ours, ["guest.read.d1", "guest.write.fsync"])
    assert sorted(disk) == ["guest.read.d1", "guest.write.fsync"]
    assert all(reading.value > 0 for reading in disk.values())
    start = boot.sample_user_space(host, ours, [boot.USER_SPACE_FIGURE.key])
    assert start[boot.USER_SPACE_FIGURE.key].value > 0


def test_memory_is_that_of_the_vmm_alone(tmp_path: Path) -> None:
    ours = peers.load()["vmm"][0]
    reading = boot.sample_memory(Host(tmp_path, 0.3), ours, [boot.MEMORY.key])[boot.MEMORY.key]
    assert 1 < reading.value < 200, "MiB; guest RAM is 256"
