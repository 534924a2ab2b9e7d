"""A guest's disk, recorded while it wrote records, and images of it after a power cut, checked.

The guest runs where its kernel can: here, or in the lab.  The images are checked here.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.support.guest import ROOT, environment
from tests.support.patience import patient
from tests.support.power_cut import Flush, Note, PowerCut, Write

RECORDS = 40
LIMIT_S = 300.0
DISK_BYTES = 16 << 20

Recording = tuple[bytes, list[Write | Flush | Note]]
"""The disk before, and everything done to it."""


def recording(folder: Path, variant: int = 0, records: int = RECORDS) -> Recording:
    """Return what the guest of ``record_guest`` did to its disk; made once in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    disk, out = folder / "disk.img", folder / "log.pickle"
    if not out.exists():
        with disk.open("wb") as file:
            file.truncate(DISK_BYTES)
        subprocess.run(["mke2fs", "-q", "-t", "ext4", disk], check=True)
        new = folder / "new.pickle"
        pyvmm = [sys.executable, "-m", "pyvmm"]
        can_boot = subprocess.run([*pyvmm, "doctor", "--quiet"], env=environment(), check=False)
        host = [] if can_boot.returncode == 0 else [*pyvmm, "lab", "--rw", str(folder), "--"]
        subprocess.run(
            [*host, sys.executable, "-m", "tests.support.record_guest", str(disk),
             str(records), str(new), str(variant)],
            cwd=ROOT, env=environment(), check=True, timeout=patient(LIMIT_S), stdout=sys.stderr,
        )
        new.rename(out)
    initial, log = pickle.loads(out.read_bytes())
    return initial, log


def acknowledged(log: Sequence[Write | Flush | Note]) -> list[str]:
    """Return the records that the guest has acknowledged, as WRITER-NUMBER."""
    return [str(event.value) for event in log if isinstance(event, Note)]


def check_cut(cut: PowerCut, folder: Path) -> None:
    """Replay the journal; then the file system must be clean and every acked record whole.

    AssertionError, or FileNotFoundError for a record that is lost.  ``folder`` is empty; it keeps
    the image and what was found in it.
    """
    image, into = folder / "cut.img", folder / "files"
    image.write_bytes(cut.image)
    into.mkdir()
    subprocess.run(
        ["e2fsck", "-y", "-E", "journal_only", image], capture_output=True, check=False
    )
    clean = subprocess.run(
        ["e2fsck", "-fn", image], capture_output=True, text=True, check=False
    )
    assert clean.returncode == 0, clean.stdout
    subprocess.run(
        ["debugfs", "-R", f"rdump / {into}", image], capture_output=True, check=True
    )
    for name in cut.notes:
        assert (into / f"r{name}").read_text() == f"record {name}\n"
