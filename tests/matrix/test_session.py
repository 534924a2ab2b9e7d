"""``pyvmm matrix`` from its file to its exit status and its reports; its runs boot nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from pyvmm.cli.matrix import matrix_main
from pyvmm.errors import ConfigError
from tests.support.matrix_program import (
    REAL,
    STAND_IN,
    ended,
    matrix,
    start,
    until,
    with_small_disk,
)
from tests.support.stand_in_runs import stand_in

ALL = """
good = ["status", "0"]
three = ["status", "3"]
seven = ["status", "7"]
panic = ["panic"]
"""


def done(folder: Path, commands: str, *words: str, head: str = "") -> tuple[int, dict[str, str]]:
    """Run a matrix; return its exit status, and each run's verdict by the name of its command."""
    out = folder / "out"
    status = matrix_main([str(matrix(folder, commands, head)), "--out", str(out), *words], stand_in)
    summary = json.loads((out / "matrix.json").read_text())
    assert summary["exit_status"] in (status, 0)
    return status, {run["name"].split("+")[-1]: run["verdict"] for run in summary["runs"]}


def test_every_run_has_its_logs_and_the_reports_tell_of_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, verdicts = done(tmp_path, ALL)
    assert status == 121
    assert verdicts == {"good": "passed", "three": "failed", "seven": "failed", "panic": "panic"}
    for name in verdicts:
        folder = tmp_path / "out" / "runs" / f"k+256M+1cpu+{name}"
        assert folder.joinpath("console.log").read_text().startswith("the console of ")
        assert json.loads(folder.joinpath("result.json").read_text())["verdict"] == verdicts[name]
    root = ET.parse(tmp_path / "out" / "junit.xml").getroot()
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("4", "3", "0")
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.index("k+<wbr>256M+<wbr>1cpu+<wbr>panic") < page.index("1cpu+<wbr>seven")
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == r"FAIL k+256M+1cpu+panic: panic (121): kernel panic: <b>&\x1b[31m"
    assert lines[1] == "FAIL k+256M+1cpu+seven: failed (7): exited with 7"
    assert lines[-1].endswith(f"1 passed, 2 failed, 1 panic; {tmp_path}/out/index.html")
    assert "[4/4] " in captured.err


@pytest.mark.parametrize(("commands", "status"), [
    ('a = ["status", "0"]', 0),
    ('a = ["status", "3"]\nb = ["status", "7"]', 7),
    ('a = ["status", "7"]\nb = ["status", "124"]', 124),
    ('a = ["status", "124"]\nb = ["status", "120"]', 120),
    ('a = ["panic"]\nb = ["status", "120"]', 121),
    ('a = ["panic"]\nb = ["status", "122"]', 122),
    ('a = ["status", "122"]\nb = ["status", "123"]', 123),
    ('a = ["host", "kvm"]\nb = ["status", "123"]', 125),
], ids=str)
def test_the_exit_status_is_that_of_the_worst(commands: str, status: int, tmp_path: Path) -> None:
    assert done(tmp_path, commands)[0] == status


def test_a_defect_or_a_host_that_refuses_costs_one_run(tmp_path: Path) -> None:
    status, verdicts = done(tmp_path, """
        defect = ["defect", "x"]
        host = ["host", "kvm"]
        full = ["full", "/logs/x"]
        good = ["status", "0"]
    """)
    assert status == 125
    assert verdicts == {
        "defect": "host-error", "host": "host-error", "full": "host-error", "good": "passed",
    }
    runs = json.loads((tmp_path / "out" / "matrix.json").read_text())["runs"]
    assert [run["message"] for run in runs][::2] == [
        "internal error: ZeroDivisionError: x",
        "[Errno 28] No space left on device: '/logs/x'",
    ]


def test_as_many_at_a_time_as_asked_for(tmp_path: Path) -> None:
    """Each of three waits for all three."""
    commands = "\n".join(f'c{n} = ["wait", "{tmp_path}/go"]' for n in range(3))
    process = start(str(matrix(tmp_path, commands)), "--jobs", "3", "--out", str(tmp_path / "out"))
    until(lambda: len(list(tmp_path.glob("go.k+*"))) == 3)
    (tmp_path / "go").touch()
    status, out, _ = ended(process)
    assert status == 0
    assert "3 passed" in out


