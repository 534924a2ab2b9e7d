"""BlockDevice with Linux's own driver: file systems, fio, discard, resize, queues, unbind, NBD.

The root is build/tools.img, read-only; the disk under test is /dev/vdb.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.guest import (
    FIO,
    MIB,
    ROOT_DISK,
    Guest,
    Run,
    boot,
    command,
    environment,
    run_in_guest,
    sparse,
)
from tests.support.patience import patient

pytestmark = pytest.mark.kvm


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """64 MiB of nothing."""
    return sparse(tmp_path / "disk.img", 64)


def guest(disk: str | Path, script: str, *options: str, append: str = "") -> Run:
    """Boot with ``disk`` as /dev/vdb and run ``script``; its status must be 0."""
    run = boot(
        *ROOT_DISK, "--disk", disk, *options,
        append=f"{append} {run_in_guest('mount -t tmpfs t /mnt; ' + script)}",
    )
    assert run.status == 0, run.console + run.messages
    return run


@pytest.mark.parametrize("options", ["", ",queues=4", ",writeback=off"])
def test_a_file_system_is_made_used_and_clean(disk: Path, options: str) -> None:
    fio = FIO.format(file="/mnt/d/f", size="16m")
    guest(
        f"{disk}{options}",
        f"set -e; /sbin/mke2fs -q -t ext4 /dev/vdb; mkdir /mnt/d; mount /dev/vdb /mnt/d; {fio};"
        " umount /mnt/d; /sbin/e2fsck -fn /dev/vdb",
    )
    done = subprocess.run(["e2fsck", "-fn", disk], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout


def test_fio_verifies_what_it_wrote_on_the_bare_disk(disk: Path) -> None:
    run = guest(disk, FIO.format(file="/dev/vdb", size="32m"))
    assert ";t;0;0;" in run.console, "fio's terse line: job t, no error"
    assert disk.stat().st_size == 64 * MIB


@pytest.mark.parametrize(
    "without", ["RING_PACKED", "RING_PACKED,EVENT_IDX", "RING_PACKED,EVENT_IDX,INDIRECT_DESC"]
)
def test_fio_verifies_on_split_rings_too(disk: Path, without: str) -> None:
    """Linux takes packed rings where they are offered, as they are in the other tests."""
    fio = FIO.format(file="/dev/vdb", size="16m")
    script = run_in_guest(f"mount -t tmpfs t /mnt; cat /sys/block/vdb/device/features; echo; {fio}")
    _, _, _, *options = command(
        *ROOT_DISK, "--disk", disk, "--timeout", "120", "--append", f"quiet {script}"
    )
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.plain_rings", without, *options],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment(), check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ";t;0;0;" in done.stdout
    (bits,) = re.findall(r"^([01]{64})$", done.stdout, re.MULTILINE)
    assert bits[34] == "0", "VIRTIO_F_RING_PACKED was negotiated"
    assert bits[29] == ("0" if "EVENT_IDX" in without else "1")
    assert bits[28] == ("0" if "INDIRECT_DESC" in without else "1")


@pytest.mark.parametrize(
    "rings",
    [
        "", "RING_PACKED", "INDIRECT_DESC", "RING_PACKED,INDIRECT_DESC",
        "128", "RING_PACKED,128", "16", "RING_PACKED,16", "2", "RING_PACKED,2",
    ],
)  # fmt: skip
def test_fault_12_requests_of_many_pieces_are_served(disk: Path, rings: str) -> None:
    """As long as SEG_MAX allows, in rings that are shorter, too."""
    pieces = "1 2 14 15 62 125 126 127 128 129 200 253 254 255 256 300 1000"
    script = run_in_guest(
        "set -e; echo segments $(cat /sys/block/vdb/queue/max_segments);"
        f" pyvmm-scattered /dev/vdb 4096 {pieces}; pyvmm-scattered /dev/vdb 512 {pieces}"
    )
    _, _, _, *options = command(
        *ROOT_DISK, "--disk", disk, "--timeout", "100", "--append", f"quiet {script}"
    )
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.plain_rings", rings, *options],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment(), check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "segments 254\n" in done.stdout
    for size in (4096, 512):
        for count in pieces.split():
            assert f"scattered {count} {size}\n" in done.stdout


def blocks(path: Path, offset: int) -> bool:
    """Whether the file has data, not a hole, at ``offset``."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) == offset
    except OSError:
        return False
    finally:
        os.close(fd)


