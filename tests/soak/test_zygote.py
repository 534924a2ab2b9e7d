"""The process that forks VMs which go on from one snapshot, for the soak's kills."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from soak.processes import ROOT, killed_at_last, pyvmm
from soak.zygote import DISK
from tests.support.patience import patient
from tests.support.tiny_guests import SPIN, prints, write_guest
from tests.support.warm_runs import WARM

pytestmark = pytest.mark.bare

LIMIT_S = 60.0


@pytest.fixture
def zygote(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One of a guest with two disks, that will say it is up."""
    disks = [tmp_path / f"disk{number}" for number in range(DISK + 1)]
    for disk in disks:
        disk.write_bytes(bytes(1 << 20))
    kernel = write_guest(tmp_path / "guest.elf", WARM, prints(b"up\n"), SPIN)
    saved = tmp_path / "warm"
    subprocess.run(
        pyvmm("run", "--kernel", kernel, "--memory", "16M", "--console", "none",
              "--disk", f"{disks[0]},ro", "--disk", f"{disks[DISK]},snapshot",
              "--snapshot", saved, "--snapshot-exit"),
        check=True, stdin=subprocess.DEVNULL,
    )
    with killed_at_last(subprocess.Popen(
        [sys.executable, "-m", "soak.zygote", str(saved)], cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )) as process:
        yield process


def forked(zygote: subprocess.Popen[bytes], console: Path, image: Path, overlay: str) -> int:
    """The process of a VM."""
    assert zygote.stdin is not None
    assert zygote.stdout is not None
    zygote.stdin.write(f"{json.dumps([str(console), str(image), overlay])}\n".encode())
    zygote.stdin.flush()
    return int(zygote.stdout.readline())


def test_each_vm_has_a_console_and_a_disk_of_its_own(
    zygote: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    consoles = [tmp_path / "console0", tmp_path / "console1"]
    pids: list[int] = []
    try:
        for console, overlay in zip(consoles, ("", str(tmp_path / "overlay")), strict=True):
            image = tmp_path / f"image{len(pids)}"
            image.write_bytes(bytes(1 << 20))
            pids.append(forked(zygote, console, image, overlay))
        until_s = time.monotonic() + patient(LIMIT_S)
        while [path for path in consoles if not path.exists() or path.read_bytes() != b"up\n"]:
            assert time.monotonic() < until_s
            time.sleep(0.01)
        assert (tmp_path / "overlay").exists()
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_a_vm_that_cannot_be_made_says_why(
    zygote: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    pid = forked(zygote, tmp_path / "console", tmp_path / "none.img", "")
    until_s = time.monotonic() + patient(LIMIT_S)
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < until_s
        time.sleep(0.01)
    _, said = zygote.communicate(timeout=patient(LIMIT_S))
    assert b"none.img" in said
