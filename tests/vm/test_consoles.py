"""Two consoles of Linux's and one terminal: what is shown, once, and what early input becomes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.support.guest import (
    IMAGE,
    KERNEL,
    TIMEOUT_S,
    TOOLS,
    TWICE,
    USER_SPACE,
    Run,
    boot,
    command,
    environment,
    run_in_guest,
)
from tests.support.patience import patient
from tests.support.stock import BACKPORTS, STABLE, boot_stock

pytestmark = pytest.mark.kvm

NO_PCI_WARNING = "PCI: Fatal"
OURS = "ours"
START_LOGINS = (
    "for tty in $(cat /sys/class/tty/console/active; ls /sys/class/tty | grep -x hvc0); do"
    " echo $tty; done | sort -u | while read tty; do echo login on $tty > /dev/$tty; done;"
    " sleep 0.5; tty"
)
"""A login wherever systemd-getty-generator starts one: on each active console that is no virtual
terminal, and on hvc0 if it is there."""


def run(kernel: str, script: str, append: str, *options: str) -> Run:
    if kernel == OURS:
        return boot("--disk", f"{IMAGE},snapshot", *options,
                    append=f"{append} {run_in_guest(script)}")
    return boot_stock(kernel, script, *options, append=append)


# The one that is shown, and gets the input, by what the command line names.
CONSOLES = {
    "": "ttyS0",
    "console=hvc0": "hvc0",
    "console=ttyS0 console=hvc0": "hvc0",
    "console=hvc0 console=ttyS0": "ttyS0",
    "console=hvc0 earlyprintk=ttyS0": "hvc0",
}


@pytest.mark.parametrize(("kernel", "consoles"), [
    *((OURS, consoles) for consoles in CONSOLES),
    *((STABLE, consoles) for consoles in list(CONSOLES)[:4]),
    *((BACKPORTS, consoles) for consoles in list(CONSOLES)[:2]),
])
def test_fault_34_one_login_is_shown_and_no_line_of_the_kernels_comes_twice(
    kernel: str, consoles: str
) -> None:
    """And a stock kernel does not complain that there is no PCI (fault 28)."""
    seen = run(kernel, START_LOGINS, f"loglevel=7 {consoles}")
    assert seen.status == 0, seen.console + seen.messages
    shown = CONSOLES[consoles]
    assert seen.lines("login on ") == [shown], seen.console
    assert seen.lines(f"/dev/{shown}") == [""], seen.console
    lines = re.findall(r"^\[ *\d+\.\d+\] .*", seen.console, re.MULTILINE)
    assert [line for line in lines if lines.count(line) > 1] == []
    # hvc0 alone misses what was said before its driver came.
    assert any("EXT4-fs" in line for line in lines)
    assert any("Linux version" in line for line in lines) or consoles == "console=hvc0"
    assert NO_PCI_WARNING not in seen.console


@pytest.mark.parametrize("options", [
    ("console=hvc0 quiet",), ("console=ttyS0 console=hvc0",), ("",), ("earlyprintk=ttyS0",),
    ("console=hvc0", "--cpus", "2"),
], ids=" ".join)
def test_faults_30_and_33_early_input_arrives_whole_and_in_order(options: tuple[str, ...]) -> None:
    count = 150
    script = "".join(f"echo got $(({number} + 0))\n" for number in range(count)) + "exit 5\n"
    append, *more = options
    done = subprocess.run(
        command("--disk", f"{IMAGE},snapshot", *more, "--timeout", str(TIMEOUT_S),
                "--append", f"{append} pyvmm.shell"),
        input=script.encode(), capture_output=True, check=False, env=environment(),
        timeout=patient(TIMEOUT_S + 60),
    )
    console = done.stdout.decode(errors="replace").replace("\r", "")
    got = [int(number) for number in re.findall(r"^got (\d+)$", console, re.MULTILINE)]
    assert got == list(range(count)), console + done.stderr.decode()
    assert done.returncode == 5


def test_fault_34_an_initramfs_whose_console_is_a_module_can_say_why_it_gives_up() -> None:
    seen = boot_stock(STABLE, "exit 0", append="console=hvc0 root=/dev/vdz rootdelay=1 panic=-1")
    assert seen.status == 121, seen.console + seen.messages
    assert "cannot mount the root: no /dev/vdz after 1 s; there are: vda" in seen.messages


@pytest.mark.parametrize(("kernel", "append"), [
    (KERNEL, ""), (TWICE, ""), (TWICE, "acpi=off"), (STABLE, "acpi=off"), (BACKPORTS, "pci=off"),
], ids=["ours", "twice", "twice without ACPI", "stable without ACPI", "backports without PCI"])
def test_fault_28_no_kernel_complains_that_there_is_no_pci(
    kernel: str | Path, append: str
) -> None:
    """pci=off is the user's wish, and Linux's answer to it."""
    if isinstance(kernel, Path):
        seen = boot("--disk", f"{TOOLS},ro", append=f"{append} {run_in_guest('exit 0')}",
                    kernel=kernel)
    else:
        seen = boot_stock(kernel, "exit 0", append=f"{append} rootdelay=1 panic=-1")
    finds_disks = isinstance(kernel, Path) or append != "acpi=off"
    assert bool(seen.lines(USER_SPACE)) is finds_disks, seen.console + seen.messages
    assert (NO_PCI_WARNING in seen.console) is (append == "pci=off"), seen.console
