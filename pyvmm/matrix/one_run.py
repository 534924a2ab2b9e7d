"""One run of a matrix as a boot test, with its logs in the run's directory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pyvmm.api.config import MachineConfig
from pyvmm.errors import HostError
from pyvmm.launcher.vm import Vm
from pyvmm.matrix.executor import Watch
from pyvmm.matrix.output import RESULT
from pyvmm.matrix.results import RunResult, shortened
from pyvmm.matrix.runs import Run
from pyvmm.testing.boot_result import BootResult
from pyvmm.testing.boot_test import BootTest, run_boot_test

CONSOLE, STDOUT, STDERR, FILES = "console.log", "stdout.log", "stderr.log", "files"


def run_one(run: Run, folder: str, watch: Watch) -> RunResult:
    """Boot the guest of ``run`` and have its command done; the logs go into ``folder``.

    PyvmmError or OSError if that cannot be begun.
    """
    test = boot_test(run, folder)
    if run.order.gets:
        os.makedirs(os.path.join(folder, FILES), exist_ok=True)
    with Log(folder, STDOUT) as output, Log(folder, STDERR) as errors:

        def adopt(vm: Vm) -> None:
            watch.adopt(vm.finish)

        if watch.is_stopped:
            raise HostError("the matrix was interrupted")
        console = Counter()
        result = run_boot_test(
            test, on_console=console.count, on_stdout=output.write, on_stderr=errors.write,
            on_phase=watch.on_phase, on_vm=adopt,
        )
    problems = (
        output.problem, errors.problem,
        _missing(result.console_log, console.bytes + result.lost_console_bytes),
    )
    return _result(run, result, folder, tuple(filter(None, problems)))


def boot_test(run: Run, folder: str) -> BootTest:
    """Return the boot test of ``run``, whose files come into ``folder``."""
    guest, order = run.guest, run.order
    return BootTest(
        name=run.name,
        machine=MachineConfig(
            kernel=guest.kernel, initrd=guest.initrd or None, append=guest.append,
            disks=guest.disks, memory=guest.memory, cpus=guest.cpus, agent=guest.agent,
        ),
        command=order.argv, env=dict(order.env), cwd=order.cwd, expect=order.expect,
        fail_on=order.fail_on, boot_timeout_s=order.boot_timeout_s, timeout_s=order.timeout_s,
        puts=order.puts,
        gets=tuple((source, os.path.join(folder, FILES, target)) for source, target in order.gets),
        console_log=os.path.join(folder, CONSOLE),
    )


class Counter:
    """Counts the bytes of a console."""

    def __init__(self) -> None:
        self.bytes = 0

    def count(self, data: bytes) -> None:
        """Count ``data``."""
        self.bytes += len(data)


class Log:
    """A file for one stream of a command.  A full disk ends the log, not the run."""

    def __init__(self, folder: str, name: str) -> None:
        self._path = Path(folder, name)
        self._file: BinaryIO | None = self._path.open("wb", buffering=0)
        self.problem = ""
        """The reason for bytes that are missing, "" if there are none."""

    def write(self, data: bytes) -> None:
        """Write ``data``, unless a write failed before."""
        view = memoryview(data)
        try:
            while self._file is not None and view:
                view = view[self._file.write(view) :]
        except OSError as error:
            self.problem = f"{self._path}: cannot be written: {error.strerror}"
            self.close()

    def close(self) -> None:
        """Close the file; idempotent."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def _missing(log: str, printed: int) -> str:
    """Return the problem if the file ``log`` has not all that was ``printed``; else ""."""
    try:
        size = os.stat(log).st_size
    except OSError as error:
        return f"{log}: {error.strerror}"
    if size >= printed:
        return ""
    return f"{log}: has {size} of {printed} bytes: the disk is full"


def _result(
    run: Run, test: BootResult, folder: str, problems: tuple[str, ...]
) -> RunResult:
    names = (CONSOLE, STDOUT, STDERR, *((FILES,) if run.order.gets else ()))
    return RunResult(
        name=run.name, verdict=test.verdict, exit_status=test.exit_status,
        message=test.message.removeprefix(f"{run.name}: "),
        line=shortened([test.line])[0], before=shortened(test.before), phases=test.phases,
        seconds=test.seconds, parts=tuple(_parts(test)), problems=problems, test=test,
        logs=(*(name for name in names if os.path.exists(os.path.join(folder, name))), RESULT),
    )


def _parts(test: BootResult) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the lines that explain a failure, the most telling first; each with a title."""
    if test.is_passed:
        return
    yield "the lines behind it", shortened(test.trace)
    yield "standard error", shortened(test.stderr_tail.splitlines())
    yield "standard output", shortened(test.stdout_tail.splitlines())
    if not test.line:
        yield "the last lines of the console", shortened(test.console_tail)
    yield "kernel log, warn and worse", shortened(test.warnings)
    yield "registers", shortened(test.registers)
    yield "also", shortened(test.problems)
