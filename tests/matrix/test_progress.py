"""How a matrix shows that it gets on: lines, or a live table on a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyvmm.matrix.progress import PlainProgress
from pyvmm.matrix.results import RunResult
from tests.support.matrix_program import ROOT, matrix, until
from tests.support.patience import patient

WITHOUT_RICH = (
    "import sys; sys.modules['rich'] = None; from tests.support.stand_in_runs import stand_in; "
    "from pyvmm.cli.matrix import matrix_main; sys.exit(matrix_main(sys.argv[1:], stand_in))"
)
WITH_RICH = WITHOUT_RICH.replace("sys.modules['rich'] = None; ", "")


def on_a_terminal(program: str, path: Path, go: Path, term: str = "xterm") -> tuple[int, str]:
    """Run a matrix with standard error on a terminal; return exit status and what that got.

    The file ``go`` is made once the run waits for it and the terminal shows it for a while.
    """
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path), "--out", str(path.parent / "out")], cwd=ROOT,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=theirs,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": term, "COLUMNS": "100"},
    )
    os.close(theirs)
    shown = b""
    until_s = time.monotonic() + patient(60)
    seen_s = 0.0
    while time.monotonic() < until_s:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                data = os.read(ours, 65536)
            except OSError:
                break
            shown += data
        if list(go.parent.glob(f"{go.name}.k+*")):
            seen_s = seen_s or time.monotonic()
            if time.monotonic() - seen_s > 1:
                go.touch()
    os.close(ours)
    return process.wait(timeout=patient(20)), shown.decode()


def waiting(folder: Path) -> Path:
    return matrix(folder, f'a = ["wait", "{folder}/go"]\nb = ["status", "3"]\nc = ["panic"]')


def test_a_terminal_gets_a_live_table(tmp_path: Path) -> None:
    status, shown = on_a_terminal(WITH_RICH, waiting(tmp_path), tmp_path / "go")
    assert status == 121
    assert "\x1b[" in shown
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert re.search(r"k\+256M\+1cpu\+a +kernel +\d+ s", text)
    assert "[2/3] FAIL k+256M+1cpu+" in text
    assert "2 failed" in text
    assert "[31m\u202e" not in text
    assert r"kernel panic: <b>&\x1b[31m" in shown
    # The cursor is shown again.
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")


@pytest.mark.parametrize(("program", "term"), [(WITHOUT_RICH, "xterm"), (WITH_RICH, "dumb")],
                         ids=["without rich", "dumb terminal"])
def test_else_a_terminal_gets_lines(program: str, term: str, tmp_path: Path) -> None:
    status, shown = on_a_terminal(program, waiting(tmp_path), tmp_path / "go", term)
    assert status == 121
    assert "\x1b" not in shown
    assert [line.split(" ")[1] for line in shown.splitlines()] == ["FAIL", "FAIL", "ok"]


def test_lines_are_printed_as_runs_end_not_at_the_end(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WITH_RICH, str(waiting(tmp_path)), "--jobs", "2",
         "--out", str(tmp_path / "out")],
        cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("[1/3] FAIL k+256M+1cpu+b (1.0 s) failed: exited")
    assert process.stderr.readline().startswith("[2/3] FAIL k+256M+1cpu+c")
    until(lambda: bool(list(tmp_path.glob("go.k+*"))))
    (tmp_path / "go").touch()
    _, rest = process.communicate(timeout=patient(60))
    assert rest == "[3/3] ok   k+256M+1cpu+a (1.0 s)\n"


def test_a_run_that_takes_long_is_told_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = PlainProgress(2)
    progress.started("one", "")
    progress.phase_began("one", "kernel")
    now[0] += 59
    progress.refresh()
    assert capsys.readouterr().err == ""
    now[0] += 2
    progress.refresh()
    progress.refresh()
    assert capsys.readouterr().err == "[0/2] running: one (kernel)\n"


def test_on_github_a_guest_cannot_give_commands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    PlainProgress(1).finished(RunResult(
        name="r", verdict="panic", exit_status=121, message="##[group]x\n::error::y",
    ))
    (line,) = capsys.readouterr().err.splitlines()
    assert "##[" not in line
    assert not line.startswith("::")
