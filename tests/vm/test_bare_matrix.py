"""A matrix of real machines, with guests of a few instructions: any /dev/kvm will do."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest

from tests.support.dask_cluster import cluster
from tests.support.matrix_program import REAL, ended, start, until, with_small_disk
from tests.support.patience import patient
from tests.support.tiny_guests import (
    REPORT_7,
    SPIN,
    TRIPLE_FAULT,
    prints,
    prints_for_ever,
    write_guest,
)

pytestmark = pytest.mark.bare

PANIC = b"[    0.100000] Kernel panic - not syncing: no root\r\n"
FLOOD = b"".join(b"%05d a line of a flood that does not end\r\n" % number for number in range(20))
GUESTS = {
    "panics": prints(b"[    0.050000] before\r\n" + PANIC) + SPIN,
    "ends": REPORT_7,
    "faults": TRIPLE_FAULT,
    "hangs": SPIN,
}


def write_matrix(folder: Path, guests: dict[str, bytes], boot_timeout_s: float) -> Path:
    """Write kernels that are these guests, and a matrix of them; return its path."""
    for name, code in guests.items():
        write_guest(folder / name, code)
    kernels = "\n".join(f"{name} = '{name}'" for name in guests)
    path = folder / "m.toml"
    path.write_text(f"""
        agent = "image"
        memory = "16M"
        boot-timeout = {boot_timeout_s}
        [kernels]
        {kernels}
        [commands]
        true = ["true"]
    """)
    return path


def verdicts(out: Path) -> dict[str, str]:
    """Return the verdicts in ``matrix.json`` by the names of kernels."""
    runs = json.loads((out / "matrix.json").read_text())["runs"]
    return {run["name"].split("+")[0]: run["verdict"] for run in runs}


def machines() -> set[int]:
    """Return the processes that run a machine of this session's user."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"run" in words and any(word.startswith(b"--control-fd") for word in words):
            found.add(int(path.parent.name))
    return found


def machines_of(folder: Path) -> set[int]:
    """Return the processes that run a machine whose kernel is in ``folder``."""
    return {pid for pid in machines() if os.fsencode(folder) in command_of(pid)}


def command_of(pid: int) -> bytes:
    """Return the command line of a process, nothing once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_each_end_has_its_verdict_and_its_logs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = write_matrix(tmp_path, GUESTS, min(patient(5), 60))
    status, said, error = ended(start(str(path), "--jobs", "2", "--out", str(out), program=REAL))
    assert verdicts(out) == {
        "panics": "panic", "ends": "ended", "faults": "triple-fault", "hangs": "boot-timeout",
    }, said + error
    assert status == 122
    log = (out / "runs" / "panics+16M+1cpu+true" / "console.log").read_bytes()
    assert log == b"[    0.050000] before\r\n" + PANIC
    result = json.loads((out / "runs" / "panics+16M+1cpu+true" / "result.json").read_text())
    assert result["line"] == PANIC.decode().strip()
    assert result["test"]["before"] == ["[    0.050000] before"]
    page = (out / "index.html").read_text()
    assert page.index("run-faults+") < page.index("run-panics+") < page.index("run-hangs+")
    assert machines_of(tmp_path) == set()


def test_an_interrupt_ends_all_machines(tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = write_matrix(tmp_path, {"one": SPIN, "two": SPIN, "three": SPIN}, 300)
    process = start(str(path), "--jobs", "2", "--out", str(out), program=REAL)
    until(lambda: len(machines_of(tmp_path)) == 2)
    process.send_signal(signal.SIGINT)
    status, said, error = ended(process)
    assert status == 130, said + error
    assert sorted(verdicts(out).values()) == ["interrupted", "interrupted", "not-started"]
    assert machines_of(tmp_path) == set()
    assert (out / "index.html").exists()


def test_a_matrix_that_is_killed_leaves_no_machine(tmp_path: Path) -> None:
    path = write_matrix(tmp_path, {"one": SPIN, "two": SPIN}, 300)
    process = start(str(path), "--jobs", "2", "--out", str(tmp_path / "out"), program=REAL)
    until(lambda: len(machines_of(tmp_path)) == 2)
    process.kill()
    ended(process)
    until(lambda: not machines_of(tmp_path))


def test_a_flood_on_the_console_is_all_in_the_log_and_not_in_our_memory(tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = write_matrix(tmp_path, {"floods": prints_for_ever(FLOOD)}, min(patient(4), 40))
    process = start(str(path), "--out", str(out), program=REAL)
    most_kib = 0

    def is_over() -> bool:
        nonlocal most_kib
        try:
            text = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            return True
        if "VmRSS:" in text:
            most_kib = max(most_kib, int(text.split("VmRSS:")[1].split()[0]))
        return process.poll() is not None

    until(is_over)
    assert ended(process)[0] == 124
    log = (out / "runs" / "floods+16M+1cpu+true" / "console.log").read_bytes()
    assert len(log) > 20_000
    assert log == (FLOOD * (len(log) // len(FLOOD) + 1))[: len(log)], "nothing is lost"
    assert most_kib < 200 << 10


def test_a_disk_too_full_for_the_console_is_said(tmp_path: Path) -> None:
    small = tmp_path / "small"
    path = write_matrix(tmp_path, {"floods": prints_for_ever(FLOOD)}, min(patient(5), 40))
    program = with_small_disk(small, REAL)
    status, said, error = ended(start(str(path), "--out", str(small / "out"), program=program))
    assert status == 124, said + error
    assert re.search(r"^pyvmm: .*/console.log: has \d+ of \d+ bytes: the disk is full$", error,
                     re.MULTILINE)
    assert "index.html: cannot be written: No space left on device" in error
    assert "Traceback" not in error


def test_a_cluster_runs_machines_and_a_killed_worker_leaves_none(tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = write_matrix(tmp_path, {"panics": GUESTS["panics"], "hangs": SPIN}, min(patient(10), 60))
    with cluster(tmp_path / "cluster") as found:
        process = start(
            str(path), "--out", str(out), "--executor", f"dask={found.address}", program=REAL
        )
        # The cluster may begin with either: the other one is over before its worker is killed.
        panicked = out / "runs" / "panics+16M+1cpu+true" / "console.log"
        until(lambda: panicked.exists() and panicked.read_bytes().endswith(PANIC))
        until(lambda: [b"hangs" in command_of(pid) for pid in machines_of(tmp_path)] == [True])
        (machine,) = machines_of(tmp_path)
        worker = int(Path(f"/proc/{machine}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(worker, signal.SIGKILL)
        until(lambda: machine not in machines_of(tmp_path))
        status, said, error = ended(process)
    assert verdicts(out) == {"panics": "panic", "hangs": "boot-timeout"}, said + error
    assert status == 121
    assert panicked.read_bytes().endswith(PANIC)
    assert machines_of(tmp_path) == set()
