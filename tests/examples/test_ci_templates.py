"""The templates for GitHub and GitLab: well formed, and their shell lines run here.

Nobody runs them at GitHub or GitLab from here.  Each `run` goes through bash in a copy of the
example: kernel and image are made for real, by apt from a local repository of the distribution's
shape.  pytest only collects, the matrix only lists; sudo, pip, udevadm and doctor are recorded.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from tests.support import deb_packages
from tests.support.deb_packages import Package
from tests.support.patience import patient

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "ci-boot-test"
TEMPLATE = EXAMPLE / ".github" / "workflows" / "boot.yml"
OURS = ROOT / ".github" / "workflows" / "boot.yml"
GITLAB = EXAMPLE / ".gitlab-ci.yml"
PROGRAMS = {
    "pyvmm": f"""
        case "$1" in
        doctor) echo "pyvmm doctor" >>"$RECORD";;
        matrix) shift; exec {sys.executable} -m pyvmm matrix --list "$@";;
        *) exec {sys.executable} -m pyvmm "$@";;
        esac
    """,
    "pytest": f'exec {sys.executable} -m pytest -p no:cacheprovider --collect-only -q "$@"',
    "sudo": 'echo "sudo $*" >>"$RECORD"; cat </dev/stdin >>"$RECORD"',
    "pip": 'echo "pip $*" >>"$RECORD"',
    "udevadm": "exit 1",  # only as root
}


def debian() -> list[Package]:
    """The meta package of `kernel fetch debian`, and the one that it depends on."""
    (image,) = deb_packages.debian()
    return [image, Package(name="linux-image-cloud-amd64", depends=image.name, files={})]


PACKAGES = {"ubuntu": deb_packages.ubuntu, "debian": debian}


def steps(path: Path) -> list[dict[str, Any]]:
    job = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]["boot"]
    assert job["runs-on"] == "ubuntu-latest"
    found: list[dict[str, Any]] = job["steps"]
    return found


def run_scripts(scripts: list[str], tmp_path: Path, distribution: str) -> str:
    """Run ``scripts`` as the CI server does; return what sudo, pip and doctor were asked."""
    repository = deb_packages.repository(PACKAGES[distribution](), tmp_path / "repository")
    apt = deb_packages.apt_configuration(tmp_path / "apt", repository)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    project = tmp_path / "project"
    shutil.copytree(EXAMPLE, project, ignore=shutil.ignore_patterns("kernel", "root.img", "logs"))
    record = tmp_path / "record"
    record.touch()
    environment = {
        **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "APT_CONFIG": str(apt),
        "RECORD": str(record), "PYVMM_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT),
    }
    subprocess.run(["apt-get", "update", "-qq"], check=True, env=environment)
    for script in scripts:
        done = subprocess.run(
            ["bash", "-e", "-c", script], cwd=project, env=environment, capture_output=True,
            text=True, stdin=subprocess.DEVNULL, timeout=patient(120), check=False,
        )
        assert done.returncode == 0, script + done.stdout + done.stderr
    assert (project / "root.img").exists()
    assert list((project / "kernel").glob("vmlinuz-*"))
    return record.read_text()


def test_the_steps_of_the_workflow_run(tmp_path: Path) -> None:
    found = steps(TEMPLATE)
    assert all(("run" in step) != ("uses" in step) for step in found)
    record = run_scripts([step["run"] for step in found if "run" in step], tmp_path, "ubuntu")
    assert 'KERNEL=="kvm", GROUP="kvm", MODE="0666"' in record
    assert "sudo udevadm trigger --name-match=kvm" in record
    assert record.index("pip install 'pyvmm[pytest]'".replace("'", "")) < record.index("doctor")


def test_the_lines_for_gitlab_run(tmp_path: Path) -> None:
    job = yaml.safe_load(GITLAB.read_text(encoding="utf-8"))["boot"]
    lines = [*job["before_script"], *job["script"]]
    skipped = re.compile(r"apt-get|python3 -m venv|export PATH")
    record = run_scripts(
        [line for line in lines if not skipped.match(line)], tmp_path, "debian"
    )
    assert record.splitlines() == ["pip install pyvmm[pytest] pytest-xdist", "pyvmm doctor"]
    assert len([line for line in lines if skipped.match(line)]) == 4


@pytest.mark.parametrize("path", [TEMPLATE, OURS])
def test_logs_are_kept_whatever_happened(path: Path) -> None:
    last = steps(path)[-1]
    assert last["if"] == "always()"
    written = "\n".join(str(step.get("run", "")) for step in steps(path))
    for name in ("logs", "junit.xml", "matrix"):
        assert re.search(rf"--\w[\w-]*[= ]{re.escape(name)}\b", written)
        assert name in [Path(line).name for line in last["with"]["path"].split()]


def test_our_own_workflow_differs_only_by_where_it_is() -> None:
    def plain(path: Path) -> str:
        text = path.read_text(encoding="utf-8").partition("\n")[2]
        for other, same in (
            ("'../../[pytest]'", "'pyvmm[pytest]'"),
            ("            examples/ci-boot-test/", " " * 12),
            ("    defaults:\n      run:\n        working-directory: examples/ci-boot-test\n", ""),
        ):
            text = text.replace(other, same)
        return text

    assert plain(OURS) == plain(TEMPLATE)
