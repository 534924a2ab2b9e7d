"""Modules whose code is in memory: they can be imported by a process that opens no file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("pyvmm.snapshot.capture", "pyvmm.kvm.state")
RUN = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import zlib, array
from pyvmm.startup.bundle import Bundle, default_path
from pyvmm.startup.late import LateModules
events, notes = [], {}

def hear(event, arguments):
    if notes.get("is_closed") and event in ("open", "os.listdir", "os.scandir"):
        events.append(str(arguments[0]))

sys.addaudithook(hear)
with Bundle(default_path("late")) as bundle:
    import pyvmm.machine
    late = LateModules(bundle, json.loads(sys.argv[2]))
    notes["bundle is left"] = bundle not in sys.meta_path and not bundle.entries
    notes["imported at once"] = json.loads(sys.argv[2])[0] in sys.modules
    notes["descriptors"] = len(os.listdir("/proc/self/fd"))
    missing = bundle.left_out()
    notes["is_closed"] = True
    real, os.stat = os.stat, None  # the finder must not look at a source either
    for name in json.loads(sys.argv[2]):
        __import__(name)
    os.stat = real
    notes["is_closed"] = False
from pyvmm.startup.bundle_writing import update
update(bundle, missing)
notes["events"] = events
notes["file"] = sys.modules[json.loads(sys.argv[2])[0]].__file__
print(json.dumps(notes))
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the package without compiled code."""
    shutil.copytree(
        ROOT / "pyvmm", tmp_path / "tree" / "pyvmm", ignore=shutil.ignore_patterns("__pycache__")
    )
    return tmp_path / "tree"


def run(tree: Path, *names: str) -> dict[str, object]:
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
    }
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", RUN, str(tree), json.dumps(names or NAMES)],
        capture_output=True, text=True, check=False, env=environment,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    assert found["bundle is left"]
    assert found["events"] == []
    return found


def test_the_first_start_imports_at_once_and_later_ones_when_it_is_asked_for(tree: Path) -> None:
    first = run(tree)
    assert first["imported at once"]
    later = run(tree)
    assert not later["imported at once"]
    assert later["file"] == first["file"] == str(tree / "pyvmm" / "snapshot" / "capture.py")
    assert later["descriptors"] == first["descriptors"], "no file stays mapped"


def test_a_source_that_was_changed_is_imported_at_once(tree: Path) -> None:
    run(tree)
    source = tree / "pyvmm" / "ram" / "runs.py"  # capture imports it, by way of others
    source.write_text(source.read_text() + "\n")
    assert run(tree)["imported at once"]


def test_so_is_a_module_that_the_bundle_lacks(tree: Path) -> None:
    run(tree, "pyvmm.kvm.state")
    assert run(tree, *NAMES)["imported at once"]
