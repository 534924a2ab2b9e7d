"""examples/ci-boot-test passes as it stands, and in a copy outside of the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.cli.parse import parse_disk
from pyvmm.matrix.expand import runs_of
from pyvmm.matrix.plan import read_plan
from tests.support.guest import IMAGE, KERNEL
from tests.support.patience import patient

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "ci-boot-test"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a copy of the example, with our kernel and image where it has them."""
    copy = tmp_path / "project"
    shutil.copytree(EXAMPLE, copy, ignore=shutil.ignore_patterns("kernel", "root.img", "logs"))
    (copy / "kernel").mkdir()
    shutil.copy(KERNEL, copy / "kernel" / "bzImage")
    shutil.copy(IMAGE, copy / "root.img")
    return copy


@pytest.mark.kvm
@pytest.mark.timeout(900)
def test_the_tests_pass(project: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--pyvmm-lab=never", "-p", "no:cacheprovider"],
        cwd=project, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
        timeout=patient(400),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout
    logs = sorted(path.name for path in (project / "logs").rglob("*.log"))
    assert len(logs) == 3, logs


def test_the_matrix_is_one(project: Path) -> None:
    runs = runs_of(read_plan(str(project / "boot.toml"), parse_disk))
    assert len(runs) == 8
    assert {run.guest.kernel for run in runs} == {str(project / "kernel" / "bzImage")}


def test_the_page_has_every_file() -> None:
    text = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLE.rglob("*"):
        if path.is_file() and path.name not in ("README.md", ".gitignore"):
            name = path.relative_to(EXAMPLE)
            assert f"`{name}`" in text or f"`{name.parts[0]}/`" in text, name
