"""``pyvmm test`` as a process of its own, with bare guests: outcomes that need no Linux."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.guest import environment
from tests.support.patience import patient
from tests.support.tiny_guests import (
    REBOOT,
    REPORT_0,
    SPIN,
    TRIPLE_FAULT,
    prints,
    prints_for_ever,
    write_guest,
)

pytestmark = pytest.mark.bare

STAMP = b"[    1.000000] "
LINES = b"".join(STAMP + b"line %d\r\n" % number for number in range(60))
BUG = STAMP + b"BUG: kernel NULL pointer dereference, address: 0\r\n"
LIMIT = 16384
TRACE = STAMP + b"Call Trace:\r\n" + STAMP + b"---[ end trace 0 ]---\r\n"


class Bench:
    """Runs ``pyvmm test`` with guests of a few instructions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.report = folder / "report.json"

    def argv(self, *code: bytes, options: tuple[str, ...] = ()) -> list[str]:
        """The command line for a guest of ``code``."""
        kernel = write_guest(self.folder / "guest.elf", *code)
        limit = () if "--boot-timeout" in options else ("--boot-timeout", str(patient(20)))
        return [
            sys.executable, "-m", "pyvmm", "test", "--kernel", str(kernel), "--json",
            str(self.report), *limit, *options,
        ]

    def run(
        self, *code: bytes, options: tuple[str, ...] = ("--expect", "ready"),
        before: Callable[[], None] | None = None,
    ) -> tuple[int, str, dict[str, Any]]:
        """Run to the end: the exit status, standard error, the JSON."""
        done = subprocess.run(
            self.argv(*code, options=options), stdin=subprocess.DEVNULL, capture_output=True,
            env=environment(), timeout=patient(90), check=False, preexec_fn=before,
        )
        assert done.stdout == b""
        return done.returncode, done.stderr.decode(), json.loads(self.report.read_text())


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.mark.parametrize(("code", "status", "verdict"), [
    ((prints(b"is ready"), SPIN), 0, "passed"),
    ((TRIPLE_FAULT,), 122, "triple-fault"),
    ((REBOOT,), 120, "ended"),
    ((prints(b"x\r\n"), REPORT_0), 120, "ended"),
    ((prints(LINES + BUG + TRACE), SPIN), 121, "oops"),
    ((prints(STAMP + b"Kernel panic - not syncing: x\r\n"), SPIN), 121, "panic"),
], ids=["passes", "triple fault", "reboot", "a status", "oops", "panic"])
def test_an_outcome_has_its_status_and_verdict(
    code: tuple[bytes, ...], status: int, verdict: str, bench: Bench
) -> None:
    got, err, found = bench.run(*code)
    assert (got, found["verdict"], found["exit_status"]) == (status, verdict, status), err
    assert "Traceback" not in err


def test_a_bad_line_ends_the_run_at_once_and_is_shown_with_forty_before(bench: Bench) -> None:
    begin_s = time.monotonic()
    _, err, found = bench.run(prints(LINES + BUG + TRACE), SPIN)
    assert time.monotonic() - begin_s < patient(15)
    assert len(found["before"]) == 40
    lines = err.splitlines()
    at = lines.index("  > " + BUG.decode().strip())
    assert lines[at - 1] == "  " + STAMP.decode() + "line 59"
    assert lines[at - 40] == "  " + STAMP.decode() + "line 20"
    assert lines[at + 1] == "  " + STAMP.decode() + "Call Trace:"


def test_a_call_trace_without_an_end_is_not_awaited_for_long(bench: Bench) -> None:
    status, _, found = bench.run(prints(BUG), SPIN)
    assert (status, found["verdict"]) == (121, "oops")


def test_a_pattern_of_the_users_and_classes_that_do_not_count(bench: Bench) -> None:
    status, _, found = bench.run(
        prints(BUG + b"is ready\r\n"), SPIN,
        options=("--expect", "ready", "--no-fail-on", "all"),
    )
    assert status == 0, found
    status, _, found = bench.run(
        prints(b"my test: FAIL\r\n"), SPIN, options=("--expect", "ready", "--fail-on", ": FAIL$"),
    )
    assert (status, found["verdict"], found["line"]) == (121, "fail-on", "my test: FAIL")


def test_a_guest_that_hangs_is_a_timeout_with_its_registers(bench: Bench) -> None:
    status, err, found = bench.run(
        prints(b"begins\r\n"), SPIN, options=("--expect", "ready", "--boot-timeout", "1"),
    )
    assert (status, found["verdict"]) == (124, "expect")
    assert found["registers"]
    assert "the console did not show 'ready' 1 s after the start" in err


def test_a_guest_without_an_agent_is_a_timeout_that_says_so(bench: Bench) -> None:
    status, err, found = bench.run(
        prints(b"begins\r\n"), SPIN,
        options=("--agent", "image", "--boot-timeout", "1", "--", "true"),
    )
    assert (status, found["verdict"]) == (124, "boot-timeout")
    assert "pyvmm: boot-timeout: no agent after 1 s: " in err
    assert found["registers"]


def test_a_flood_loses_nothing_in_the_log_and_no_memory(bench: Bench) -> None:
    log = bench.folder / "log"
    line = b"0123456789" * 6 + b"abc\n"
    status, _, found = bench.run(
        prints_for_ever(line), options=(
            "--expect", "ready", "--boot-timeout", "3", "--console-log", str(log)
        ),
        before=lambda: resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30)),
    )
    data = log.read_bytes()
    assert (status, found["verdict"]) == (124, "expect"), "and not 125: the log has all"
    assert len(data) > 1000
    assert data.replace(line, b"") == line[: len(data) % len(line)], "every line, and whole"


def test_a_full_disk_for_the_console_costs_the_log_not_the_verdict(bench: Bench) -> None:
    log = bench.folder / "log"
    status, err, found = bench.run(
        prints(LINES * 40 + b"is ready\r\n"), SPIN,
        options=("--expect", "ready", "--console-log", str(log)),
        before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT)),
    )
    assert (status, found["verdict"]) == (125, "passed"), err
    assert "Traceback" not in err
    assert f"pyvmm: --console-log {log}: has {LIMIT} of " in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_guest_and_the_reports_are_written(
    number: signal.Signals, bench: Bench
) -> None:
    options = ("--expect", "ready", "-v", "--junit", str(bench.folder / "r.xml"))
    with subprocess.Popen(
        bench.argv(prints(b"begins\r\n"), SPIN, options=options), stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE, env=environment(),
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == b"console: begins\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(number)
        process.stderr.read()
        assert process.wait(patient(30)) == 128 + number
    assert json.loads(bench.report.read_text())["verdict"] == "interrupted"
    assert (bench.folder / "r.xml").stat().st_size
    assert children
    assert not any(os.path.exists(f"/proc/{child}") for child in children)
