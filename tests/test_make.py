"""``make test`` runs every stage and says what became of each; ``make run`` asks once for all."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = """
import pytest

def test_good(): pass

@pytest.mark.parametrize("n", range({bad}))
def test_bad(n): assert False

@pytest.fixture
def broken(): raise ValueError

def test_error(broken): pass
"""
STAGES = """
include {makefile}
green:
\t@echo ran green
red:
\t@echo ran red; exit 3
slow:
\t@echo ran slow; sleep 1; echo slow again
also-green:
\t@{python} -m pytest -q -c /dev/null -p tests.conftest {tests} || true
"""


def make_test(
    folder: Path, *stages: str, options: tuple[str, ...] = (), bad: int = 1,
    long_stages: tuple[str, ...] = (),
) -> tuple[int, str]:
    """Exit status and output of ``make test`` with ``stages`` for its own."""
    (folder / "test_some.py").write_text(TESTS.format(bad=bad))
    (folder / "Makefile").write_text(STAGES.format(
        makefile=ROOT / "Makefile", python=sys.executable, tests=folder / "test_some.py"))
    groups = ("VENV", "KERNEL", "IMAGE", "LAB", "TEST", "TOOL", "BENCH", "DEBIAN")
    clean = {name: value for name, value in os.environ.items()
             if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYVMM_TEST_REPORT")}
    done = subprocess.run(
        ["make", *options, "test", f"STAGES={' '.join(stages)}",
         f"LONG_STAGES={' '.join(long_stages)}",
         *(f"{group}_PACKAGES=" for group in groups)],
        cwd=folder, env={**clean, "PYTHONPATH": str(ROOT)}, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    assert not list((folder / "build").iterdir()), "the report is removed"
    return done.returncode, done.stdout


@pytest.mark.parametrize("options", [(), ("-k",), ("-j4",)])
def test_fault_43_a_red_stage_hides_none_behind_it(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    status, output = make_test(tmp_path, "red", "green", "red", "also-green", options=options)
    assert status == 2
    assert (output.count("ran red"), output.count("ran green")) == (2, 1)
    summary = re.sub(r"\d+ s$", "N s", output.partition("==== make test ====\n")[2], flags=re.M)
    assert summary.startswith(
        "red           FAILED, N s\ngreen         passed, N s\nred           FAILED, N s\n"
        "also-green    passed, N s\n  1 passed, 1 failed, 1 error\n"
    )
    assert re.search(r"^  FAILED \S*test_some.py::test_bad\[0\]$", summary, re.M)
    assert re.search(r"^  ERROR \S*test_some.py::test_error$", summary, re.M)


def test_fault_43_all_green_is_green_and_a_flood_is_cut(tmp_path: Path) -> None:
    status, output = make_test(tmp_path, "green", "also-green", bad=50)
    assert status == 0
    summary = output.partition("==== make test ====\n")[2]
    assert len(re.findall("^  FAILED ", summary, re.M)) == 20
    assert "  and 31 more\n" in summary


@pytest.mark.parametrize("options", [(), ("-j4",)])
def test_fault_43_what_runs_side_by_side_is_told_apart(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    status, output = make_test(
        tmp_path, "green", options=options, long_stages=("red", "also-green", "slow", "red")
    )
    assert status == 2
    log, _, summary = output.partition("==== make test ====\n")
    assert "ran slow\nslow again\n" in log, log
    told = re.sub(r"\d+ s$|^  (?:FAILED|ERROR).*\n", "N s", summary, flags=re.M)
    assert told.replace("N sN s", "").startswith(
        "green         passed, N s\nred           FAILED, N s\n"
        "also-green    passed, N s\n  1 passed, 1 failed, 1 error\n"
        "slow          passed, N s\nred           FAILED, N s\n"
    )


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_are_all_of_the_tests(parts: int, tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n@pytest.mark.parametrize('n', range(7))\ndef test_it(n): print('ran', n)\n"
    )
    ran = []
    for part in range(1, parts + 1):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-qs", "-c", "/dev/null", "-p", "tests.conftest",
             "--part", f"{part}/{parts}", tmp_path / "test_some.py"],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "PYVMM_TEST_REPORT": ""},
            text=True, check=True, stdout=subprocess.PIPE,
        )
        ran += re.findall(r"ran (\d)", done.stdout)
    assert sorted(ran) == list("0123456")


NEEDED = ("linux-source-6.1", "busybox-static", "e2fsprogs", "flex")


@pytest.mark.parametrize("is_complete", [False, True])
def test_fault_39_what_make_run_lacks_is_one_line(tmp_path: Path, is_complete: bool) -> None:
    """A user's, on a host without any of the packages, with a KVM that is complete or is not."""
    programs = {
        "dpkg-query": "exit 1", "id": "echo 1000", "apt-get": "exit 99",
        "python": f'case "$*" in *doctor*) exit {int(not is_complete)};; '
                  "*) exit 1;; esac",
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["make", "run", f"PYTHON={tmp_path / 'python'}"], cwd=ROOT, text=True, check=False,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "MAKEFLAGS": ""},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    assert done.returncode == 2
    (line,) = (line for line in done.stdout.splitlines() if "apt-get" in line)
    assert line.startswith("  sudo apt-get install --no-install-recommends python3-venv ")
    assert set(NEEDED) <= set(line.split())
    assert ("qemu-system-x86" in line.split()) != is_complete
