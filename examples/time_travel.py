"""Boot Linux, have it panic, and go back to just before: look at it there, and go on.

    python -m examples.time_travel [KERNEL [IMAGE]]
    pyvmm lab -- python -m examples.time_travel        if this host's KVM cannot run Linux

KERNEL is build/bzImage and IMAGE build/root.img if not given; IMAGE is never written.  A checkpoint
is taken every 100 ms, also while the kernel panics.
"""

from __future__ import annotations

import sys
import threading
import time

import pyvmm

EVERY_S = 0.1
PANIC = "echo c >/proc/sysrq-trigger"


class Recorder:
    """Takes a checkpoint of a running ``machine`` every EVERY_S, in a thread, until ``stop``."""

    def __init__(self, machine: pyvmm.Machine) -> None:
        self._machine = machine
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.before_panic = 0
        """The newest checkpoint at which the guest had not panicked."""
        self.pauses_s: list[float] = []

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._is_done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_done.wait(EVERY_S):
            began_s = time.monotonic()
            try:
                number = self._machine.checkpoint()
            except (pyvmm.SnapshotError, RuntimeError):
                return  # the run is over, or the machine was closed
            self.pauses_s.append(time.monotonic() - began_s)
            if not self._machine.evidence.has_panicked:
                self.before_panic = number


def main(kernel: str = "build/bzImage", image: str = "build/root.img") -> int:
    """Return 0 if the guest that went back powered off in good order."""
    config = pyvmm.MachineConfig(
        kernel=kernel, disks=[pyvmm.Overlay(image)], append="quiet pyvmm.shell", timeout_s=600
    )
    with pyvmm.Machine(config) as machine:
        recorder = Recorder(machine)
        machine.start()
        recorder.start()
        machine.console.expect("# ", timeout_s=600)
        machine.console.write(f"echo note >/note; {PANIC}\n")
        outcome = machine.wait()
        recorder.stop()
        print(f"{len(recorder.pauses_s)} checkpoints; then: {outcome}")

        machine.rewind(recorder.before_panic)
        rip = machine.vcpus[0].registers.rip
        print(f"back at checkpoint {recorder.before_panic}, paused at rip {rip:#x}")
        print(f"the guest has panicked: {machine.evidence.has_panicked}")

        first = machine.checkpoints[0]
        machine.rewind(first)
        print(f"back at the first checkpoint, number {first}, and on: it boots once more")
        machine.resume()
        machine.console.expect("# ", timeout_s=600)
        machine.console.write("cat /note; poweroff -f\n")
        machine.console.expect("No such file", timeout_s=60)
        print("the note was never written")
        ended = machine.wait()
        print(ended)
        return 0 if ended is not None and ended.exit_status == 0 else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
