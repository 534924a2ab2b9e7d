"""What runs the fuzz targets finds planted faults of every kind, and says how to repeat them."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.mutate import Mutator
from fuzz.source import Source
from fuzz.worker import coverage_guide
from tests.support.patience import patient

TOY = "tests.support.fuzz_toy"


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fuzz", *arguments],
        capture_output=True, text=True, timeout=patient(200), check=False,
    )  # fmt: skip


def test_a_planted_fault_is_found_and_repeated(tmp_path: Path) -> None:
    done = fuzz(TOY, "--runs", "20000", "--seconds", "60", "--seed", "1", "--plain",
                "--out", str(tmp_path))  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "ZeroDivisionError: planted" in done.stdout
    crashes = [path for path in (tmp_path / TOY).glob("crash-*") if not path.suffix]
    case = next(path for path in crashes if path.read_bytes()[:1] == b"B")
    text = case.with_suffix(".txt").read_text()
    assert f"repeat: python -m fuzz {TOY} {case}" in text
    again = fuzz(TOY, str(case))
    assert again.returncode == 1
    assert "ZeroDivisionError: planted" in again.stdout
    shortened = fuzz(TOY, str(case), "--minimise")
    assert shortened.returncode == 1
    assert case.with_name(f"{case.name}.min").read_bytes() == b"B"


@pytest.mark.parametrize(("case", "text"), [
    (b"CC", "no end after 0.5 s of the CPU"), (b"DD", "no end after 5 s of the clock"),
])
def test_a_case_without_end(case: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / "case").write_bytes(case)
    done = fuzz(TOY, str(tmp_path / "case"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert text in done.stdout


def test_growth_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "harmless").write_bytes(b"harmless")
    (tmp_path / "large").write_bytes(b"EE")
    files = [str(tmp_path / name) for name in ["harmless"] * 20 + ["large", "harmless"]]
    done = fuzz(TOY, *files)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.count("the limit is 64") == 1, "it is said once"
    assert done.stdout.count("harmless: nothing") == 21


def test_a_process_that_dies_leaves_its_case(tmp_path: Path) -> None:
    name = f"{TOY}_dies"
    done = fuzz(name, "--seconds", "5", "--seed", "1", "--plain", "--out", str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    (case,) = (path for path in (tmp_path / name).glob("crash-*") if not path.suffix)
    assert case.read_bytes() == b"FF and more"
    assert "in run" in case.with_suffix(".txt").read_text(), "where it was is not said"
    again = fuzz(name, str(case))
    assert again.returncode == -signal.SIGABRT


def test_nothing_found_is_success(tmp_path: Path) -> None:
    done = fuzz("disk-head", "--runs", "200", "--seed", "5", "--plain", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    *_, header, row = done.stdout.splitlines()
    assert header.split()[0] == "target"
    assert row.split()[:2] == ["disk-head", "200"]


@pytest.mark.skipif(coverage_guide() is None, reason="atheris is not installed")
def test_coverage_guides(tmp_path: Path) -> None:
    done = fuzz("disk-head", "--runs", "2000", "--seconds", "60", "--seed", "5",
                "--out", str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    row = done.stdout.splitlines()[-1].split()
    assert int(row[4]) > 20, "no branches counted"
    assert int(row[5]) > 0, "no case was worth keeping"


def test_what_is_no_target() -> None:
    done = fuzz("no-such-target")
    assert done.returncode == 2
    assert "neither a target (--list) nor a file" in done.stderr
    assert "rings" in fuzz("--list").stdout


def test_the_same_bytes_are_the_same_decisions() -> None:
    data = bytes(range(64))
    first, second = Source(data), Source(data)
    for source in (first, second):
        assert source.more
    decisions = [
        (s.number(3, 300), s.pick("abcdef"), s.bits(13), s.edge(7, 9, bits=32), s.chance(128))
        for s in (first, second)
    ]
    assert decisions[0] == decisions[1]
    assert 3 <= decisions[0][0] <= 300
    empty = Source(b"")
    assert (empty.number(5, 9), empty.pick("xyz"), empty.chance(255)) == (5, "x", False)


def test_mutations_stay_short_and_repeat() -> None:
    def some(seed: int) -> list[bytes]:
        mutator = Mutator(random.Random(seed), (b"word",), 100)
        return [mutator.mutate(b"a case of some bytes", b"another") for _ in range(200)]

    cases = some(3)
    assert cases == some(3)
    assert cases != some(4)
    assert len(set(cases)) > 150
    assert max(map(len, cases)) <= 100
    assert any(b"word" in case for case in cases)
