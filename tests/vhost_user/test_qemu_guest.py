"""``pyvmm export`` behind QEMU: Linux with its own driver on vhost-user-blk-pci, nothing mocked.

The disk under test is /dev/vdb; the programs come from build/tools.img.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.export_process import Export
from tests.support.guest import FIO, MIB, sparse
from tests.support.patience import patient
from tests.support.qemu_guest import QemuGuest, run_to_end

pytestmark = pytest.mark.lab

PIECES = "1 2 14 15 62 125 126 127 128 129 200 253 254 255 256 300 1000"
MOUNT = "mkdir /mnt/d; mount /dev/vdb /mnt/d"


def clean(disk: Path) -> None:
    """The file system is whole, as another implementation sees it."""
    done = subprocess.run(["e2fsck", "-fn", disk], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """64 MiB of nothing."""
    return sparse(tmp_path / "disk.img", 64)


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    return tmp_path / "export.sock"


@pytest.fixture
def export(disk: Path, socket: Path) -> Iterator[Export]:
    """``disk`` on ``socket``, with two queues."""
    with Export(f"{disk},queues=2", socket) as running:
        yield running


@pytest.mark.parametrize(("cpus", "device"), [(1, ""), (2, ",packed=on")])
def test_a_file_system_outlives_the_qemu_that_made_it(
    export: Export, disk: Path, socket: Path, cpus: int, device: str
) -> None:
    run_to_end(
        socket,
        f"set -e; test $(ls /sys/block/vdb/mq | wc -l) = {cpus};"
        f" test $(cut -c 35 /sys/block/vdb/device/features) = {int('packed' in device)};"
        f" /sbin/mke2fs -q -t ext4 /dev/vdb; {MOUNT}; {FIO.format(file='/mnt/d/f', size='8m')};"
        " cd /mnt/d; md5sum f > sum; cd /; umount /mnt/d; /sbin/e2fsck -fn /dev/vdb",
        cpus=cpus, device=device,
    )
    clean(disk)
    run_to_end(
        socket, f"set -e; {MOUNT}; cd /mnt/d; md5sum -c sum; cd /; umount /mnt/d",
        cpus=cpus, device=device,
    )  # fmt: skip
    assert export.stop() == 0
    clean(disk)


def test_what_was_synced_outlives_a_killed_qemu(
    export: Export, disk: Path, socket: Path
) -> None:
    """SIGKILL in a loop of fsync, and another QEMU at once, on the export that goes on."""
    subprocess.run(["mke2fs", "-q", "-t", "ext4", disk], check=True)
    loop = (
        f"{MOUNT}; i=0; while true; do i=$((i+1)); echo record $i > /mnt/d/r$i;"
        " sync -d /mnt/d/r$i; sync /mnt/d; echo ack $i; done"
    )
    with QemuGuest(socket, loop) as guest:
        guest.wait_for("ack 20")
        guest.kill()
        acked = [int(number) for number in re.findall(r"^ack (\d+)$", guest.console, re.MULTILINE)]
    console = run_to_end(
        socket, f"set -e; {MOUNT}; cd /mnt/d; for f in r*; do echo $f $(cat $f); done;"
        " cd /; umount /mnt/d"
    )
    found = dict(re.findall(r"^r(\d+) (.*)$", console, re.MULTILINE))
    assert {str(number): f"record {number}" for number in acked}.items() <= found.items()
    clean(disk)


UNDER_LOAD = (
    FIO.format(file="/dev/vdb", size="32m")
    + " & until [ $(awk '{print $5}' /sys/block/vdb/stat) -gt 99 ]; do usleep 9999; done;"
    " echo under way; wait $!"
)


@pytest.mark.parametrize("device", [",packed=on", ",indirect_desc=off,event_idx=off"])
def test_a_machine_is_stopped_and_goes_on(export: Export, socket: Path, device: str) -> None:
    """At a stop QEMU asks where the rings are, GET_VRING_BASE, and starts them there again."""
    with QemuGuest(socket, UNDER_LOAD, cpus=2, device=device) as guest:
        guest.wait_for("under way")
        for _ in range(20):
            guest.execute("stop")
            guest.execute("cont")
            time.sleep(0.02)  # so that there is something to stop again
        assert guest.status() == 0, guest.console
    assert ";t;0;0;" in guest.console, "fio's terse line: job t, no error"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_guest_goes_on_when_its_export_is_back(
    export: Export, disk: Path, socket: Path, number: signal.Signals
) -> None:
    """QEMU reconnects; what was not answered is asked for again, and nothing is lost.

    On split rings: where packed ones were, QEMU 7.2 does not remember.
    """
    with QemuGuest(socket, UNDER_LOAD, chardev=",reconnect=1") as guest:
        guest.wait_for("under way")
        export.process.send_signal(number)
        export.process.wait(patient(10))
        with Export(disk, socket):
            assert guest.status() == 0, guest.console
    assert ";t;0;0;" in guest.console, "fio's terse line: job t, no error"


def test_a_driver_lets_go_and_comes_back_under_load(export: Export, socket: Path) -> None:
    """Each unbind stops the rings by GET_VRING_BASE with requests under way."""
    run_to_end(
        socket,
        "d=/sys/bus/virtio/drivers/virtio_blk; set -e; for i in 1 2 3 4 5 6 7 8; do"
        " dd if=/dev/zero of=/dev/vdb bs=64k count=900 2>/dev/null &"
        " dd if=/dev/vdb of=/dev/null bs=4k 2>/dev/null & usleep 20000;"
        " echo virtio1 > $d/unbind; wait; echo virtio1 > $d/bind; done;"
        " dd if=/dev/vdb of=/dev/null bs=1M",
    )
    assert export.stop() == 0


def test_discard_and_write_zeroes_reach_the_file(
    export: Export, disk: Path, socket: Path
) -> None:
    disk.write_bytes(b"\xa5" * (64 * MIB))
    run_to_end(
        socket,
        "set -e; /sbin/blkdiscard -o 1048576 -l 8388608 /dev/vdb;"
        " /sbin/blkdiscard -z -o 16777216 -l 4194304 /dev/vdb",
    )
    data = disk.read_bytes()
    assert data[: 1 * MIB] == b"\xa5" * MIB
    assert data[16 * MIB : 20 * MIB] == bytes(4 * MIB)
    assert data[20 * MIB :] == b"\xa5" * (44 * MIB)
    assert disk.stat().st_blocks * 512 < 57 * MIB, "what was discarded takes no room"


def test_a_grown_file_is_a_larger_disk(export: Export, disk: Path, socket: Path) -> None:
    with QemuGuest(
        socket,
        "echo ready; while [ $(cat /sys/block/vdb/size) = 131072 ]; do usleep 50000; done;"
        " echo size $(cat /sys/block/vdb/size);"
        " dd if=/dev/zero of=/dev/vdb bs=1M seek=100 count=1 conv=fsync",
    ) as guest:
        guest.wait_for("ready")
        os.truncate(disk, 128 * MIB)
        export.process.send_signal(signal.SIGUSR1)
        assert guest.wait_for("size ") == "size 262144"
        assert guest.status() == 0, guest.console


def test_an_overlay_and_its_faults_are_qemus_too(disk: Path, socket: Path, tmp_path: Path) -> None:
    """What is written goes to the overlay, and the scripted fault is the guest's I/O error."""
    faults = tmp_path / "faults"
    faults.write_text("write * sectors 2048-2055: EIO\n")
    overlay = tmp_path / "overlay"
    with Export(f"{disk},overlay={overlay},faults={faults},serial=borrowed", socket):
        run_to_end(
            socket,
            "set -e; test $(cat /sys/block/vdb/serial) = borrowed;"
            " dd if=/dev/zero bs=64k count=1 | tr '\\000' x | dd of=/dev/vdb oflag=direct bs=64k;"
            " ! dd if=/dev/zero of=/dev/vdb bs=4k seek=256 count=1 oflag=direct",
        )
    assert disk.read_bytes() == bytes(64 * MIB)
    assert overlay.stat().st_blocks > 0


