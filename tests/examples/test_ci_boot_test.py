"""examples/ci-boot-test passes as it stands, and in a copy outside of the checkout."""

from __future__ import annotations

import re
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
from tests.support.stock import STABLE, stock_kernel

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "ci-boot-test"
PAGE = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")


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


@pytest.mark.kvm
@pytest.mark.timeout(900)
def test_debian_with_systemd_as_the_page_has_it(project: Path) -> None:
    (snippet,) = re.findall(r"^(@pytest.mark.pyvmm\(disk=.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    test = project / "tests" / "test_systemd.py"
    test.write_text(f"import pytest\n\n\n{snippet}")
    (project / "debian.img").symlink_to(IMAGE.parent / "debian.img")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--pyvmm-lab=never", "-p", "no:cacheprovider",
         f"--pyvmm-kernel={stock_kernel(STABLE).vmlinuz}", str(test)],
        cwd=project, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
        timeout=patient(400),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_the_page_shows_the_test_of_a_file_system() -> None:
    test = (EXAMPLE / "tests" / "test_file_system.py").read_text(encoding="utf-8")
    shown_all = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    shown = next(text for text in shown_all if "FaultyDisk" in text)
    assert shown in test
    assert len(shown.splitlines()) == 8


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
