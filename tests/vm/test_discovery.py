"""Ten virtio devices at once: each is found once, in a stable order, on a line of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.guest import IMAGE, KERNEL, TWICE, Run, boot, run_in_guest, sparse
from tests.support.stock import STABLE, boot_stock

pytestmark = pytest.mark.kvm

NAMES = [f"vd{letter}" for letter in "abcdefgh"]
DEVICES = 10
NUMBERS = [f"virtio{index}" for index in range(DEVICES)]
SERIALS = [f"disk-{name}" for name in NAMES]
ROOT = f"{IMAGE},snapshot,serial={SERIALS[0]}"
CONSOLES = "console=ttyS0 console=hvc0"
SHOW = (
    "echo to $(tty);"
    " for d in $(ls /sys/block | grep ^vd); do echo disk $d $(cat /sys/block/$d/serial); done;"
    " grep virtio /proc/interrupts;"
    " echo random $(dd if=/dev/hwrng bs=32 count=1 2>&1 | wc -c) $(cat /sys/class/misc/hw_random/"
    "rng_current)"
)


@pytest.fixture
def disks(tmp_path: Path) -> list[str]:
    """The options of seven small disks that come behind the root."""
    options = []
    for name, serial in list(zip(NAMES, SERIALS, strict=True))[1:]:
        options += ["--disk", f"{sparse(tmp_path / name, 1)},serial={serial}"]
    return options


def check(run: Run) -> None:
    """Each device was seen once, on an interrupt line of its own, and in its place."""
    seen = run.console + run.messages
    assert run.status == 0, seen
    assert run.lines("disk ") == [
        f"{name} {serial}" for name, serial in zip(NAMES, SERIALS, strict=True)
    ], seen
    lines = re.findall(r"^ *(\d+):.* (virtio\d+)\b", run.console, re.MULTILINE)
    assert sorted(device for _, device in lines) == NUMBERS, seen
    assert len({line for line, _ in lines}) == DEVICES, seen
    assert "virtio_rng" in run.lines("random ")[0], seen
    assert run.lines("to ") == ["/dev/hvc0"], seen


@pytest.mark.parametrize("cpus", [1, 8])
def test_all_of_them_by_acpi(disks: list[str], cpus: int) -> None:
    run = boot("--disk", ROOT, *disks, "--cpus", str(cpus),
               append=f"{CONSOLES} {run_in_guest(SHOW)}", kernel=KERNEL)
    check(run)
    assert "can't request region" not in run.console, "it does not read the command line"


def test_all_of_them_by_debians_kernel(disks: list[str]) -> None:
    check(boot_stock(STABLE, SHOW, *disks, "--cpus", "2", root=ROOT, append=CONSOLES))


def test_a_kernel_that_is_told_twice_sees_each_once(disks: list[str]) -> None:
    run = boot("--disk", ROOT, *disks, "--cpus", "2",
               append=f"{CONSOLES} {run_in_guest(SHOW)}", kernel=TWICE)
    check(run)
    # Why none is seen twice: Linux gives the registers to one.
    assert run.console.count("can't request region for resource") == DEVICES


@pytest.mark.parametrize("way", ["acpi", "cmdline"])
def test_such_a_kernel_may_be_told_once(disks: list[str], way: str) -> None:
    run = boot("--disk", ROOT, *disks, "--discovery", way,
               append=f"{CONSOLES} {run_in_guest(SHOW)}", kernel=TWICE)
    check(run)
    assert "can't request region" not in run.console


def test_a_kernel_with_acpi_switched_off_takes_the_command_line(disks: list[str]) -> None:
    run = boot("--disk", ROOT, *disks,
               append=f"{CONSOLES} acpi=off {run_in_guest(SHOW)}", kernel=TWICE)
    check(run)