@pytest.mark.parametrize(("number", "status"), [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129),
], ids=str)
def test_an_interrupt_ends_all_runs_and_reports_what_ran(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    process = start(str(matrix(tmp_path, f"""
        a = ["status", "0"]
        b = ["wait", "{tmp_path}/go"]
        c = ["wait", "{tmp_path}/go"]
        d = ["status", "0"]
    """)), "--jobs", "2", "--out", str(tmp_path / "out"))
    until(lambda: len(list(tmp_path.glob("go.k+*"))) == 2)
    process.send_signal(number)
    found, out, error = ended(process)
    assert found == status, error
    assert len(list(tmp_path.glob("go.*.ended"))) == 2
    runs = json.loads((tmp_path / "out" / "matrix.json").read_text())["runs"]
    assert [run["verdict"] for run in runs] == [
        "passed", "interrupted", "interrupted", "not-started"]
    assert "ending all runs" in error
    assert "1 passed, 1 not-started, 2 interrupted" in out
    page = (tmp_path / "out" / "index.html").read_text()
    assert f"ended by signal {int(number)} before all runs were done" in page
    root = ET.parse(tmp_path / "out" / "junit.xml").getroot()
    assert root.find("testsuite/testcase[4]/skipped") is not None


def test_a_second_interrupt_does_not_wait_for_runs_that_hang(tmp_path: Path) -> None:
    process = start(str(matrix(tmp_path, f'a = ["hang", "{tmp_path}/go"]')),
                    "--out", str(tmp_path / "out"))
    until(lambda: (tmp_path / "go").exists())
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "ending all runs" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    assert ended(process)[0] == 130
    (run,) = json.loads((tmp_path / "out" / "matrix.json").read_text())["runs"]
    assert run["verdict"] == "interrupted"


def test_list_and_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(matrix(tmp_path, ALL))
    assert matrix_main([path, "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"k+256M+1cpu+{name}" for name in ("good", "three", "seven", "panic")
    ]
    assert not (tmp_path / "pyvmm-matrix").exists()
    assert done(tmp_path, ALL, "--only", "*+good") == (0, {"good": "passed"})


@pytest.mark.parametrize(("words", "problem"), [
    (["--jobs", "0"], "--jobs 0: must be a number from 1 to 64"),
    (["--jobs", "many"], "--jobs many: must be a number from 1 to 64"),
    (["--executor", "ssh"], "--executor ssh: must be local or dask=ADDRESS"),
    (["--executor", "dask="], "--executor dask=: must be local or dask=ADDRESS"),
    (["--executor", "dask=x", "--jobs", "2"], "--jobs: is for --executor local"),
    (["--only", "x*"], "--only x[*]: matches none of the 1 runs"),
], ids=str)
def test_a_bad_option_is_named(words: list[str], problem: str, tmp_path: Path) -> None:
    path = matrix(tmp_path, 'c = ["status", "0"]')
    with pytest.raises(ConfigError, match=problem):
        matrix_main([str(path), *words], stand_in)


def test_all_files_are_looked_for_before_the_first_run(tmp_path: Path) -> None:
    path = matrix(tmp_path, '[commands.c]\nrun = ["status", "0"]\nput = ["a.ko:/tmp/"]')
    with pytest.raises(ConfigError) as caught:
        matrix_main([str(path), "--out", str(tmp_path / "out")], stand_in)
    assert str(caught.value) == (
        f"{path}: commands.c.put: {tmp_path}/a.ko: No such file or directory"
    )
    assert not (tmp_path / "out").exists()
    (tmp_path / "a.ko").touch()
    path.write_text(f"{path.read_text()}[disks]\nd = ['nowhere.img', '/dev/null']\n")
    with pytest.raises(ConfigError) as caught:
        matrix_main([str(path), "--out", str(tmp_path / "out")], stand_in)
    assert str(caught.value) == (
        f"{path}: disks.d: {tmp_path}/nowhere.img: No such file or directory "
        "(and 1 more like this)"
    )


def test_a_kernel_tree_needs_a_kernel_in_it(tmp_path: Path) -> None:
    path = matrix(tmp_path, 'c = ["status", "0"]')
    path.write_text(path.read_text().replace("'m.toml'", "'.'"))
    with pytest.raises(ConfigError, match=r"m.toml: kernels.k: .*: is a directory with no kernel"):
        matrix_main([str(path), "--out", str(tmp_path / "out")], stand_in)
    (tmp_path / "arch" / "x86" / "boot").mkdir(parents=True)
    (tmp_path / "arch" / "x86" / "boot" / "bzImage").touch()
    assert matrix_main([str(path), "--out", str(tmp_path / "out")], stand_in) == 0


def test_another_directory_than_an_earlier_matrix_is_left_alone(tmp_path: Path) -> None:
    path = str(matrix(tmp_path, 'c = ["status", "0"]\nd = ["status", "0"]'))
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(ConfigError, match=r"--out .*: has files already, but no matrix.json of an"):
        matrix_main([path, "--out", str(out)], stand_in)
    (out / "mine").unlink()
    assert matrix_main([path, "--out", str(out)], stand_in) == 0
    assert len(list((out / "runs").iterdir())) == 2
    assert matrix_main([path, "--out", str(out), "--only", "*+c"], stand_in) == 0
    assert [one.name for one in (out / "runs").iterdir()] == ["k+256M+1cpu+c"]
    with pytest.raises(ConfigError, match=r"--out .*m.toml: File exists"):
        matrix_main([path, "--out", path], stand_in)


def test_reports_may_go_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "html").mkdir()
    status, _ = done(
        tmp_path, ALL, "--junit", str(tmp_path / "j.xml"), "--html", str(tmp_path / "html" / "p"),
    )
    assert status == 121
    assert (tmp_path / "j.xml").exists()
    assert "./../out/runs/k%2B256M" in (tmp_path / "html" / "p").read_text()
    assert not (tmp_path / "out" / "index.html").exists()


def test_a_place_for_a_report_that_is_none_is_refused_before_the_first_run(tmp_path: Path) -> None:
    for option in ("--junit", "--html"):
        with pytest.raises(ConfigError, match=f"{option} /nowhere/x: /nowhere is no directory"):
            done(tmp_path, ALL, option, "/nowhere/x")
        with pytest.raises(ConfigError, match=f"{option} {tmp_path}: is a directory"):
            done(tmp_path, ALL, option, str(tmp_path))
    assert not (tmp_path / "out").exists()


def test_a_report_goes_into_a_pipe_as_into_a_file(tmp_path: Path) -> None:
    """A device or a pipe is written, never replaced."""
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE)
    assert done(tmp_path, ALL, "--junit", str(tmp_path / "pipe"))[0] == 121
    assert reader.communicate()[0].startswith(b"<?xml")
    assert (tmp_path / "pipe").is_fifo()


