"""Run ``pyvmm run`` and note what it imports and opens while its guest runs.

    python -I strict_run.py ROOT REPORT [--no-files] OPTIONS...

ROOT is the checkout.  REPORT gets a line for each import, each file, socket or library opened and
each new module, from the guest's first instruction to the end of ``Machine.run``.  With --no-files
no descriptor is left once a vCPU looks whether all have halted.
"""

from __future__ import annotations

import resource
import sys
import threading
from unittest import mock

ROOT, REPORT, *OPTIONS = sys.argv[1:]
sys.path.insert(0, ROOT)

import pyvmm.machine  # noqa: E402
from pyvmm.cli.main import main  # noqa: E402
from pyvmm.run.outcome import Outcome  # noqa: E402
from pyvmm.run.vcpu_loop import VcpuLoop  # noqa: E402

WATCHED = ("import", "open", "socket.__new__", "ctypes.dlopen", "subprocess.Popen")


class Recorder:
    """Takes audit events while it is on."""

    def __init__(self) -> None:
        self.is_on = False
        self.lines: list[str] = []
        self._before: set[str] = set()

    def hear(self, event: str, arguments: tuple[object, ...]) -> None:
        """For sys.addaudithook."""
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
            recorder.end()

    mock.patch.object(VcpuLoop, "run", watched_vcpu).start()
    if "--no-files" in OPTIONS:
        mock.patch.object(VcpuLoop, "_finish_if_halted", look_without_files).start()
    mock.patch.object(pyvmm.machine.Machine, "run", watched_machine).start()
    with open(REPORT, "w") as report:  # noqa: PTH123  # now: there may be no descriptor later
        status = main(["run", *(option for option in OPTIONS if option != "--no-files")])
        report.write("".join(f"{line}\n" for line in [*recorder.lines, f"status {status}"]))
    return status


sys.exit(run())
