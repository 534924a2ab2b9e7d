"""Time to user space, beside QEMU microvm: same host, same kernel, same image, in turn.

    python bench/boot.py [--runs 5]

Prints the medians and their ratio.  Run it where KVM can boot a stock kernel; in the lab only the
ratio means anything.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARK = b"pyvmm-init: user space reached"
DEADLINE_S = 120

QEMU = (
    "qemu-system-x86_64 -M microvm,acpi=off,pcie=off,rtc=off,isa-serial=on -accel kvm -cpu host"
    " -smp 1 -m 256 -nodefaults -no-user-config -display none -serial stdio -no-reboot"
    " -global virtio-mmio.force-legacy=false -device isa-debug-exit,iobase=0xf4,iosize=1"
)


def pyvmm(kernel: Path, image: Path) -> list[str]:
    """Our command line."""
    return [
        sys.executable, "-m", "pyvmm", "run", "--kernel", str(kernel), "--disk", str(image),
        "--timeout", str(DEADLINE_S),
    ]


def qemu(kernel: Path, image: Path) -> list[str]:
    """QEMU's, as fast as it can be made (see docs of its microvm machine)."""
    return [
        *QEMU.split(),
        "-drive", f"id=d,file={image},format=raw,if=none", "-device", "virtio-blk-device,drive=d",
        "-kernel", str(kernel),
        "-append", "console=ttyS0 reboot=k panic=-1 root=/dev/vda rw",
    ]


def seconds_to_user_space(command: list[str]) -> float:
    """From starting the process to its guest's first line of user space."""
    started_s = time.monotonic()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        if process.stdout is None or process.stderr is None:
            raise RuntimeError("no pipes")
        seen = b""
        while MARK not in seen:
            chunk = os.read(process.stdout.fileno(), 4096)
            if not chunk:
                raise SystemExit(f"{command[0]} ended early:\n{process.stderr.read().decode()}")
            seen += chunk
        took_s = time.monotonic() - started_s
        process.stdout.read()
        process.wait(DEADLINE_S)
    return took_s


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="runs of each VMM (default 5)")
    runs = parser.parse_args().runs
    took_s: dict[str, list[float]] = {"pyvmm": [], "QEMU microvm": []}
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "root.img")
        shutil.copyfile(ROOT / "build" / "root.img", image)
        for run in range(runs + 1):
            for name, command in (("pyvmm", pyvmm), ("QEMU microvm", qemu)):
                seconds = seconds_to_user_space(command(ROOT / "build" / "bzImage", image))
                if run:  # the first of each fills the caches
                    took_s[name].append(seconds)
    print("time to user space, s   median     min     max")
    for name, values in took_s.items():
        print(f"{name:22} {statistics.median(values):7.2f} {min(values):7.2f} {max(values):7.2f}")
    ours, theirs = (statistics.median(took_s[name]) for name in ("pyvmm", "QEMU microvm"))
    print(f"ratio, pyvmm to QEMU microvm: {ours / theirs:.2f} ({runs} runs each, in turn)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
