"""The front end and the disk behind it with real back ends: qemu-storage-daemon, pyvmm export."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyvmm.errors import PeerClosedError, VhostUserError
from pyvmm.memory import GuestMemory
from pyvmm.vhost_user.block import VhostUserBlock
from pyvmm.vhost_user.frontend import Frontend
from pyvmm.vhost_user.protocol import MemoryRegion
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.spec import Register
from tests.support.export_process import Export
from tests.support.patience import patient
from tests.support.storage_daemon import StorageDaemon
from tests.support.vhost_user_disk import RAM_BYTES, eventfds, is_readable
from tests.support.vhost_user_peers import open_fds
from tests.support.virtio_driver import RAM_BASE, BlockDriver, Descriptor

IN, OUT, FLUSH = 0, 1, 4

# The front end


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[StorageDaemon]:
    (tmp_path / "image").write_bytes(bytes(1 << 20))
    with StorageDaemon(tmp_path / "image", tmp_path / "socket", queues=2) as daemon:
        yield daemon


def test_qemu_storage_daemon(tmp_path: Path, daemon: StorageDaemon) -> None:
    before = open_fds()
    with (
        Frontend.connect(str(tmp_path / "socket")) as frontend,
        GuestMemory([(0, 0x4000), (0x10_0000, 0x4000)], shared=True) as memory,
    ):
        assert frontend.max_queues == 2
        assert frontend.max_mem_regions >= 8
        assert int.from_bytes(frontend.get_config(0, 8), "little") == (1 << 20) // 512
        frontend.set_features(frontend.features & 1 << 32)
        regions = [
            MemoryRegion(part.gpa, part.length, part.host_address, part.offset)
            for part in memory.regions
        ]
        assert memory.fd is not None
        for region in regions:
            frontend.add_region(region, memory.fd)
        base = regions[1].user_address
        kick, call = os.eventfd(0), os.eventfd(0)
        for start in (0, 3):  # twice: the second time the ring goes on where it was
            memory.write_int(0x10_0000 + 0x2002, 2, start)  # used.idx
            memory.write_int(0x10_0000 + 0x1002, 2, start)  # avail.idx
            frontend.start_queue(
                1, size=16, descriptor=base, driver=base + 0x1000, device=base + 0x2000,
                base=start, kick_fd=kick, call_fd=call,
            )  # fmt: skip
            os.eventfd_write(kick, 1)
            frontend.check()
            assert frontend.stop_queue(1) == start
        os.close(kick)
        os.close(call)
        for region in regions:
            frontend.remove_region(region)
        frontend.check()
        daemon.kill()
        with pytest.raises(PeerClosedError, match="socket: the back end has hung up"):
            frontend.check()
    assert open_fds() == before


def test_qemu_storage_daemon_takes_one_front_end_at_a_time(
    tmp_path: Path, daemon: StorageDaemon
) -> None:
    path = str(tmp_path / "socket")
    with Frontend.connect(path), pytest.raises(
        VhostUserError, match="the reply to GET_FEATURES did not come"
    ):
        Frontend.connect(path, timeout_s=0.1)
    assert daemon.process.poll() is None
    with Frontend.connect(path) as frontend:
        frontend.check()


# The disk


class PatientDriver(BlockDriver):
    """Waits for the device, which another process is, before it looks at the used ring."""

    call_fd = -1

    def restart(self) -> None:
        """See ``VirtioDriver.restart``; each queue has RAM of its own."""
        super().restart()
        self._top = RAM_BASE + self.index * (RAM_BYTES // 4)
        self.desc, self.avail, self.used = (self.alloc(size, 16) for size in (256, 64, 256))

    def submit(self, chain: Sequence[Descriptor], head: int = 0) -> None:
        super().submit(chain, head)
        until_s = time.monotonic() + patient(10)
        while self.memory.read_int(self.used + 2, 2) == self.used_idx:
            assert time.monotonic() < until_s, "no answer"
            select.select([self.call_fd], [], [], 1.0)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.call_fd)


@dataclass
class Served:
    """A disk that another process serves, and a driver of each of its queues."""

    image: Path
    server: StorageDaemon | Export
    device: VhostUserBlock
    transport: MmioTransport
    drivers: list[PatientDriver]
    reasons: list[str]

    def start(self) -> None:
        """From reset to DRIVER_OK with all queues."""
        first = self.drivers[0]
        assert first.negotiate()
        for driver in self.drivers:
            driver.restart()
        for driver in self.drivers:
            driver.setup_queue()
        first.set(Register.STATUS, 15)
        assert first.status == 15


@pytest.fixture(params=["qemu-storage-daemon", "pyvmm export"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    image = tmp_path / "image"
    image.write_bytes(b"".join(bytes([i]) * 512 for i in range(64)))
    before = open_fds()
    with (
        eventfds(4) as fds,
        (
            Export(f"{image},queues=2", tmp_path / "socket")
            if request.param == "pyvmm export"
            else StorageDaemon(image, tmp_path / "socket", queues=2)
        ) as server,
        Frontend.connect(str(tmp_path / "socket")) as frontend,
        GuestMemory([(RAM_BASE, RAM_BYTES)], shared=True) as memory,
    ):
        device = fds.device(frontend)
        transport = MmioTransport(device, memory, lambda: None, report=lambda line: None)
        drivers = [PatientDriver(transport, memory, index=index) for index in range(2)]
        for driver in drivers:
            driver.call_fd = fds.call
        yield Served(image, server, device, transport, drivers, fds.reasons)
        transport.close()
    assert open_fds() == before


def test_another_process_serves_every_queue(served: Served) -> None:
    assert served.device.capacity_sectors == 64
    assert len(served.device.queues) == 2
    for round_ in range(2):  # the second time after a reset
        served.start()
        for driver in served.drivers:
            sector = 8 * round_ + driver.index
            data = os.urandom(512)
            assert driver.request(IN, sector, room=512) == (0, 513, bytes([sector]) * 512)
            assert driver.request(OUT, sector, data=data).status == 0
            assert driver.request(FLUSH).status == 0
            assert driver.request(IN, sector, room=512, indirect=True).data == data
            assert served.image.read_bytes()[sector * 512 :][:512] == data
    assert served.reasons == []


def test_another_process_that_is_killed(served: Served) -> None:
    served.start()
    served.device.look()
    served.server.kill()
    assert is_readable(served.device.fileno())
    served.device.look()
    served.drivers[0].notify()
    served.drivers[0].set(Register.STATUS, 0)
    (reason,) = served.reasons
    assert reason.endswith("socket: the back end has hung up")
