"""``Machine(config, jail="threads")``: each thread of the run has the filter of its kind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import pyvmm
from pyvmm.errors import ConfigError, HostError
from pyvmm.jail import seccomp
from tests.support.patience import patient
from tests.support.tiny_guests import REPORT_7, SPIN, prints, write_guest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, os, pathlib, sys, time
import pyvmm
kernel, disk, end = sys.argv[1:]
config = pyvmm.MachineConfig(kernel=kernel, disks=[disk], timeout_s=float(end))
with pyvmm.Machine(config, jail="threads") as machine:
    machine.start()
    machine.console.expect("runs", timeout_s=float(end))
    found = {}
    for thread in pathlib.Path("/proc/self/task").iterdir():
        lines = (thread / "status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        name = "main" if int(thread.name) == os.getpid() else thread.name
        found[name] = fields["Seccomp"].strip()
    machine.stop()
os.open(kernel, os.O_RDONLY)  # the script's own thread is as free as ever
print(json.dumps(found))
"""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.mark.bare
def test_all_threads_of_the_run_are_filtered_and_the_scripts_own_is_not(
    tmp_path: Path, disk: Path
) -> None:
    kernel = write_guest(tmp_path / "guest", prints(b"runs\n"), SPIN)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(kernel), str(disk), str(patient(60))],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=patient(120),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("main") == "0"
    assert list(found.values()) == ["2"] * 5  # a vCPU, the house, console, entropy, disk


@pytest.mark.bare
def test_the_outcome_is_the_same(tmp_path: Path, disk: Path) -> None:
    kernel = write_guest(tmp_path / "guest", prints(b"hi\n"), REPORT_7)
    script = (
        "import sys, pyvmm\n"
        "config = pyvmm.MachineConfig(kernel=sys.argv[1], disks=[sys.argv[2]])\n"
        "with pyvmm.Machine(config, jail='threads') as machine:\n"
        "    outcome = machine.run()\n"
        "    print(outcome.exit_status, machine.console.text)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(kernel), str(disk)],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=patient(60),
    )
    assert (done.stdout, done.returncode) == ("7 hi\n\n", 0), done.stderr


@pytest.mark.parametrize("jail", ["on", "off", "strict", True])
def test_a_machine_in_this_process_has_no_other_jail(tmp_path: Path, jail: str) -> None:
    kernel = write_guest(tmp_path / "guest", REPORT_7)
    with pytest.raises(ConfigError, match=r"is 'threads' or None .* pyvmm\.launch"):
        pyvmm.Machine(pyvmm.MachineConfig(kernel=kernel), jail=jail)


def test_a_host_without_filters_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = write_guest(tmp_path / "guest", REPORT_7)
    monkeypatch.setattr(seccomp, "why_not", lambda: "no such thing")
    with pytest.raises(HostError, match="jail='threads': no such thing"):
        pyvmm.Machine(pyvmm.MachineConfig(kernel=kernel), jail="threads")
