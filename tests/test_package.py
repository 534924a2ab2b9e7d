"""The package as pip builds it: all that is needed, nothing in build/, nothing deprecated."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.guest import environment

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_fault_39_a_wheel_is_built_without_complaint_and_leaves_build_alone(
    tmp_path: Path
) -> None:
    source, out = tmp_path / "pyvmm", tmp_path / "out"
    source.mkdir()
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "pyvmm", source / "pyvmm", ignore=shutil.ignore_patterns("__pycache__"))
    (source / "build").mkdir()
    (source / "build" / "bzImage").write_text("a kernel")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--disable-pip-version-check",
         "-w", out, source],
        text=True, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**environment(), "PYTHONWARNINGS": "default"},
    )
    assert done.returncode == 0, done.stdout
    assert "deprecat" not in done.stdout.lower(), done.stdout
    assert os.listdir(source / "build") == ["bzImage"]
    (wheel,) = out.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    assert "\nLicense-Expression: Apache-2.0 AND MIT\n" in text
    files = {
        str(path.relative_to(ROOT)) for path in (ROOT / "pyvmm").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files <= names
    assert "pyvmm/agent/pyvmm-agent" in files
    assert any(name.endswith(".dist-info/licenses/pyvmm/agent/LICENSE.musl") for name in names)
