"""A matrix of Linux guests: each end provoked once, two at a time; its page; the example."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.guest import BUILD, IMAGE, KERNEL
from tests.support.patience import patient

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "matrix" / "boot.toml"
MATRIX = f"""
memory = "128M"
append = "quiet"
boot-timeout = 300
[kernels]
k = "{KERNEL}"
[disks]
root = "{IMAGE}"
[commands]
fails = ["sh", "-c", "echo out; echo err >&2; exit 3"]
panics = ["sh", "-c", "echo c >/proc/sysrq-trigger; sleep 60"]
ends = ["sh", "-c", "poweroff -f; sleep 60"]
[commands.warns]
run = ["sh", "-c", "echo '<3>WARNING: CPU: 0 PID: 1 at x.c:1 f+0x1/0x2' >/dev/kmsg; sleep 60"]
[commands.slow]
run = ["sleep", "60"]
timeout = 1
"""


def run(path: Path, out: Path, *words: str) -> tuple[int, str, dict[str, dict[str, object]]]:
    """Run a matrix, two at a time; return status, output, and each run by its command's name."""
    done = subprocess.run(
        [sys.executable, "-m", "pyvmm", "matrix", str(path), "--out", str(out), "--jobs", "2",
         *words],
        cwd=ROOT, text=True, capture_output=True, check=False, timeout=patient(600),
        stdin=subprocess.DEVNULL,
    )
    runs = json.loads((out / "matrix.json").read_text())["runs"]
    return done.returncode, done.stdout + done.stderr, {
        one["name"].split("+")[-1]: one for one in runs
    }


def test_each_end_has_its_verdict(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text(MATRIX)
    out = tmp_path / "out"
    status, said, runs = run(path, out)
    assert {name: one["verdict"] for name, one in runs.items()} == {
        "fails": "failed", "panics": "panic", "ends": "ended", "warns": "warning",
        "slow": "command-timeout",
    }, said
    assert {name: one["exit_status"] for name, one in runs.items()} == {
        "fails": 3, "panics": 121, "ends": 120, "warns": 121, "slow": 124,
    }
    assert status == 121
    folder = out / "runs" / "k+root+128M+1cpu+fails"
    assert folder.joinpath("stdout.log").read_text() == "out\n"
    assert folder.joinpath("stderr.log").read_text() == "err\n"
    assert "sysrq triggered crash" in str(runs["panics"]["line"])
    names = [phase["name"] for phase in runs["fails"]["phases"]]  # type: ignore[attr-defined]
    assert names == ["start", "kernel", "user space", "agent", "command"] or names == [
        "start", "kernel", "agent", "command"
    ]
    page = (out / "index.html").read_text()
    assert page.count('class="card"') == 5
    assert page.index("run-k+root+128M+1cpu+panics") < page.index("run-k+root+128M+1cpu+fails")
    assert "sysrq triggered crash" in page


def test_the_example_passes(tmp_path: Path) -> None:
    assert (BUILD / "root.img").exists()
    out = tmp_path / "out"
    status, said, runs = run(EXAMPLE, out, "--only", "nosmap+*+log")
    assert status == 0, said
    assert set(runs) == {"log"}
    folder = out / "runs" / "nosmap+root+128M+1cpu+log" / "files"
    assert "Linux version" in folder.joinpath("kernel.log").read_text()
    assert folder.joinpath("boot.toml").read_bytes() == EXAMPLE.read_bytes()