def test_discard_and_write_zeroes_are_holes_in_the_file(disk: Path) -> None:
    disk.write_bytes(b"\xa5" * (64 * MIB))
    run = guest(
        disk,
        "set -e; cd /sys/block/vdb/queue; cat discard_max_bytes write_zeroes_max_bytes;"
        " /sbin/blkdiscard -o 1048576 -l 8388608 /dev/vdb;"
        " /sbin/blkdiscard -z -o 16777216 -l 4194304 /dev/vdb; sync;"
        " dd if=/dev/vdb bs=1M skip=16 count=4 | tr -d '\\000' | wc -c",
    )
    numbers = [int(line) for line in run.console.split() if line.isdigit()]
    assert numbers[0] > 0
    assert numbers[1] > 0
    assert numbers[-1] == 0, "write-zeroes reads as zeroes"
    assert [blocks(disk, at * MIB) for at in (0, 1, 8, 9)] == [True, False, False, True]
    data = disk.read_bytes()
    assert data[16 * MIB : 20 * MIB] == bytes(4 * MIB)
    for begin, end in ((0, 1), (9, 16), (20, 64)):
        assert data[begin * MIB : end * MIB] == b"\xa5" * ((end - begin) * MIB)


def test_a_disk_has_four_queues(disk: Path) -> None:
    run = guest(
        f"{disk},queues=4",
        "echo queues $(ls /sys/block/vdb/mq); " + FIO.format(file="/dev/vdb", size="8m"),
        append="possible_cpus=4",
    )
    assert run.lines("queues ") == ["0 1 2 3"]


def test_two_disks_at_once_keep_their_own_data(tmp_path: Path) -> None:
    first, second = sparse(tmp_path / "a.img", 64), sparse(tmp_path / "b.img", 64)
    jobs = [FIO.format(file=f"/dev/vd{letter}", size="16m") for letter in "bc"]
    guest(first, f"{jobs[0]} & {jobs[1]} && wait $!", "--disk", str(second))
    assert first.read_bytes() != second.read_bytes()


def test_unbind_and_bind_under_load_twenty_times(disk: Path) -> None:
    run = guest(
        disk,
        "d=/sys/bus/virtio/drivers/virtio_blk; i=0; while [ $i -lt 20 ]; do"
        " dd if=/dev/zero of=/dev/vdb bs=64k count=900 2>/dev/null &"
        " dd if=/dev/vdb of=/dev/null bs=4k 2>/dev/null & usleep 20000;"
        " echo virtio1 > $d/unbind; wait; echo virtio1 > $d/bind; i=$((i+1)); done;"
        " echo rounds $i; dd if=/dev/vdb of=/dev/null bs=1M && echo alive",
    )
    assert run.lines("rounds ") == ["20"]
    assert run.lines("alive") == [""]
    assert disk.stat().st_size == 64 * MIB


def test_a_read_only_disk_is_mounted_and_a_write_refused(disk: Path) -> None:
    subprocess.run(["mke2fs", "-q", "-t", "ext4", disk], check=True)
    before = disk.read_bytes()
    guest(
        f"{disk},ro",
        "mkdir /mnt/d; mount -o ro /dev/vdb /mnt/d && ls /mnt/d/lost+found &&"
        " ! touch /mnt/d/x && ! mount -o remount,rw /mnt/d &&"
        " ! dd if=/dev/zero of=/dev/vdb count=1",
    )
    assert disk.read_bytes() == before


def test_a_snapshot_leaves_its_base_alone(disk: Path, tmp_path: Path) -> None:
    subprocess.run(["mke2fs", "-q", "-t", "ext4", disk], check=True)
    before = disk.read_bytes()
    write = "mkdir /mnt/d; mount /dev/vdb /mnt/d && echo kept > /mnt/d/x && umount /mnt/d"
    show = "mkdir /mnt/d; mount /dev/vdb /mnt/d; ls /mnt/d"
    assert "x" not in guest(f"{disk},snapshot", write + "; " + show).messages
    overlay = tmp_path / "overlay"
    guest(f"{disk},overlay={overlay}", write)
    assert "kept" in guest(f"{disk},overlay={overlay}", show + "; cat /mnt/d/x").console
    assert overlay.stat().st_blocks * 512 < 16 * MIB, "the overlay is sparse"
    assert disk.read_bytes() == before


