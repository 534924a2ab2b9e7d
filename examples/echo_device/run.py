"""Run a guest that says "hello" to an EchoDevice and prints the answer: ``HELLO``.

    python -m examples.echo_device.run

Needs a /dev/kvm of any kind, and gcc for the guest (guest/bare/ask_device.S).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from examples.echo_device.device import EchoDevice
from pyvmm.config import RunConfig
from pyvmm.machine import build
from pyvmm.report import Reporter

GUEST = Path(__file__).resolve().parents[2] / "guest" / "bare" / "ask_device.S"


def main() -> int:
    """Return 0 if the guest was answered."""
    with tempfile.TemporaryDirectory() as folder:
        kernel = Path(folder) / "guest.elf"
        subprocess.run(
            ["gcc", "-nostdlib", "-static", "-Wl,--nmagic,-Ttext=0x100000,--build-id=none",
             "-o", str(kernel), str(GUEST)],
            check=True,
        )  # fmt: skip
        config = RunConfig(kernel=kernel, timeout_s=30.0)
        report = Reporter(sys.stderr)
        with build(config, report=report, devices={"echo": EchoDevice()}) as machine:
            outcome = machine.run()
            names = [slot.name for slot in machine.board.slots]
    print(f"\n{outcome}; the guest was told of {outcome.value} devices: {', '.join(names)}")
    return 0 if outcome.value == len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