def test_two_guests_read_one_read_only_disk(disk: Path, socket: Path) -> None:
    subprocess.run(["mke2fs", "-q", "-t", "ext4", disk], check=True)
    before = disk.read_bytes()
    script = (
        "set -e; test $(cat /sys/block/vdb/ro) = 1; mkdir /mnt/d; mount -o ro /dev/vdb /mnt/d;"
        " ls -d /mnt/d/lost+found; echo mounted; read line; ! dd if=/dev/zero of=/dev/vdb count=1"
    )
    with (
        Export(f"{disk},ro", socket),
        QemuGuest(socket, script) as first,
        QemuGuest(socket, script) as second,
    ):
        for guest in (first, second):
            guest.wait_for("mounted")
        for guest in (first, second):
            guest.type("\n")
            assert guest.status() == 0, guest.console
    assert disk.read_bytes() == before


def test_a_writable_disk_is_one_qemus_at_a_time(export: Export, socket: Path) -> None:
    with QemuGuest(socket, "echo up; read line; dd if=/dev/vdb of=/dev/null bs=1M") as first:
        first.wait_for("up")
        with QemuGuest(socket, "echo up") as second:
            assert second.end() == 1, second.console
        first.type("\n")
        assert first.status() == 0, first.console


def test_memory_that_could_shrink_is_refused_unless_trusted(
    export: Export, disk: Path, socket: Path
) -> None:
    """Touching a mapping of what was cut off is a bus error; a sealed memfd cannot be cut."""
    memory = ",seal=off"
    with QemuGuest(socket, "echo up", memory=memory):
        export.wait_for("memory-backend-memfd")
    assert export.stop() == 0
    with Export(disk, socket, "--trust-memory"):
        run_to_end(
            socket, "dd if=/dev/zero of=/dev/vdb bs=1M count=8 conv=fsync", memory=memory
        )


@pytest.mark.parametrize(
    "device",
    [
        "",  # a ring of 128
        ",indirect_desc=off",
        ",packed=on",
        ",packed=on,indirect_desc=off",
        ",queue-size=256",
        ",packed=on,queue-size=256",
        ",queue-size=16",
        ",queue-size=1024,indirect_desc=off",
    ],
)
def test_fault_12_requests_of_many_pieces_are_served(
    export: Export, socket: Path, device: str
) -> None:
    """Linux makes them as long as SEG_MAX allows, whatever ring QEMU has given it."""
    console = run_to_end(
        socket,
        "set -e; echo segments $(cat /sys/block/vdb/queue/max_segments);"
        f" pyvmm-scattered /dev/vdb 4096 {PIECES}; pyvmm-scattered /dev/vdb 512 {PIECES}",
        device=device,
    )
    assert "segments 126\n" in console
    for size in (4096, 512):
        for count in PIECES.split():
            assert f"scattered {count} {size}\n" in console
    assert export.stop() == 0
    assert "stopped" not in export.messages
