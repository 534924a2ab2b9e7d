"""Linux on ``pyvmm run``: our kernel and image, each test one boot seen from outside."""

from __future__ import annotations

import hashlib
import random
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.guest import (
    IMAGE,
    USER_SPACE,
    VMLINUX,
    boot,
    command,
    environment,
    run_in_guest,
)
from tests.support.patience import patient

pytestmark = pytest.mark.kvm


def e2fsck(image: Path) -> None:
    """Fail unless the file system in ``image`` is clean without any repair."""
    done = subprocess.run(
        ["e2fsck", "-fn", image], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def mark_in(image: Path) -> str:
    """What our init left in the image: empty before its first boot."""
    done = subprocess.run(
        ["debugfs", "-R", "cat /pyvmm-was-here", image], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_user_space_is_reached_and_what_it_wrote_is_in_the_image(image: Path) -> None:
    before = mark_in(image)
    run = boot("--disk", image, "-v")
    assert run.status == 0, run.console + run.messages
    assert run.lines(USER_SPACE)
    assert run.lines("pyvmm-init: root ") == ["/dev/vda ext4 rw"]
    assert re.search(r"user space after \d+\.\d+ s", run.messages)
    e2fsck(image)
    assert before == ""
    assert mark_in(image).startswith("boots: 1\n")


def test_the_guests_status_is_ours(image: Path) -> None:
    run = boot("--disk", image, append="pyvmm.run=exit 7")
    assert run.status == 7
    assert run.messages == "", "a run that went well says nothing of its own"


def test_a_kernel_panic_is_121_with_its_reason() -> None:
    run = boot("--disk", f"{IMAGE},ro", append="panic=-1 init=/missing")
    assert run.status == 121
    assert "kernel panic: Requested init /missing failed" in run.messages


def test_a_panic_that_does_not_reboot_ends_the_run_too(image: Path) -> None:
    crash = run_in_guest("echo c > /proc/sysrq-trigger")
    run = boot("--disk", image, append=f"panic=0 {crash}")
    assert run.status == 121
    assert "sysrq triggered crash" in run.messages
    assert run.lines("---[ end Kernel panic"), "the whole message was shown first"


def test_a_guest_that_takes_too_long_is_124(image: Path) -> None:
    run = boot("--disk", image, append=run_in_guest("sleep 1000"), timeout_s=1)
    assert run.status == 124
    assert "timeout" in run.messages


@pytest.mark.parametrize(("ending", "status", "words"), [
    ("reboot -f", 0, "rebooted"),
    ("halt -f", 0, "shut down"),
    ("poweroff -f", 0, "powered off"),
    ("echo triple > /sys/kernel/reboot/type; reboot -f", 122, "triple fault"),
])
def test_ways_to_end(image: Path, ending: str, status: int, words: str) -> None:
    run = boot("--disk", image, "-v", append=run_in_guest(ending))
    assert (run.status, words in run.messages) == (status, True), run.console + run.messages


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_halt_that_the_kernel_does_not_announce_ends_the_run(image: Path, cpus: int) -> None:
    run = boot(
        "--disk", image, "-v", "--cpus", str(cpus), append=f"loglevel=0 {run_in_guest('halt -f')}"
    )
    assert "System halted" not in run.console
    assert run.status == 0, run.console + run.messages
    assert "guest shut down: halted with interrupts off" in run.messages


def test_an_idle_guest_is_left_alone(image: Path) -> None:
    """It is looked at twice in this time, from outside once its CPUs do nothing."""
    run = boot("--disk", image, "-v", "--cpus", "2", append=run_in_guest("sleep 15; exit 3"))
    assert run.status == 3, run.console + run.messages
    found = re.search(r"exits: .*other (\d+)", run.messages)
    assert found, run.messages
    assert int(found[1]) < 20, "looking for a halt is not polling"


def test_a_triple_fault_shows_where(image: Path) -> None:
    run = boot(
        "--disk", image, append=run_in_guest("echo triple > /sys/kernel/reboot/type; reboot -f"),
    )
    assert re.search(r"rip 0x[0-9a-f]{16}", run.messages)


def test_an_elf_vmlinux_boots_too() -> None:
    run = boot("--disk", f"{IMAGE},ro", append=run_in_guest("exit 3"), kernel=VMLINUX)
    assert run.status == 3, run.console + run.messages


def test_disks_come_in_order_with_serial_size_and_mode(image: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.img"
    data.write_bytes(bytes(3 << 20))
    script = (
        "cat /sys/block/vda/serial /sys/block/vdb/serial; echo; cat /sys/block/vdb/size"
        " /sys/block/vdb/ro /sys/block/vda/ro; echo x | dd of=/dev/vdb 2>&1; cat /proc/interrupts"
    )
    run = boot(
        "--disk", f"{image},serial=root-disk", "--disk", f"{data},ro,serial=12345678901234567890",
        append=run_in_guest(script),
    )
    assert "root-disk12345678901234567890\n6144\n1\n0\n" in run.console
    assert "virtio0" in run.console
    assert "virtio1" in run.console
    assert data.read_bytes() == bytes(3 << 20), "a read-only disk was written"


def test_data_written_by_the_guest_is_on_the_host_and_the_other_way_about(
    image: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.img"
    content = random.Random(7).randbytes(8 << 20)
    data.write_bytes(content)
    script = (
        "md5sum < /dev/vdb; dd if=/dev/vdb of=/root/copy bs=64k; sync;"
        " dd if=/root/copy of=/dev/vdb bs=4k seek=1 count=2047 conv=fsync; md5sum < /dev/vdb"
    )
    run = boot("--disk", image, "--disk", data, append=run_in_guest(script))
    sums = re.findall(r"^([0-9a-f]{32})  -$", run.console, re.MULTILINE)
    expected = content[:4096] + content[: 2047 * 4096]
    assert sums == [hashlib.md5(c).hexdigest() for c in (content, expected)]
    assert data.read_bytes() == expected
    e2fsck(image)


def test_an_initrd_is_found_and_used() -> None:
    initrd = IMAGE.with_name("initramfs.cpio.gz")
    run = boot("--initrd", initrd, append=run_in_guest("exit 5"))
    assert run.status == 5, run.console + run.messages
    assert run.lines("pyvmm-init: root ")[0].split()[1] in ("rootfs", "tmpfs")


@pytest.mark.parametrize("mmio", ["mapped", "trapped"])
@pytest.mark.parametrize("serve", ["thread", "exit"])
def test_a_disk_costs_the_exits_its_register_page_and_place_cost(mmio: str, serve: str) -> None:
    script = "dd if=/dev/vda of=/dev/null bs=4k count=1000 iflag=direct && exit 4"
    run = boot("--disk", f"{IMAGE},ro", "--mmio", mmio, "--serve", serve, "-v",
               append=f"quiet {run_in_guest(script)}")
    assert run.status == 4, run.console + run.messages
    found = re.search(r"exits: mmio (\d+)", run.messages)
    assert found, run.messages
    least = {"mapped": 0, "trapped": 2000}[mmio] + {"thread": 0, "exit": 1000}[serve]
    # What is more than the 1000 reads' is set-up and what was read to boot.
    assert least <= int(found[1]) < least + 900


def test_a_feature_taken_away_is_gone() -> None:
    show = run_in_guest("grep -m1 ^flags /proc/cpuinfo")
    run = boot("--disk", f"{IMAGE},ro", "--cpu", "host,-sse4_2,-popcnt", append=show)
    flags = run.lines("flags")[0].split()
    assert "hypervisor" in flags
    assert not {"sse4_2", "popcnt"} & set(flags)


def test_memory_above_four_gigabytes_is_ram() -> None:
    show = run_in_guest("grep MemTotal /proc/meminfo; head -c 64m /dev/zero | wc -c")
    run = boot("--disk", f"{IMAGE},ro", "--memory", "5G", append=show)
    total_kib = int(run.lines("MemTotal:")[0].split()[0])
    assert 4.5 * (1 << 20) < total_kib < 5 * (1 << 20)


def test_no_console_byte_is_lost_on_the_way_out(image: Path) -> None:
    run = boot("--disk", image, append=run_in_guest("seq 1 1500"))
    numbers = [line for line in run.console.splitlines() if line.isdigit()]
    assert numbers == [str(n) for n in range(1, 1501)]


def test_no_console_byte_is_lost_on_the_way_in() -> None:
    data = random.Random(3).randbytes(20_000)
    script = f"stty raw -echo; echo ready; head -c {len(data)} | md5sum; stty sane"
    options = ("--disk", f"{IMAGE},ro", "--append", run_in_guest(script), "--timeout", "120")
    with subprocess.Popen(
        command(*options), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    ) as run:
        assert run.stdin is not None
        assert run.stdout is not None
        while run.stdout.readline().strip() != b"ready":
            assert run.poll() is None
        run.stdin.write(data)
        run.stdin.flush()
        assert hashlib.md5(data).hexdigest().encode() in run.stdout.read()
        assert run.wait(patient(60)) == 0


def test_the_console_may_be_a_file_or_nothing(image: Path, tmp_path: Path) -> None:
    log = tmp_path / "boot.log"
    to_file = boot("--disk", image, "--console", log, append=run_in_guest("exit 2"))
    assert (to_file.status, to_file.console) == (2, "")
    assert USER_SPACE in log.read_text()
    to_none = boot("--disk", image, "--console", "none", append="panic=-1 init=/missing")
    assert (to_none.status, to_none.console) == (121, ""), "a panic is seen without a console"
