"""``pyvmm``: find the subcommand, load only its code, and have its errors told."""

from __future__ import annotations

import gc
import os

import pyvmm
from pyvmm.cli.descriptors import open_standard_descriptors
from pyvmm.cli.errors_told import HOST_ERROR_STATUS, complain, guarded, say_error

COMMANDS = (
    "run", "restore", "snapshot", "test", "matrix", "ps", "ctl", "export", "doctor", "kernel",
    "image", "lab",
)
USAGE = """\
usage: pyvmm COMMAND [OPTIONS]

pyvmm is a KVM hypervisor in pure Python: it boots Linux from a disk image.

commands:
  run      boot a kernel:  pyvmm run --kernel build/bzImage --disk build/root.img
  restore  go on from a machine that was saved:  pyvmm restore DIR
  snapshot look into saved machines, check them, merge them:  pyvmm snapshot info DIR
  test     boot, run one command in the guest and exit with its status:
           pyvmm test --kernel K --disk D -- CMD...
  matrix   many such tests from one file, several at a time:  pyvmm matrix boot.toml
  ps       list the machines that run
  ctl      drive a machine that runs with --control:  pyvmm ctl SOCKET run -- CMD...
  export   serve a disk to another VMM:  pyvmm export --disk build/root.img --socket S
  doctor   say, line by line, what this host's KVM can do, and how to mend what it cannot
  kernel   look into a kernel file, fetch a distribution's, or build one:  pyvmm kernel fetch debian
  image    build a disk image:  pyvmm image build --busybox root.img
  lab      run a command on an emulated host whose KVM is complete:  pyvmm lab -- CMD...

  pyvmm COMMAND --help    the options of a command
  pyvmm --version         the version
"""


class SignalsAsTheyAre:
    """The context of a command that starts other programs and may have to clean up after an
    interrupt.  This one leaves signals as the caller has them."""

    def __enter__(self) -> None:
        """Change nothing."""

    def __exit__(self, *_exc: object) -> None:
        """Restore nothing."""


_AS_THEY_ARE = SignalsAsTheyAre()


def main(args: list[str], *, signals: SignalsAsTheyAre = _AS_THEY_ARE) -> int:
    """Run ``pyvmm`` with ``args``; return the exit status."""
    open_standard_descriptors()
    command = args[0] if args else ""
    return guarded(command, args[1:], lambda: _run_command(command, args, signals))


def _run_command(command: str, args: list[str], signals: SignalsAsTheyAre) -> int:
    """Run ``command``, the first word of ``args``, and return the exit status."""
    rest = args[1:]
    match command:
        case "run":
            # Objects made until the guest runs live as long as the process: looking for
            # garbage among them takes 1 ms of 20.  run_main enables the collector again.
            gc.disable()
            from pyvmm.startup.bundle import Bundle, default_path

            with Bundle(default_path()) as bundle:
                from pyvmm.cli.run import run_main

                return run_main(rest, bundle)
        case "restore":
            gc.disable()  # as for a run
            from pyvmm.startup.bundle import Bundle, default_path

            with Bundle(default_path("restore")) as bundle:
                from pyvmm.cli.restore import restore_main

                return restore_main(rest, bundle)
        case "export":
            from pyvmm.cli.export import export_main

            return export_main(rest)
        case "doctor":
            from pyvmm.cli.doctor import doctor_main

            return doctor_main(rest)
        case "kernel":
            from pyvmm.cli.kernel import kernel_main

            with signals:
                return kernel_main(rest)
        case "image":
            from pyvmm.cli.image import image_main

            with signals:
                return image_main(rest)
        case "lab":
            from pyvmm.cli.lab import lab_main

            with signals:
                return lab_main(rest)
        case "snapshot":
            from pyvmm.cli.snapshot import snapshot_main

            with signals:
                return snapshot_main(rest)
        case "ps":
            from pyvmm.cli.ps import ps_main

            return ps_main(rest)
        case "ctl":
            from pyvmm.cli.ctl import ctl_main

            with signals:
                return ctl_main(rest)
        case "test":
            from pyvmm.cli.test import boot_test_main

            with signals:
                return boot_test_main(rest)
        case "matrix":
            from pyvmm.cli.matrix import matrix_main

            with signals:
                return matrix_main(rest)
        case "--version" | "-V":
            from pyvmm.report import show

            show(f"pyvmm {pyvmm.__version__}")
            return 0
        case "--help" | "-h" | "help":
            from pyvmm.report import show

            for line in USAGE.splitlines():
                show(line)
            return 0
        case "":
            complain(*USAGE.splitlines())
            return HOST_ERROR_STATUS
        case _:
            say_error(_no_such_command(args))
            return HOST_ERROR_STATUS


def _no_such_command(args: list[str]) -> str:
    """Return the complaint about ``args``, whose first word names no command."""
    from pyvmm.startup.mistakes import did_you_mean, nearest

    word = args[0]
    if meant := nearest(f"--{word.lstrip('-')}", ("--version", "--help")):
        return f"{word}: is unknown; did you mean pyvmm {meant[0]}? (pyvmm --help)"
    if word.startswith("-"):
        hint = "; options come behind the command, as in pyvmm run --kernel FILE"
    elif os.path.isfile(word):
        hint = "; a kernel is booted by pyvmm run --kernel FILE"
    else:
        hint = did_you_mean(word, COMMANDS)
    return f"{word}: no such command; there are {', '.join(COMMANDS)}{hint} (pyvmm --help)"