def test_a_grown_file_is_a_larger_disk(disk: Path) -> None:
    run = Guest(
        "cat /sys/block/vdb/size; echo ready; while [ $(cat /sys/block/vdb/size) = 131072 ];"
        " do usleep 50000; done; echo size $(cat /sys/block/vdb/size);"
        " dd if=/dev/zero of=/dev/vdb bs=1M seek=100 count=1 conv=fsync && echo written",
        "--disk", str(disk),
    )
    run.wait_for("ready")
    os.truncate(disk, 128 * MIB)
    run.process.send_signal(signal.SIGUSR1)
    assert run.wait_for("size ") == "size 262144"
    run.wait_for("written")
    assert run.finish()[0] == 0


def test_a_dead_nbd_server_is_an_error_for_the_guest_and_a_line_on_the_host(
    disk: Path, tmp_path: Path
) -> None:
    socket = tmp_path / "nbd.sock"
    pid_file = tmp_path / "pid"
    subprocess.run(
        ["qemu-nbd", "-f", "raw", "-k", socket, "-t", "--fork", "--pid-file", pid_file, disk],
        check=True, timeout=patient(30),
    )
    server = int(pid_file.read_text())
    run = Guest(
        "dd if=/dev/zero of=/dev/vdb bs=64k count=16 conv=fsync && echo served;"
        " while dd if=/dev/vdb of=/dev/null bs=4k count=1 iflag=direct; do usleep 20000; done;"
        " echo failed",
        "--disk", f"nbd+unix:///?socket={socket}",
    )
    run.wait_for("served")
    os.kill(server, signal.SIGKILL)
    run.wait_for("failed")
    status, messages = run.finish()
    assert status == 0
    assert str(socket) in messages


def test_a_rate_limit_is_kept_and_other_disks_run_on(tmp_path: Path) -> None:
    slow, fast = sparse(tmp_path / "slow.img", 64), sparse(tmp_path / "fast.img", 64)
    run = guest(
        f"{slow},bps=512K:512K",  # 5 s
        "(dd if=/dev/vdb of=/dev/null bs=64k count=48 iflag=direct; echo slow done) &"
        " dd if=/dev/vdc of=/dev/null bs=64k count=96 iflag=direct; echo fast done;"
        " wait; tail -n 2 /proc/uptime",
        "--disk", str(fast),
    )
    order = re.findall(r"^(slow|fast) done$", run.console, re.MULTILINE)
    assert order == ["fast", "slow"]


def test_a_flood_on_one_disk_does_not_starve_another(tmp_path: Path) -> None:
    flooded, calm = sparse(tmp_path / "a.img", 64), sparse(tmp_path / "b.img", 64)
    flood = (
        "fio --name=f --filename=/dev/vdb --rw=randread --bs=4k --iodepth=64 --ioengine=libaio"
        " --direct=1 --time_based --runtime=60 --size=32m --minimal --aux-path=/mnt >/dev/null"
    )
    guest(
        flooded,
        f"{flood} & usleep 500000;"
        " dd if=/dev/vdc of=/dev/null bs=4k count=200 iflag=direct && kill %1; true",
        "--disk", str(calm),
    )


def test_records_acknowledged_before_sigkill_are_there(tmp_path: Path) -> None:
    """SIGKILL of the VMM in a guest's fsync loop: the file system and every record survive."""
    script = (
        "mount -t tmpfs t /mnt; mkdir /mnt/d; mount /dev/vdb /mnt/d; i=0; while true; do"
        " i=$((i+1)); echo record $i > /mnt/d/r$i; sync -d /mnt/d/r$i; sync /mnt/d;"
        " echo ack $i; done"
    )
    for number in range(20):
        disk = sparse(tmp_path / "disk.img", 16)
        subprocess.run(["mke2fs", "-q", "-t", "ext4", disk], check=True)
        run = Guest(script, "--disk", str(disk))
        run.wait_for("ack 1")
        time.sleep(0.05 * (number % 7))
        run.process.kill()
        acked = [int(line.split()[1]) for line in run.lines() if re.fullmatch(r"ack \d+", line)]
        run.finish()
        check = subprocess.run(["e2fsck", "-fy", disk], capture_output=True, check=False)
        assert check.returncode in (0, 1), check.stdout
        clean = subprocess.run(["e2fsck", "-fn", disk], capture_output=True, check=False)
        assert clean.returncode == 0, clean.stdout
        listing = subprocess.run(
            ["debugfs", "-R", "ls -p /", disk], capture_output=True, text=True, check=True
        ).stdout
        present = {int(n) for n in re.findall(r"/r(\d+)/", listing)}
        assert set(range(1, max(acked, default=1) + 1)) <= present