def test_a_full_disk_for_logs_is_one_clear_line_each(tmp_path: Path) -> None:
    path = matrix(tmp_path, 'a = ["log", "200000"]\nb = ["status", "0"]')
    small = tmp_path / "small"
    process = start(
        str(path), "--jobs", "1", "--out", str(small / "out"),
        program=with_small_disk(small, STAND_IN),
    )
    status, out, error = ended(process)
    assert status == 125
    assert "host-error (125): [Errno 28] No space left on device" in out
    said = [line for line in error.splitlines() if line.startswith("pyvmm: ")]
    assert f"pyvmm: {small}/out/index.html: cannot be written: No space left on device" in said


def test_a_disk_that_is_full_before_is_refused(tmp_path: Path) -> None:
    path = matrix(tmp_path, 'a = ["status", "0"]')
    small = tmp_path / "small"
    fill = "{ head -c 100000 /dev/zero >\"$0/full\" 2>/dev/null || true; }"
    process = start(
        str(path), "--out", str(small / "out"), program=with_small_disk(small, REAL, fill),
    )
    assert ended(process) == (
        125, "", f"pyvmm: --out {small}/out: No space left on device\n"
    )


def test_annotations_on_github_say_what_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    done(tmp_path, ALL)
    assert (
        "::error title=k+256M+1cpu+three%3A failed::exited with 3"
        in capsys.readouterr().out.splitlines()
    )
