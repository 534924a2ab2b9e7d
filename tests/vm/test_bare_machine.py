"""How a machine is put together, seen without running its guest: any /dev/kvm will do."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.cli.parse import parse_disk
from pyvmm.config import RunConfig
from pyvmm.machine import build
from pyvmm.report import Reporter
from tests.support.kernels import elf

pytestmark = pytest.mark.bare


@pytest.mark.parametrize(("append", "console_sources"), [
    ("", 1),  # the UART
    ("console=hvc0", 4),  # typed bytes, output, the terminal's size, the UART
])
def test_no_device_waits_for_another_ones_thread(
    tmp_path: Path, append: str, console_sources: int
) -> None:
    """Least of all the entropy device for the console, whose terminal may take nothing."""
    kernel = tmp_path / "guest.elf"
    kernel.write_bytes(elf())
    disks = []
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(4096))
        disks.append(parse_disk(f"{tmp_path / name},queues=2"))
    config = RunConfig(kernel=kernel, disks=tuple(disks), console="none", append=append)
    with build(config, report=Reporter()) as machine:
        threads = dict(machine.board.workers)
    assert {name: len(sources) for name, sources in threads.items()} == {
        "virtio0": 3, "virtio1": 3,  # two queues, and a look at the file's size
        "console": console_sources,
        "entropy": 2,  # a queue, and a look at the host, as every device has
    }
    fds = [source.fd for sources in threads.values() for source in sources]
    assert len(set(fds)) == len(fds)
