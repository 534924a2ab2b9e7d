"""The kernels people have, and ours: from a disk to user space with several vCPUs, to any end.

A boot of Debian's takes a dozen seconds in the lab, so each one shows all it can.
"""

from __future__ import annotations

import contextlib
import re

import pytest

from tests.support.guest import IMAGE, TOOLS, USER_SPACE, Run, boot, run_in_guest
from tests.support.stock import BACKPORTS, STABLE, boot_stock, stock_kernel
from tests.support.terminal import Terminal

pytestmark = pytest.mark.kvm

CRASH = "echo c > /proc/sysrq-trigger"
# What is printed before an ending gets a second to leave the UART: a panic stops the CPU that sends
# it, and writes its own lines between the bytes.
SHOW_CPUS = "echo cpus $(nproc) of $(grep -c ^processor /proc/cpuinfo)"
ENDS = {
    "poweroff -f": (0, "guest powered off"),
    "reboot -f": (0, "guest rebooted"),
    "halt -f": (0, "guest shut down: halted with interrupts off"),
    CRASH: (121, "kernel panic: sysrq triggered crash"),
}


def check(run: Run, cpus: int, ending: str, end: tuple[int, str]) -> None:
    """User space was reached from the disk on ``cpus`` vCPUs, and the run ended as it should."""
    seen = run.console + run.messages
    assert run.lines(USER_SPACE), seen
    assert run.lines("pyvmm-init: root ")[0].split()[:2] == ["/dev/vda", "ext4"], seen
    assert run.lines("cpus ") == [f"{cpus} of {cpus}"], seen
    status, words = end
    assert (run.status, words in run.messages) == (status, True), f"{ending}: {seen}"


@pytest.mark.parametrize(("name", "cpus", "ending"), [
    (STABLE, 1, CRASH), (STABLE, 2, "halt -f"), (STABLE, 4, "poweroff -f"),
    (STABLE, 4, "reboot -f"),
    (BACKPORTS, 1, "halt -f"), (BACKPORTS, 2, "reboot -f"), (BACKPORTS, 4, CRASH),
    (BACKPORTS, 4, "poweroff -f"),
])
def test_debians_kernel(name: str, cpus: int, ending: str) -> None:
    script = f"{SHOW_CPUS}; sleep 1; {ending}"
    run = boot_stock(name, script, "--cpus", str(cpus), append="panic=-1")
    check(run, cpus, ending, ENDS[ending])
    assert run.lines(USER_SPACE) == [f" (Linux {stock_kernel(name).release})"]
    assert "bzImage, boot protocol 2.15, Linux 6." in run.messages


@pytest.mark.parametrize(("cpus", "ending"), [
    (1, "poweroff -f"), (2, CRASH), (4, "halt -f"), (4, "reboot -f"),
])
def test_our_kernel(cpus: int, ending: str) -> None:
    run = boot("--disk", f"{IMAGE},snapshot", "--cpus", str(cpus), "-v",
               append=run_in_guest(f"{SHOW_CPUS}; sleep 1; {ending}"))
    check(run, cpus, ending, ENDS[ending])


def test_debians_vmlinux_is_entered_by_pvh_and_finds_acpi() -> None:
    kernel = stock_kernel(STABLE)
    script = "ls -d /sys/firmware/acpi/tables/DSDT; poweroff -f"
    run = boot(
        "--initrd", kernel.initramfs, "--disk", f"{IMAGE},snapshot", "-v", kernel=kernel.vmlinux,
        append=f"root=/dev/vda {run_in_guest(script)}",
    )
    assert run.lines("/sys/firmware/acpi/tables/DSDT") == [""], run.console + run.messages
    assert "32-bit PVH entry" in run.messages
    assert "guest powered off" in run.messages


def test_the_clock_tells_the_hosts_time_and_may_be_absent() -> None:
    script = (
        "cd /sys/class/rtc; for clock in rtc0; do [ ! -e $clock ] ||"
        " echo clock $(($(cat $clock/since_epoch) - $(date +%s))); done; echo looked"
    )
    run = boot_stock(STABLE, script)
    assert run.status == 0, run.console + run.messages
    assert abs(int(run.lines("clock ")[0])) <= 2
    run = boot_stock(STABLE, script, "--rtc", "none")
    assert (run.lines("clock "), run.lines("looked")) == ([], [""]), run.console + run.messages


def test_a_pause_is_no_lock_up_to_the_guests_watchdog() -> None:
    kernel = stock_kernel(STABLE)
    script = (
        "echo 2 > /proc/sys/kernel/watchdog_thresh; (while :; do :; done)& sleep 3; echo rea''dy;"
        " sleep 12; echo locked up $(dmesg | grep -c 'soft lock[u]p') times; exit 0"
    )
    options = ("--initrd", str(kernel.initramfs), "--disk", f"{TOOLS},snapshot", "--append",
               f"root=/dev/vda quiet {run_in_guest(script)}")
    with contextlib.closing(Terminal(*options, kernel=kernel.vmlinuz)) as terminal:
        terminal.wait_for("ready")
        terminal.type("\x01p")
        terminal.wait_for("paused")
        terminal.hear(8.0)  # the watchdog barks after twice its threshold
        terminal.type("\x01p")
        terminal.wait_for("locked up 0 times")
        assert terminal.status() == 0


def test_without_acpi_debians_kernel_finds_no_disk_and_is_told_why() -> None:
    run = boot_stock(STABLE, "exit 0", append="acpi=off rootdelay=1 panic=-1")
    assert run.status == 121, run.console + run.messages
    assert "cannot mount the root: no /dev/vda" in run.messages
    words = ("CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES \\(virtio-mmio discovery with acpi=off\\): "
             "no disk is found")
    assert len(re.findall(words, run.messages)) == 2, "before the boot and after it"
