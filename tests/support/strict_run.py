"""Run ``pyvmm run``, or ``restore``, and note what it imports and opens while its guest runs.

    python -I strict_run.py ROOT REPORT [--no-files] [restore DIR] OPTIONS...

ROOT is the checkout.  REPORT, the number of a pipe, gets a line for each import, each file, socket
or library opened and each new module, from the guest's first instruction to the end of
``Machine.run``.  With --no-files no descriptor is left once a vCPU looks whether all have halted.

A machine that is saved imports modules whose code is in memory, and makes sockets of descriptors.
With --control or --snapshot these do not count, and the notes end with the last run.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
from typing import Any
from unittest import mock

ROOT, REPORT, *OPTIONS = sys.argv[1:]
sys.path.insert(0, ROOT)

import pyvmm.machine  # noqa: E402
from pyvmm.cli import jailed, running  # noqa: E402
from pyvmm.cli.main import main  # noqa: E402
from pyvmm.run.outcome import Outcome  # noqa: E402
from pyvmm.run.vcpu_loop import VcpuLoop  # noqa: E402

FILES = (
    "open", "ctypes.dlopen", "subprocess.Popen", "os.listdir", "os.scandir", "os.mkdir",
    "os.rename", "os.remove", "os.rmdir",
)
SAVES = any(option.startswith(("--control", "--snapshot")) for option in OPTIONS)
WATCHED = FILES if SAVES else (*FILES, "import", "socket.__new__")


class Recorder:
    """Takes audit events while it is on."""

    def __init__(self) -> None:
        self.is_on = False
        self.lines: list[str] = []
        self._before: set[str] = set()

    def hear(self, event: str, arguments: tuple[object, ...]) -> None:
        """For sys.addaudithook."""
        if event == "ctypes.dlopen" and arguments[0] is None:
            return  # the C library, which is loaded
        if self.is_on and event in WATCHED:
            self.lines.append(f"{threading.current_thread().name}: {event} {arguments[:1]}")

    def begin(self) -> None:
        """The guest is about to run."""
        if not self.is_on:
            self._before = set(sys.modules)
            self.is_on = True

    def end(self) -> None:
        """The run is over."""
        self.is_on = False
        if not SAVES:
            self.lines += [f"module {name}" for name in sorted(set(sys.modules) - self._before)]


def run() -> int:
    """Return pyvmm's exit status."""
    recorder = Recorder()
    sys.addaudithook(recorder.hear)
    run_vcpu, look, run_machine = (
        VcpuLoop.run, VcpuLoop._finish_if_halted, pyvmm.machine.Machine.run
    )

    def watched_vcpu(loop: VcpuLoop) -> None:
        recorder.begin()
        run_vcpu(loop)

    def look_without_files(loop: VcpuLoop) -> None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, most))
        look(loop)

    def watched_machine(machine: pyvmm.machine.Machine) -> Outcome:
        try:
            return run_machine(machine)
        finally:
            if not SAVES:
                recorder.end()

    def watched_lines(*arguments: Any) -> list[str]:
        recorder.end()
        return tell(*arguments)

    mock.patch.object(VcpuLoop, "run", watched_vcpu).start()
    if "--no-files" in OPTIONS:
        mock.patch.object(VcpuLoop, "_finish_if_halted", look_without_files).start()
    mock.patch.object(pyvmm.machine.Machine, "run", watched_machine).start()
    tell = running.Running._lines  # its run is over
    mock.patch.object(running.Running, "_lines", watched_lines).start()
    words = [option for option in OPTIONS if option != "--no-files"]
    if words[0] != "restore":
        words.insert(0, "run")
    report = int(REPORT)  # open already: there may be no descriptor later, nor a right to it
    mock.patch(
        "pyvmm.cli.running.descriptors_of",
        lambda machine: jailed.descriptors_of(machine) | {report: "the test's report"},
    ).start()
    status = main(words)
    lines = [*recorder.lines, f"status {status}"]
    os.write(report, "".join(f"{line}\n" for line in lines).encode())
    return status


sys.exit(run())
