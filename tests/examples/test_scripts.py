"""The examples for ``import pyvmm`` do what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.faulty_disk import Faults
from pyvmm.api.hooked_disk import DiskRequest
from tests.support.kernels import ElfSegment, elf
from tests.support.patience import patient

ROOT = Path(__file__).resolve().parents[2]
READ_AND_REPORT = bytes.fromhex("e480 e480 b005 e6f4 f4")  # in, in; mov $5,%al; out %al,$0xf4; hlt


def run(name: str, *arguments: str, limit_s: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"examples.{name}", *arguments], cwd=ROOT, capture_output=True,
        text=True, stdin=subprocess.DEVNULL, timeout=patient(limit_s), check=False,
    )


@pytest.mark.bare
def test_a_bare_guest_greets() -> None:
    done = run("bare_hello")
    assert (done.stdout, done.returncode, done.stderr) == (
        "Hello, world: guest shut down: halted after 12 port writes\n", 0, ""
    )


@pytest.mark.bare
def test_the_ports_of_a_guest_of_five_instructions_are_traced(tmp_path: Path) -> None:
    kernel = tmp_path / "guest.elf"
    kernel.write_bytes(elf(ElfSegment(data=READ_AND_REPORT, p_memsz=4096)))
    done = run("trace_ports", str(kernel))
    assert (done.stdout, done.returncode, done.stderr) == (
        "port 0x0080: 2 reads\nport 0x00f4: 0 reads, 1 writes, the last 0x5\n"
        "guest reported a status 5\n", 5, ""
    )


@pytest.mark.kvm
def test_the_ports_of_a_boot_are_traced() -> None:
    done = run("trace_ports", limit_s=240)  # there is no root: the kernel panics, and reboots
    assert done.stdout.splitlines()[-1].startswith("kernel panic"), done.stdout + done.stderr
    ports = dict(re.findall(r"^port (0x\w+): (.*)$", done.stdout, re.MULTILINE))
    assert {"0x03f8", "0x03fd"} <= ports.keys()
    sent = re.search(r"(\d+) writes", ports["0x03f8"])
    assert sent is not None
    assert int(sent[1]) > 1000, "every byte of the console is an exit while it is watched"


def test_only_the_third_write_is_failed() -> None:
    ask = Faults()
    write = DiskRequest(operation="write", length=4096, data=bytes(4096))
    for _ in range(2):
        ask(DiskRequest(operation="read", length=4096))
        ask(write)
    with pytest.raises(OSError, match="the third write fails"):
        ask(write)
    ask(write)


@pytest.mark.kvm
def test_a_guest_goes_back_to_before_its_panic() -> None:
    done = run("time_travel", limit_s=600)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    taken = re.fullmatch(r"(\d+) checkpoints; then: kernel panic: .*sysrq.*", lines[0])
    assert taken is not None, lines
    assert int(taken[1]) > 5
    assert re.fullmatch(r"back at checkpoint \d+, paused at rip 0x\w+", lines[1])
    assert lines[2:] == [
        "the guest has panicked: False",
        "back at the first checkpoint, number 1, and on: it boots once more",
        "the note was never written", "guest powered off",
    ]


@pytest.mark.kvm
def test_the_third_write_to_a_disk_fails() -> None:
    done = run("faulty_disk", limit_s=240)
    assert done.stdout == (
        "guest reported a status 1; blocks that arrived: [0, 1, 3]\n"
    ), done.stdout + done.stderr
    assert done.returncode == 0
