"""``pyvmm run --disk vhost-user=SOCKET``: Linux on a disk that another process serves.

The root is build/tools.img, read-only, served by pyvmm run itself; /dev/vdb is the back end's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.export_process import Export
from tests.support.guest import (
    FIO,
    MIB,
    TOOLS,
    USER_SPACE,
    Guest,
    Run,
    boot,
    run_in_guest,
    sparse,
)
from tests.support.patience import patient
from tests.support.storage_daemon import StorageDaemon

pytestmark = pytest.mark.kvm

BackEnd = Export | StorageDaemon
MOUNT = "mkdir /mnt/d; mount /dev/vdb /mnt/d"
MAKE = f"/sbin/mke2fs -q -t ext4 /dev/vdb; {MOUNT}"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """64 MiB of nothing."""
    return sparse(tmp_path / "disk.img", 64)


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    return tmp_path / "disk.sock"


@pytest.fixture(params=["pyvmm export", "qemu-storage-daemon"])
def back_end(request: pytest.FixtureRequest, disk: Path, socket: Path) -> Iterator[BackEnd]:
    """``disk`` on ``socket``, with four queues."""
    if request.param == "pyvmm export":
        with Export(f"{disk},queues=4", socket) as export:
            yield export
    else:
        with StorageDaemon(disk, socket, queues=4) as daemon:
            yield daemon


def guest(socket: Path, script: str, *options: str, queues: int = 1, append: str = "") -> Run:
    """Boot with ``socket`` as /dev/vdb and run ``script``; its status must be 0."""
    run = boot(
        "--disk", f"{TOOLS},ro", "--disk", f"vhost-user={socket},queues={queues}", *options,
        append=f"{append} {run_in_guest('mount -t tmpfs t /mnt; ' + script)}",
    )
    assert run.status == 0, run.console + run.messages
    return run


def test_fault_12_requests_of_many_pieces_are_served(back_end: BackEnd, socket: Path) -> None:
    pieces = "1 2 125 126 127 128 129 253 254 255 256 300 1000"
    run = guest(
        socket,
        "set -e; echo segments $(cat /sys/block/vdb/queue/max_segments);"
        f" pyvmm-scattered /dev/vdb 4096 {pieces}; pyvmm-scattered /dev/vdb 512 {pieces}",
    )
    assert "segments 126\n" in run.console
    for size in (4096, 512):
        for count in pieces.split():
            assert f"scattered {count} {size}\n" in run.console


def test_a_file_system_is_there_for_the_next_run(
    back_end: BackEnd, disk: Path, socket: Path
) -> None:
    run = guest(
        socket,
        "set -e; echo queues $(ls /sys/block/vdb/mq | wc -l);"
        " echo packed $(cut -c 35 /sys/block/vdb/device/features);"
        f" {MAKE}; {FIO.format(file='/mnt/d/f', size='8m')};"
        " cd /mnt/d; md5sum f > sum; cd /; umount /mnt/d",
        queues=4, append="possible_cpus=4",
    )  # fmt: skip
    assert run.lines("queues ") == ["4"]
    # VIRTIO_F_RING_PACKED: our export offers it, and libvhost-user does not.
    assert run.lines("packed ") == [str(int(isinstance(back_end, Export)))]
    done = subprocess.run(["e2fsck", "-fn", disk], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
    guest(socket, f"set -e; {MOUNT}; cd /mnt/d; md5sum -c sum; cd /; umount /mnt/d")


@pytest.mark.usefixtures("back_end")
def test_a_disk_of_ours_and_one_of_theirs_at_once(disk: Path, socket: Path, tmp_path: Path) -> None:
    ours = sparse(tmp_path / "ours.img", 64)
    jobs = [FIO.format(file=f"/dev/vd{letter}", size="8m") for letter in "bc"]
    run = guest(socket, f"{jobs[0]} & {jobs[1]} && wait $!", "--disk", str(ours))
    assert run.console.count(";t;0;0;") == 2
    assert disk.stat().st_size == ours.stat().st_size == 64 * MIB
    assert disk.read_bytes() != ours.read_bytes()


@pytest.mark.usefixtures("back_end")
def test_a_driver_lets_go_and_comes_back_under_load(socket: Path) -> None:
    """Each unbind stops the rings by GET_VRING_BASE with requests under way."""
    run = guest(
        socket,
        "d=/sys/bus/virtio/drivers/virtio_blk; i=0; while [ $i -lt 10 ]; do"
        " dd if=/dev/zero of=/dev/vdb bs=64k count=900 2>/dev/null &"
        " dd if=/dev/vdb of=/dev/null bs=4k 2>/dev/null & usleep 20000;"
        " echo virtio1 > $d/unbind; wait; echo virtio1 > $d/bind; i=$((i+1)); done;"
        " echo rounds $i; dd if=/dev/vdb of=/dev/null bs=1M && echo alive",
    )
    assert run.lines("rounds ") == ["10"]
    assert run.lines("alive") == [""]


def test_the_root_can_be_theirs(socket: Path) -> None:
    with Export(f"{TOOLS},ro", socket):
        run = boot("--disk", f"vhost-user={socket}", append=run_in_guest("test -x /sbin/mke2fs"))
    assert run.status == 0, run.console + run.messages
    assert run.lines("pyvmm-init: root ") == ["/dev/vda ext4 ro"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_back_end_that_dies_under_load_ends_the_run(
    back_end: BackEnd, socket: Path, number: signal.Signals
) -> None:
    """Not a hang: the guest would wait for ever for what nobody answers."""
    load = (
        "dd if=/dev/vdb of=/dev/null bs=1M count=8; echo under way;"
        " while true; do dd if=/dev/zero of=/dev/vdb bs=64k count=900; done"
    )
    with Guest(load, "--disk", f"vhost-user={socket}") as run:
        run.wait_for("under way")
        time.sleep(0.2)
        begun_s = time.monotonic()
        back_end.process.send_signal(number)
        status, messages = run.finish()
    assert time.monotonic() - begun_s < patient(20)
    assert status == 125, messages
    assert str(socket) in messages
    assert len(messages.splitlines()) == 1


def test_a_back_end_that_has_stopped_does_not_hold_up_the_end(
    disk: Path, socket: Path
) -> None:
    load = "echo under way; while true; do dd if=/dev/zero of=/dev/vdb bs=64k count=900; done"
    with Export(disk, socket) as export, Guest(load, "--disk", f"vhost-user={socket}") as run:
        run.wait_for("under way")
        export.process.send_signal(signal.SIGSTOP)
        time.sleep(0.2)
        begun_s = time.monotonic()
        run.process.terminate()
        status, _ = run.finish()
    assert time.monotonic() - begun_s < patient(15)
    assert status == 128 + signal.SIGTERM


def test_a_back_end_that_dies_unused_ends_the_run(back_end: BackEnd, socket: Path) -> None:
    with Guest("sleep 100", "--disk", f"vhost-user={socket}") as run:
        run.wait_for(USER_SPACE)
        back_end.kill()
        status, messages = run.finish()
    assert status == 125, messages
    assert str(socket) in messages


def test_a_grown_disk_is_a_larger_one_when_both_are_told(disk: Path, socket: Path) -> None:
    script = (
        "echo ready; while [ $(cat /sys/block/vdb/size) = 131072 ]; do usleep 50000; done;"
        " echo size $(cat /sys/block/vdb/size);"
        " dd if=/dev/zero of=/dev/vdb bs=1M seek=100 count=1 conv=fsync && echo written"
    )
    with Export(disk, socket) as export, Guest(script, "--disk", f"vhost-user={socket}") as run:
        run.wait_for("ready")
        os.truncate(disk, 128 * MIB)
        export.process.send_signal(signal.SIGUSR1)
        export.wait_for("bytes now")
        run.process.send_signal(signal.SIGUSR1)
        assert run.wait_for("size ") == "size 262144"
        run.wait_for("written")
        assert run.finish()[0] == 0


def test_nobody_at_the_socket_is_said_at_once(socket: Path) -> None:
    run = boot("--disk", f"{TOOLS},ro", "--disk", f"vhost-user={socket}")
    assert run.status == 125
    assert str(socket) in run.messages
    assert len(run.messages.splitlines()) == 1
    assert run.console == ""
