"""The UART of a whole machine, with KVM gathering what is sent: any /dev/kvm will do."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.bare import LONG_MODE_ENTRY, assemble
from tests.support.guest import command, environment
from tests.support.kernels import ElfSegment, elf
from tests.support.patience import patient
from tests.support.terminal import Terminal

pytestmark = pytest.mark.bare

SENT = b"abcdefghijklmnop" * 25 + b"!!!"
SHOWN_S = 10.0
"""A busy host's bound, the start included, for what takes PolledUart's 20 ms."""


def test_all_that_is_sent_is_shown_with_an_exit_a_byte(tmp_path: Path) -> None:
    code = assemble("polled_uart", LONG_MODE_ENTRY, tmp_path)
    kernel, console = tmp_path / "guest.elf", tmp_path / "console"
    kernel.write_bytes(elf(ElfSegment(data=code, p_memsz=4096)))
    with subprocess.Popen(
        [sys.executable, "-m", "pyvmm", "run", "-v", "--kernel", str(kernel),
         "--console", str(console), "--timeout", "20"],
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as run:  # fmt: skip
        give_up_s = time.monotonic() + patient(SHOWN_S)
        seen_s = None
        while time.monotonic() < give_up_s and run.poll() is None:
            if console.exists() and console.read_bytes() == SENT:
                seen_s = time.monotonic()
                break
            time.sleep(0.01)
        assert seen_s is not None, "the last bytes did not come while the guest ran"
        run.terminate()
        said = run.communicate()[1]
    assert console.read_bytes() == SENT
    exits = re.search(r"exits: mmio \d+, io (\d+),", said)
    assert exits is not None, said
    assert len(SENT) <= int(exits[1]) < 1.4 * len(SENT), said


@pytest.fixture
def polled_input(tmp_path: Path) -> Path:
    """A guest that polls for a line, and for another, and echoes them."""
    kernel = tmp_path / "polled_input.elf"
    code = assemble("polled_input", LONG_MODE_ENTRY, tmp_path)
    kernel.write_bytes(elf(ElfSegment(data=code, p_memsz=4096)))
    return kernel


LINES = ("a line of input, longer than the FIFO\n", "and another one for the guest\n")


def test_fault_33_input_piped_in_at_once_reaches_a_guest_that_polls(polled_input: Path) -> None:
    done = subprocess.run(
        command("--timeout", "60", kernel=polled_input), input="".join(LINES).encode(),
        capture_output=True, check=False, env=environment(), timeout=patient(90),
    )
    assert (done.stdout.decode(), done.returncode) == (f"?{LINES[0]}!{LINES[1]}", 42), done.stderr


def test_fault_33_what_is_typed_late_reaches_a_guest_that_polls(polled_input: Path) -> None:
    terminal = Terminal("--timeout", "60", kernel=polled_input)
    with contextlib.closing(terminal):
        for prompt, line in zip("?!", LINES, strict=True):
            terminal.wait_for(prompt)
            terminal.hear(0.3)  # KVM gathers no more by now
            for key in line:
                terminal.type(key)
            terminal.wait_for(line.rstrip())
        assert terminal.status() == 42
