"""The log of one stream of a command: bounded, and its loss ends no run."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.matrix import one_run
from pyvmm.matrix.one_run import Log


def test_a_log_has_the_beginning_of_an_endless_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_run, "MAX_LOG_BYTES", 1000)
    with Log(str(tmp_path), "stdout.log") as log:
        log.write(b"x" * 999)
        assert log.problem == ""
        log.write(b"yz")
        log.write(b"more")
    assert (tmp_path / "stdout.log").read_bytes() == b"x" * 999 + b"y"
    assert log.problem == f"{tmp_path}/stdout.log: has only the first 1000 bytes"


def test_a_full_disk_is_a_problem_and_no_error(tmp_path: Path) -> None:
    (tmp_path / "stdout.log").symlink_to("/dev/full")
    with Log(str(tmp_path), "stdout.log") as log:
        log.write(b"lost")
        log.write(b"lost, too")
    assert log.problem.endswith("stdout.log: cannot be written: No space left on device")
