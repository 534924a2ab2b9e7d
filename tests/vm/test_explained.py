"""What ``pyvmm run`` says around a boot: what is missing, why no root, how long it took."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pyvmm.cli import explain
from pyvmm.cli.main import main
from pyvmm.cli.run import COMMAND, config_from
from pyvmm.startup.options import parse_options
from tests.support.disk_heads import file_system
from tests.support.guest import BUILD, IMAGE, KERNEL, TOOLS, TWICE, boot, run_in_guest
from tests.support.kernels import lacking
from tests.support.stock import BACKPORTS, STABLE, stock_kernel

pytestmark = pytest.mark.kvm


def test_an_option_that_is_missing_is_named_before_the_boot(tmp_path: Path) -> None:
    kernel = shutil.copyfile(KERNEL, tmp_path / "bzImage-mine")
    (tmp_path / "config-mine").write_text(lacking("EXT4_FS"))
    run = boot("--disk", f"{IMAGE},snapshot", append=run_in_guest("exit 3"), kernel=kernel)
    assert run.status == 3, run.console + run.messages
    assert run.messages == (
        f"pyvmm: {kernel}: the kernel lacks CONFIG_EXT4_FS (root file system ext4): "
        "a root of ext4 is not mounted\n"
    )


def test_a_root_that_is_not_there_is_a_panic_with_a_remedy() -> None:
    run = boot("--disk", f"{IMAGE},snapshot", append="root=/dev/vdz")
    assert run.status == 121, run.console + run.messages
    assert "kernel panic: VFS: Unable to mount root fs" in run.messages
    assert "root=/dev/vdz is not there: root= and --disk must name it (vda)" in run.messages


@pytest.mark.parametrize(("disk", "options", "lacks"), [
    (file_system("xfs"), (), "CONFIG_XFS_FS (root file system xfs): a root of xfs"),
    (None, ("--discovery", "cmdline"),
     "CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES (virtio-mmio discovery with acpi=off): no disk"),
])
def test_what_the_kernel_lacks_is_read_from_it_after_a_panic_and_said_before_the_next(
    tmp_path: Path, disk: bytes | None, options: tuple[str, ...], lacks: str
) -> None:
    """Our kernel has neither."""
    image = tmp_path / "disk.img"
    image.write_bytes(disk or IMAGE.read_bytes()[:1 << 20])
    for number in range(2):
        run = boot("--disk", f"{image},ro", *options)
        assert run.status == 121, run.console + run.messages
        line = f"pyvmm: {KERNEL}: the kernel lacks {lacks}"
        assert run.messages.count(line) == number + 1, run.messages


def test_a_kernel_that_waits_for_its_root_in_vain() -> None:
    run = boot("--disk", f"{IMAGE},snapshot", append="acpi=off rootwait", timeout_s=10)
    assert run.status == 124, run.console + run.messages
    assert "the kernel lacks CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES" in run.messages


def test_an_ext2_root_is_mounted_by_ext4(tmp_path: Path) -> None:
    """For which nobody is warned: ext4 takes it, without EXT4_USE_FOR_EXT2 too."""
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(1 << 20)
    subprocess.run(["/sbin/mke2fs", "-q", "-F", "-t", "ext2", image], check=True)
    run = boot("--disk", f"{image},ro", append="init=/nothing")
    assert "Requested init /nothing failed" in run.messages, run.console + run.messages


@pytest.mark.parametrize("kernel", ["ours", "twice", STABLE, BACKPORTS])
def test_nothing_is_said_of_kernels_that_boot(
    capsys: pytest.CaptureFixture[str], kernel: str
) -> None:
    """Every way in which the other tests of this directory boot them."""
    disk = ["--disk", f"{TOOLS},snapshot"]
    ways = [[], ["--cpus", "8"], ["--append", "console=hvc0"], ["--mmio", "trapped"]]
    if kernel in (STABLE, BACKPORTS):
        stock = stock_kernel(kernel)
        path = stock.vmlinuz
        disk += ["--initrd", str(stock.initramfs), "--append", "root=/dev/vda"]
    else:
        path = {"ours": KERNEL, "twice": TWICE}[kernel]
        ways += [["--initrd", str(BUILD / "initramfs.cpio.gz")]]
    ways += [["--discovery", "acpi", "--cpus", "4"]]
    if kernel == "twice":
        ways += [["--discovery", "cmdline", "--cpus", "4"], ["--append", "acpi=off"]]
    assert main(["kernel", "inspect", str(path)]) == 0
    assert "missing  " in capsys.readouterr().out
    for way in ways:
        args = parse_options(COMMAND, ["--kernel", str(path), *disk, *way])
        assert explain.before(config_from(args)) == [], way


def test_a_kernel_that_prints_nothing_is_told_which_console_to_use() -> None:
    run = boot(
        "--disk", f"{IMAGE},snapshot",
        "--cmdline", "console=tty1 reboot=k panic=-1 root=/dev/vda init=/missing",
    )
    assert run.console == ""
    assert run.status == 121, run.messages
    assert "the kernel printed nothing: its consoles are console=tty1" in run.messages
    assert "console=ttyS0 is the serial port" in run.messages


def test_timing_says_how_long_each_stage_took() -> None:
    run = boot("--disk", f"{IMAGE},snapshot", "--timing",
               append=run_in_guest("pyvmm-mark 200; exit 4"))
    assert run.status == 4, run.console + run.messages
    stages = re.findall(r"^pyvmm: (\S.*?) +(?:at )?(\d+\.\d{3}) s", run.messages, re.MULTILINE)
    assert [name for name, _ in stages] == [
        "start-up", "kernel", "init", "user space", "shutdown", "mark 200", "total"
    ]
    times_s = {name: float(took_s) for name, took_s in stages}
    parts_s = sum(times_s[name] for name, _ in stages[:5])
    assert parts_s == pytest.approx(times_s["total"], abs=0.01)
    assert times_s["kernel"] > 0


def test_fault_36_a_broken_kernel_is_not_green(tmp_path: Path) -> None:
    """4 KiB in the middle of what the kernel unpacks itself from are not what they were."""
    kernel = tmp_path / "bzImage"
    image = bytearray(KERNEL.read_bytes())
    middle = len(image) // 2
    image[middle : middle + 4096] = b"\xff" * 4096
    kernel.write_bytes(image)
    run = boot("--disk", f"{IMAGE},snapshot", append="earlyprintk=ttyS0", kernel=kernel)
    assert " -- System halted" in run.console
    assert run.status == 121, run.messages
    assert "pyvmm: the boot gave up early: Decoding failed\n" in run.messages
    assert f"pyvmm: {kernel}: the code in front of the kernel gave up" in run.messages


@pytest.mark.parametrize("end", ["reboot -f", "halt -f", "poweroff -f"])
@pytest.mark.parametrize("console", ["", "loglevel=0", "console=tty1"])
def test_fault_36_a_program_may_end_the_guest_as_it_likes(end: str, console: str) -> None:
    """``boot`` says "quiet", which hides that an init was started.  Linux's last words are
    emergencies, shown all the same; without them the context of the vCPU tells of a program."""
    run = boot(
        "--disk", f"{IMAGE},snapshot",
        "--cmdline", f"console=ttyS0 reboot=k panic=-1 root=/dev/vda {console}",
        append=run_in_guest(end),
    )
    assert run.status == 0, run.console + run.messages


def test_fault_36_a_kernel_that_dies_without_a_word_before_an_init_has_not_succeeded() -> None:
    """Its panic is shown nowhere, and then it reboots."""
    run = boot(
        "--disk", f"{IMAGE},snapshot", "--cmdline",
        "console=tty1 reboot=k panic=-1 root=/dev/vdz initcall_blacklist=pvpanic_mmio_init",
    )
    assert run.console == ""
    assert run.status == 121, run.messages
