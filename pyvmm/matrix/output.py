"""The directory of a matrix's logs and reports: ``--out``."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from pyvmm.errors import ConfigError, HostError
from pyvmm.matrix.results import RunResult
from pyvmm.matrix.runs import Run

MARK = "matrix.json"
"""The summary; a directory that has it is an earlier matrix's, and may be written again."""
RUNS, RESULT, PAGE, JUNIT = "runs", "result.json", "index.html", "junit.xml"


class Output:
    """The directory ``path``: ``matrix.json``, the reports, and ``runs/NAME/`` for each run.

    Nothing here raises once runs are under way, but for ``folder_of``: ``problems`` has a line for
    each file that could not be written.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.problems: list[str] = []

    def prepare(self) -> None:
        """Make the directory and empty it of an earlier matrix; ConfigError, HostError."""
        try:
            os.makedirs(self.path, exist_ok=True)
            there = os.listdir(self.path)
        except OSError as error:
            raise ConfigError(f"--out {self.path}", f"{error.strerror}") from error
        if there and MARK not in there:
            raise ConfigError(
                f"--out {self.path}", f"has files already, but no {MARK} of an earlier matrix; "
                "name another directory, or empty it"
            )
        try:
            # Runs of before would stand beside those of today, and pass for them.
            for name in (RUNS, PAGE, JUNIT):
                _remove(Path(self.path, name))
            # With its mark the directory can be used again, however this matrix ends.
            Path(self.path, MARK).write_text("{}\n", encoding="utf-8")
            Path(self.path, RUNS).mkdir()
        except OSError as error:
            raise HostError(f"--out {self.path}: {error.strerror}") from error

    def folder_of(self, run: Run) -> str:
        """Make the directory for the logs of ``run`` and return its path; OSError."""
        path = os.path.join(self.path, RUNS, run.name)
        os.makedirs(path, exist_ok=True)
        return path

    def save_result(self, result: RunResult) -> None:
        """Write a run's ``result.json``, if the run has a directory."""
        folder = os.path.join(RUNS, result.name)
        if os.path.isdir(os.path.join(self.path, folder)):
            test = None if result.test is None else result.test.as_dict()
            self.write(os.path.join(folder, RESULT), _json({**result.as_json(), "test": test}))

    def save_summary(self, results: Sequence[RunResult], exit_status: int) -> None:
        """Write ``matrix.json``."""
        runs = [result.as_json() for result in results]
        self.write(MARK, _json({"version": 1, "exit_status": exit_status, "runs": runs}))

    def save_files(self, name: str, files: dict[str, bytes]) -> None:
        """Write the logs of run ``name``, which came from a worker."""
        for path, data in files.items():
            if os.path.isabs(path) or ".." in path.split("/"):
                self.problems.append(f"{path}: is no name for a log of {name}")
            else:
                self.write(os.path.join(RUNS, name, path), data)

    def write(self, name: str, data: bytes) -> None:
        """Write the file ``name``, absolute or in the directory: all of it, or none."""
        path = Path(self.path, name)
        new = path.with_name(f".{path.name}.new")
        try:
            if path.exists() and not path.is_file():
                path.write_bytes(data)  # a pipe or a device stays one
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            new.write_bytes(data)
            new.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                new.unlink()
            self.problems.append(f"{path}: cannot be written: {error.strerror}")


def check_place(option: str, path: str | None) -> None:
    """Raise ConfigError if no file can be at ``path``, which ``option`` gives."""
    if path is None:
        return
    folder = os.path.dirname(os.path.abspath(path))
    if not path or os.path.isdir(path):
        raise ConfigError(f"{option} {path}", "is a directory; name a file")
    if not os.path.isdir(folder):
        raise ConfigError(f"{option} {path}", f"{folder} is no directory")


def _json(value: object) -> bytes:
    return f"{json.dumps(value, indent=1, ensure_ascii=True)}\n".encode()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
