"""The package as pip builds it: all that is needed, nothing in build/, nothing deprecated.

And what its commands do in an empty environment, far from a checkout.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pyvmm.linux.host import find_tool
from tests.linux.build.test_cached import MAKEFILE
from tests.support.guest import environment

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``pyvmm`` of a wheel in an empty virtual environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "pyvmm", source / "pyvmm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", folder, source], check=True,
                   capture_output=True, env=environment())
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "--python", folder / "venv/bin/python", "install", "--no-deps", wheel],
                   check=True, capture_output=True)
    return folder / "venv/bin/pyvmm"


def run(command: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command in the directory ``cwd``, as a user without a checkout runs it."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([command, *arguments], cwd=cwd, check=False, capture_output=True,
                          text=True, env=env | {"PYVMM_CACHE": str(cwd / "cache")})


@pytest.mark.slow
def test_a_wheel_builds_an_image_of_busybox(installed: Path, tmp_path: Path) -> None:
    done = run(installed, "image", "build", "--busybox", "root.img", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == (
        "boot it    pyvmm run --kernel KERNEL --disk root.img --append pyvmm.shell")
    listed = subprocess.run(
        [find_tool("debugfs", "e2fsprogs"), "-R", "ls -p /sbin", tmp_path / "root.img"],
        capture_output=True, text=True, check=True).stdout
    for name in ("init", "pyvmm-exit", "pyvmm-mark", "pyvmm-warm"):
        assert f"/{name}/" in listed


@pytest.mark.slow
def test_a_wheel_has_the_kernels_configuration(installed: Path, tmp_path: Path) -> None:
    code = ("from pyvmm.linux.build.options import FRAGMENT, NEEDS, read_fragment as read;"
            "print(len(read(FRAGMENT)) > 60, len(read(NEEDS)) > 20)")
    done = run(installed.with_name("python"), "-c", code, cwd=tmp_path)
    assert done.stdout == "True True\n", done.stderr
    tree = tmp_path / "linux"
    (tree / "arch/x86").mkdir(parents=True)
    (tree / "Makefile").write_text(MAKEFILE)
    done = run(installed, "kernel", "build", "linux", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "boot it    pyvmm run --kernel linux --disk root.img"
    assert "CONFIG_VIRTIO_BLK=y\n" in (tree / ".config").read_text()


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
