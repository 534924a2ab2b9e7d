"""Debian as people have it: systemd from the first process to ``poweroff``, udev and its modules.

A boot takes a minute in the lab, several on a busy machine.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.cpu_needs import contradictions
from tests.support.guest import BUILD, command, environment
from tests.support.patience import patient
from tests.support.stock import STABLE, stock_kernel

IMAGE = BUILD / "debian.img"
DEADLINE_S = 900
SAID = "-said-"
"""The shell puts this together from two parts, so that its echo is not its output."""

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(DEADLINE_S + 300)]


class Machine:
    """Debian on a pipe: everything that it writes, and a person who types."""

    def __init__(self, log: Path) -> None:
        kernel = stock_kernel(STABLE)
        self.seen = ""
        self._log = log.open("wb")
        self._end_s = time.monotonic() + patient(DEADLINE_S)
        self.process = subprocess.Popen(
            command(
                "--initrd", kernel.initramfs, "--disk", f"{IMAGE},snapshot", "--memory", "512M",
                "--timeout", str(DEADLINE_S), "--append", "root=/dev/vda rw quiet",
                kernel=kernel.vmlinuz,
            ),
            stdin=subprocess.PIPE, stdout=self._log, stderr=subprocess.STDOUT, env=environment(),
        )  # fmt: skip

    def wait_for(self, text: str) -> str:
        """Return what it wrote up to ``text``, behind what was waited for before."""
        path = Path(self._log.name)
        while True:
            ended = self.process.poll() is not None
            written = path.read_text("utf-8", "replace").replace("\r", "")
            new = written[len(self.seen):]
            if text in new:
                found = new.partition(text)[0]
                self.seen += found + text
                return found
            assert not ended, f"it ended without {text!r}: {new}"
            assert time.monotonic() < self._end_s, f"no {text!r} after {DEADLINE_S} s: {new}"
            time.sleep(0.2)

    def type(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def run(self, line: str) -> str:
        """The output of a line of shell."""
        self.type(f"echo {SAID[:3]}''{SAID[3:]}; {line}; echo {SAID[:3]}''{SAID[3:]}\n")
        self.wait_for(SAID + "\n")
        return self.wait_for(SAID)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self._log.close()


def test_fault_29_debian_with_systemd_boots_without_an_oops_and_powers_off(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "console")
    try:
        # The one that hears: a getty drops what was typed before it began.
        machine.wait_for(" ttyS0\n")
        machine.wait_for("pyvmm login: ")
        machine.type("root\n")
        machine.wait_for("# ")
        assert machine.run("udevadm settle --timeout=600; echo settled $?") == "settled 0\n"
        modules = machine.run("cut -d' ' -f1 /proc/modules").split()
        # udev has loaded what the CPU is said to have.
        assert {"virtio_blk", "aesni_intel"} <= set(modules)
        kernel = machine.run("dmesg | grep -E 'invalid opcode|Oops|BUG|Call Trace|alg:.*failed'")
        assert kernel == ""
        cpu = machine.run("grep -m1 ^flags /proc/cpuinfo").partition(": ")[2].split()
        assert contradictions(cpu) == []
        assert machine.run("systemctl --failed --no-legend --plain --no-pager") == ""
        state = machine.run("systemctl is-system-running --wait; systemctl list-jobs --no-pager")
        assert state.startswith("running\n"), state
        machine.type("poweroff\n")
        assert machine.process.wait(patient(DEADLINE_S)) == 0
        console = Path(tmp_path / "console").read_text("utf-8", "replace")
        # Not what was typed: the terminal shows that, too.
        kernel_lines = [line for line in console.splitlines() if re.match(r"\[ *\d+\.\d+\]", line)]
        assert not re.search("invalid opcode|Oops|kernel BUG", "\n".join(kernel_lines))
        # One terminal, one login on it (fault 34).
        assert console.count("pyvmm login: ") == 1
    finally:
        machine.close()
