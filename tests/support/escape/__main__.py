"""See the package: ``python -m tests.support.escape REPORT MODE COMMAND...``."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from pyvmm.cli.main import main as run_pyvmm
from pyvmm.jail import seccomp
from pyvmm.jail.bpf import OWN_PID
from pyvmm.jail.syscalls import NAMES
from pyvmm.jail.table import ALL
from pyvmm.kvm import handles
from tests.support.escape.attempts import X32, Attempt, Buffers, Machine, attempts
from tests.support.escape.shared import (
    BEGUN,
    EXITED,
    FAILED,
    HUNG,
    RETURNED,
    SIGNALLED,
    UNTRIED,
    Results,
)
from tests.support.patience import patient
from tests.support.table_words import in_words, said

UNFILTERED = "none"
KINDS = (UNFILTERED, *ALL)
NUMBERS = (*range(480), 512, 547, X32, X32 | 39)
"""Every system call of Linux 6.18, the gaps, and the x32 ABI's."""
COLUMNS = 512
HANGS_S = 10.0
MINUS_ONE = (-1,) * 6


class Escape:
    """Makes attempts in every thread that takes a filter; ``results`` has a row for each kind."""

    def __init__(self, mode: str, results: Results) -> None:
        self._mode, _, rest = mode.partition(":")
        self._kind, _, self._attempt = rest.partition(":")
        self._results = results
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._buffers = Buffers()
        self._enter = seccomp.load
        self._machine = Machine()
        self._limit_s = patient(HANGS_S)  # it looks at the host, which the jail forbids
        seccomp.load = self.enter
        self._watch(handles.Vm, "vm")
        self._watch(handles.Vcpu, "vcpu")

    def _watch(self, handle: type[handles.Vm | handles.Vcpu], field: str) -> None:
        """Keep the descriptor of each new ``handle`` in mind."""
        init = handle.__init__

        def note(made: Any, fd: int, *rest: Any, **more: Any) -> None:
            self._machine = self._machine._replace(**{field: fd})
            init(made, fd, *rest, **more)

        setattr(handle, "__init__", note)  # noqa: B010 - mypy takes no other type for it

    def enter(self, kind: str) -> None:
        """Stand in for ``seccomp.load``."""
        found = self.attempts()
        if self._mode != "real":
            if self._kind in ("", kind):
                self._try_each(kind, found)
            elif self._kind == UNFILTERED:
                self._kind = "tried"
                self._try_each(UNFILTERED, found)
        self._enter(kind)
        if self._mode == "real" and kind == self._kind:
            (chosen,) = (one for one in found if one.name == self._attempt)
            self._make(KINDS.index(kind), found.index(chosen), chosen)

    def attempts(self) -> list[Attempt]:
        """Return what is tried; a result's column is the attempt's place."""
        if self._mode == "numbers":
            return [Attempt(str(number), number, MINUS_ONE) for number in NUMBERS]
        return attempts(self._buffers, self._machine)

    def _try_each(self, kind: str, found: list[Attempt]) -> None:
        """Make all of ``found``, each child as many as it survives."""
        row = KINDS.index(kind)
        for column, one in enumerate(found):
            arguments = (one.arguments + (0,) * 6)[:6]
            self._results.expect(row, column, said(kind, NAMES.get(one.number, ""), arguments))
        for column in range(len(found)):
            if self._results.state(row, column) == UNTRIED:
                pid = os.fork()
                if not pid:
                    self._in_child(kind, row, found, column)
                self._end_of(pid, row, found, column)

    def _in_child(self, kind: str, row: int, found: list[Attempt], first: int) -> None:
        pid = os.getpid()
        try:
            if kind != UNFILTERED:
                self._enter(kind)
            else:
                os.close(1)  # else the limit of open files would be what refuses
            # Without a filter an attempt may succeed, and spoil the next one: one each.
            last = first + 1 if kind == UNFILTERED else len(found)
            for column in range(first, last):
                self._make(row, column, found[column])
                if os.getpid() != pid:
                    os._exit(0)  # an attempt was to fork
        except BaseException:
            traceback.print_exc()
        os._exit(0)

    def _make(self, row: int, column: int, attempt: Attempt) -> None:
        arguments = [
            ctypes.c_long(os.getpid() if argument == OWN_PID else argument)
            for argument in attempt.arguments
        ]
        self._results.set(row, column, BEGUN)
        ctypes.set_errno(0)
        failed = self._libc.syscall(ctypes.c_long(attempt.number), *arguments) == -1
        number = ctypes.get_errno()
        self._results.set(row, column, FAILED if failed and number else RETURNED, number)

    def _end_of(self, pid: int, row: int, found: list[Attempt], first: int) -> None:
        """Wait for the child ``pid``; an attempt that it did not survive is what ended it."""
        until_s = time.monotonic() + self._limit_s
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > until_s:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                break
            time.sleep(0.0005)
        for column in range(first, len(found)):
            if self._results.state(row, column) == BEGUN:
                if not ended[0]:
                    self._results.set(row, column, HUNG)
                elif os.WIFSIGNALED(ended[1]):
                    self._results.set(row, column, SIGNALLED, os.WTERMSIG(ended[1]))
                else:
                    self._results.set(row, column, EXITED, os.WEXITSTATUS(ended[1]))


def run(report: str, mode: str, command: list[str]) -> int:
    """Run pyvmm in a child process, which gets our SIGTERM, and write REPORT; return 0."""
    results = Results(len(KINDS), COLUMNS)
    pid = os.fork()
    if not pid:
        status = 70
        try:
            Escape(mode, results)
            status = run_pyvmm(command)
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGTERM))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if mode.startswith("numbers"):
        names = [str(number) for number in NUMBERS]
    else:
        names = [one.name for one in attempts(Buffers(), Machine())]
    found = {
        kind: {
            name: [text, in_words(results.expected(row, column))]
            for column, name in enumerate(names) if (text := results.text(row, column))
        }
        for row, kind in enumerate(KINDS)
    }
    content = {"status": status, "kinds": {kind: one for kind, one in found.items() if one}}
    Path(report).write_text(json.dumps(content))
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2], sys.argv[3:]))
