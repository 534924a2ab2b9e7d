"""``pyvmm``: find the subcommand, load only its code, turn errors into one line and status 125."""

from __future__ import annotations

import gc
import os
import sys

import pyvmm
from pyvmm.cli.descriptors import open_standard_descriptors
from pyvmm.errors import PyvmmError

HOST_ERROR_STATUS = 125
_SIGINT, _SIGPIPE = 2, 13  # what `signal` calls so; most of what it imports can come later, faster

USAGE = """\
usage: pyvmm COMMAND [OPTIONS]

pyvmm is a KVM hypervisor in pure Python: it boots Linux from a disk image.

commands:
  run      boot a kernel:  pyvmm run --kernel bzImage --disk root.img
  export   serve a disk to another VMM:  pyvmm export --disk root.img --socket S
  doctor   say, line by line, what this host's KVM can do, and how to mend what it cannot
  kernel   say whether a kernel file can boot here, or fetch Debian's:  pyvmm kernel inspect FILE
  lab      run a command on an emulated host whose KVM is complete:  pyvmm lab -- CMD...

  pyvmm COMMAND --help    the options of a command
  pyvmm --version         the version
"""


def main(argv: list[str] | None = None) -> int:
    """Run ``pyvmm`` with ``argv`` (default: the process's); the exit status."""
    args = sys.argv[1:] if argv is None else argv
    open_standard_descriptors()
    command = args[0] if args else ""
    rest = args[1:]
    try:
        match command:
            case "run":
                # What is made until the guest runs lives as long as the process: to look for
                # garbage in it takes 1 ms of 20.  run_main switches it on again.
                gc.disable()
                from pyvmm.cli.bundle import Bundle, default_path

                with Bundle(default_path()) as bundle:
                    from pyvmm.cli.run import run_main

                    return run_main(rest, bundle)
            case "export":
                from pyvmm.cli.export import export_main

                return export_main(rest)
            case "doctor":
                from pyvmm.cli.doctor import doctor_main

                return doctor_main(rest)
            case "kernel":
                from pyvmm.cli.kernel import kernel_main

                return kernel_main(rest)
            case "lab":
                from pyvmm.cli.lab import lab_main

                return lab_main(rest)
            case "--version" | "-V":
                print(f"pyvmm {pyvmm.__version__}")
                return 0
            case "--help" | "-h" | "help":
                print(USAGE, end="")
                return 0
            case "":
                print(USAGE, end="", file=sys.stderr)
                return HOST_ERROR_STATUS
            case _:
                print(
                    f"pyvmm: {command}: no such command; there are run, export, doctor, kernel "
                    "and lab (pyvmm --help)",
                    file=sys.stderr,
                )
                return HOST_ERROR_STATUS
    except PyvmmError as error:
        _show_traceback(rest)
        _say(str(error))
        return HOST_ERROR_STATUS
    except (OSError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError):
            # The reader of our output has gone; there is nobody left to tell.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 128 + _SIGPIPE
        _show_traceback(rest)
        # Nothing of the guest's or the user's: no descriptors, threads or room left on this host.
        _say(f"this host: {error}")
        return HOST_ERROR_STATUS
    except KeyboardInterrupt:
        return 128 + _SIGINT
    finally:
        gc.enable()


def _show_traceback(args: list[str]) -> None:
    """Where the error under way comes from, if -vv asks for it."""
    if "-vv" in args or args.count("-v") + args.count("--verbose") > 1:
        import contextlib
        import traceback

        with contextlib.suppress(OSError, ValueError):
            traceback.print_exc()


def _say(line: str) -> None:
    """One line on standard error, if there is one."""
    import contextlib

    with contextlib.suppress(OSError, ValueError):
        print(f"pyvmm: {line}", file=sys.stderr, flush=True)
