"""Run the same boot test by pyvmm, virtme-ng and plain QEMU; print lines, seconds and statuses.

    python3 compare.py KERNEL_DIR VMLINUZ MODULE [CASE...]

KERNEL_DIR is of ``pyvmm kernel fetch``, VMLINUZ a kernel file with its modules in ../lib/modules,
MODULE its dummy.ko; root.img is in the working directory.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOOLS = ("pyvmm", "virtme-ng", "qemu")
CASES = {
    "passes": "true",
    "exit 7": "exit 7",
    "warning": "echo '<4>WARNING: CPU: 0 PID: 1 at a test' >/dev/kmsg; sleep 1",
    "panic": "echo c >/proc/sysrq-trigger; sleep 1000",
    "reboot": "sync; echo b >/proc/sysrq-trigger; sleep 1000",
    "hang": "sleep 1000",
}


def lines_of(script: Path) -> int:
    """Return how many lines of the script are neither blank nor a comment."""
    lines = (line.strip() for line in script.read_text(encoding="utf-8").splitlines())
    return sum(1 for line in lines if line and not line.startswith("#"))


def main(kernel: str, vmlinuz: str, module: str, *cases: str) -> None:
    """Run each case by each tool, and print a line for each run as soon as it is over."""
    environment = {**os.environ, "KERNEL": kernel, "VMLINUZ": vmlinuz, "MODULE": module}
    for tool in TOOLS:
        print(f"{tool}: {lines_of(HERE / f'{tool}.sh')} lines", flush=True)
    for case in cases or CASES:
        for tool in TOOLS:
            name = f"{tool}-{case.replace(' ', '-')}.log"
            begin_s = time.monotonic()
            with Path(name).open("wb") as log:
                done = subprocess.run(
                    ["sh", str(HERE / f"{tool}.sh"), CASES[case]], check=False, env=environment,
                    stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                )
            took_s = time.monotonic() - begin_s
            print(f"{case:8} {tool:10} status {done.returncode:3} {took_s:6.1f} s", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
