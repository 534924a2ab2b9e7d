"""``python -m soak`` is stopped in every way and goes on; whatever a part leaves is found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from soak.journal import read_lines
from soak.processes import ROOT
from tests.support.launched import is_there
from tests.support.patience import patient

TOY = "tests.support.soak_toy"


def begin(out: Path, *words: str, plant: str = "none") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "soak", *words, "--out", str(out)],
        cwd=ROOT, env={**os.environ, "SOAK_TOY": plant}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )


def soak(out: Path, *words: str, plant: str = "none") -> tuple[int, str]:
    """Exit status and output of a soak that runs to its end."""
    with begin(out, *words, plant=plant) as process:
        said, _ = process.communicate(timeout=patient(120))
    return process.returncode, said


def trials(out: Path) -> list[int]:
    """The numbers of the trials that are done, in the order of their ends."""
    return [line["trial"] for line in read_lines(out / "toy.jsonl") if "trial" in line]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_part_goes_on_after_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    with begin(tmp_path, f"{TOY}=200") as process:
        until_s = time.monotonic() + patient(60)
        while len(trials(tmp_path)) < 5:
            assert time.monotonic() < until_s
            time.sleep(0.01)
        process.send_signal(number)
        said, _ = process.communicate(timeout=patient(60))
    done = len(trials(tmp_path))
    assert 5 <= done < 200
    if number is not signal.SIGKILL:
        assert process.returncode == 130
        assert "interrupted; the same command goes on" in said
    status, said = soak(tmp_path, f"{TOY}=200")
    assert status == 0, said
    assert not list(Path("/dev/shm").glob(f"pyvmm-soak-{process.pid}-*"))
    assert sorted(trials(tmp_path)) == list(range(200))
    (report,) = json.loads((tmp_path / "report.json").read_text())
    assert (report["done"], report["failed"], report["stretches"]) == (200, 0, 2)
    whole = tmp_path / "whole"
    soak(whole, f"{TOY}=200")
    (uncut,) = json.loads((whole / "report.json").read_text())
    assert report["figures"] == uncut["figures"], "a trial is the same whenever it is done"


def test_a_second_ctrl_c_does_not_wait_for_a_long_trial(tmp_path: Path) -> None:
    with begin(tmp_path, f"{TOY}=20", plant="lasts") as process:
        until_s = time.monotonic() + patient(60)
        while len(trials(tmp_path)) < 5:
            assert time.monotonic() < until_s
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        for line in process.stdout:
            if "the trials under way come to their end" in line:
                break
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=patient(60))
    assert process.returncode == 130, said
    assert "FAILED" not in said
    assert 3 not in trials(tmp_path)


def test_a_part_is_enlarged_done_and_begun_anew(tmp_path: Path) -> None:
    assert soak(tmp_path, f"{TOY}=10")[0] == 0
    before = trials(tmp_path)
    assert soak(tmp_path, f"{TOY}=5")[0] == 0
    assert trials(tmp_path) == before, "nothing is left to do"
    assert soak(tmp_path, f"{TOY}=12")[0] == 0
    assert sorted(trials(tmp_path)) == list(range(12))
    status, said = soak(tmp_path, f"{TOY}=3", "--fresh")
    assert status == 0
    assert sorted(trials(tmp_path)) == [0, 1, 2]
    assert "| `toy` | 3 toys | 0 |" in said


@pytest.mark.parametrize(("plant", "text"), [
    ("fails", "trial 3: planted ("), ("raises", "trial 3: planted ("),
    ("daemon", "left behind: process "), ("file", "left behind: "),
])
def test_whatever_is_wrong_is_a_failure_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: str, text: str
) -> None:
    monkeypatch.setenv("PYVMM_SOAK_END_S", "0.3")
    status, said = soak(tmp_path, f"{TOY}=9", plant=plant)
    assert status == 1
    assert text in said
    assert f"FAILED: {text}" in (tmp_path / "report.md").read_text()
    if plant in ("fails", "raises"):
        why = (tmp_path / "toy" / "failed-3" / "why").read_text()
        assert "Error: planted" in why
    if plant == "daemon":
        assert "sleep 300" in said
        pid = int(said.partition("left behind: process ")[2].partition(":")[0])
        assert not is_there(pid), "the next part must not find it"
    assert soak(tmp_path, f"{TOY}=10")[0] == 1, "it is not forgotten when the part goes on"


def test_what_was_published_is_done_unless_all_begins_anew(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps([{"part": "toy", "trials": "0-3 5"}]))
    here = tmp_path / "here"
    assert soak(here, f"{TOY}=6", "--results", str(kept))[0] == 0
    assert trials(here) == [4]
    status, said = soak(here, f"{TOY}=6", "--results", str(kept))
    assert (status, trials(here)) == (0, [4])
    assert "toy: 6 of 6 toys" in said
    assert soak(here, f"{TOY}=3", "--results", str(kept), "--fresh")[0] == 0
    assert soak(here, f"{TOY}=6", "--results", str(kept))[0] == 0
    assert sorted(trials(here)) == list(range(6)), "once begun anew, it goes on like that"


def test_one_trial_is_done_once_more_alone(tmp_path: Path) -> None:
    soak(tmp_path, f"{TOY}=5", plant="fails")
    before = list(read_lines(tmp_path / "toy.jsonl"))
    status, said = soak(tmp_path, TOY, "--trial", "3", plant="fails")
    assert status == 1
    assert "trial 3 FAILED: planted" in said
    assert soak(tmp_path, TOY, "--trial", "3")[0] == 0
    assert list(read_lines(tmp_path / "toy.jsonl")) == before


def test_a_part_that_cannot_be_done_has_no_failed_trials(tmp_path: Path) -> None:
    status, said = soak(tmp_path, f"{TOY}=9", plant="cannot")
    assert status == 1
    assert "toy: planted" in said
    assert 3 not in trials(tmp_path)
    assert soak(tmp_path, f"{TOY}=9")[0] == 0
    assert sorted(trials(tmp_path)) == list(range(9))


@pytest.mark.parametrize(("words", "text"), [
    (["nothing"], "nothing: none of cuts, "), (["cuts=0"], "cuts=0: the size must be"),
    (["cuts=x"], "cuts=x: the size must be"), (["--trial", "1"], "--trial: name its part"),
    (["cuts", "--trial", "-1"], "-1"),
])
def test_a_mistake_is_a_line(tmp_path: Path, words: list[str], text: str) -> None:
    status, said = soak(tmp_path, *words)
    assert status == 2
    assert text in said
    assert "Traceback" not in said


def test_the_parts_are_listed(tmp_path: Path) -> None:
    status, said = soak(tmp_path, "--list")
    assert status == 0
    for name in ("cuts", "kills", "fio", "starts", "crowd", "bare_crowd", "faults", "rings"):
        assert f"\n{name} " in f"\n{said}"
