"""``pyvmm lab``: run a command on an emulated Linux host whose KVM is complete."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace

from pyvmm.cli.descriptors import MANY_FILES, open_standard_descriptors
from pyvmm.cli.parse import parse_memory, parse_seconds
from pyvmm.errors import ConfigError, PyvmmError
from pyvmm.lab import (
    MAX_CPUS,
    MAX_MEMORY_BYTES,
    MIN_MEMORY_BYTES,
    CommandError,
    LabConfig,
    default_writable,
    run,
)
from pyvmm.numerals import shown, whole_number
from pyvmm.open_files import shortage
from pyvmm.report import say
from pyvmm.startup.commands import Command, Option, Word
from pyvmm.startup.options import parse_options
from pyvmm.storage.raw import RawBackend

LAB_FAILED_STATUS = 125

DESCRIPTION = """\
Run CMD on a Linux host that has a genuine, complete /dev/kvm (kvm_amd), for machines that have
none.  The host is emulated by QEMU, in software: it is slow, and correct.  It is up in about two
seconds and is thrown away when CMD ends.

CMD finds your files, environment and working directory as they are here.  What it writes in the
git checkout around the working directory (outside a checkout: in the working directory; with
--rw: in each DIR instead) stays; everything else it writes, disk images included, is dropped.
There is no network.  Locks on files do not reach out of it: see --lock.
"""

EPILOG = """\
exit status:
  CMD's own; 124 timeout; 125 the lab itself failed; 126 CMD is not executable; 127 not found;
  128+n stopped by signal n

Ctrl-C interrupts CMD, a second Ctrl-C kills the lab.  When input and output are a terminal, CMD
has a terminal too, Ctrl-C is a key like any other, and Ctrl-] three times kills the lab.
Inside the lab the environment variable PYVMM_LAB is 1.

It needs the packages qemu-system-x86 and busybox-static.  The first use downloads Debian's kernel
(about 70 MB) into ~/.cache/pyvmm (PYVMM_CACHE says where else); nothing is installed.

examples:
  pyvmm lab -- pyvmm doctor
  pyvmm lab --timeout 600 -- python3 -m pytest -q
  pyvmm lab -- bash
"""


COMMAND = Command(
    name="lab",
    usage="pyvmm lab [OPTIONS] -- CMD...",
    description=DESCRIPTION,
    epilog=EPILOG,
    options=(
        Option(name="--cpus", metavar="N", default="1",
               help="processors of the emulated host (default 1; more are slower unless CMD "
               "needs them)"),
        Option(name="--memory", metavar="SIZE", default="2G",
               help="its memory, as 512M or 4G (default 2G)"),
        Option(name="--timeout", metavar="S",
               help="end CMD S seconds after it started, with exit status 124"),
        Option(name="--rw", metavar="DIR", many=True,
               help="a directory whose changes are kept; repeat for several "
               "(default: the git checkout, else the working directory)"),
        Option(name="--lock", metavar="FILE", many=True,
               help="hold the lock of disk image FILE on this host while CMD runs: locks taken "
               "inside the lab are not seen outside; repeat for several"),
        Option(name="--verbose", short="-v",
               help="show the lab's own console on standard error; -vv: tracebacks of errors"),
    ),
    words=(
        Word(name="command", metavar="CMD", takes_rest=True, help="the command and its arguments"),
    ),
)


def config_from(args: SimpleNamespace) -> LabConfig:
    """Return the validated LabConfig of the parsed options; ConfigError names the option."""
    try:
        cwd = Path.cwd()
    except FileNotFoundError as error:
        raise ConfigError("working directory", "does not exist any more") from error
    writable = tuple(Path(text) for text in args.rw) if args.rw else default_writable(cwd)
    # Parents first, so that a mount does not hide one inside it.
    resolved = sorted({path.resolve() for path in writable})
    return LabConfig(
        command=tuple(args.command),
        cwd=cwd,
        environment=dict(os.environb),
        writable=tuple(resolved),
        cpus=_cpus(args.cpus),
        memory_bytes=parse_memory("--memory", args.memory, MIN_MEMORY_BYTES, MAX_MEMORY_BYTES),
        timeout_s=parse_seconds("--timeout", args.timeout) if args.timeout is not None else None,
        verbose=args.verbose > 0,
    )


def _cpus(text: str) -> int:
    count = whole_number(text, 1, MAX_CPUS)
    if count is None:
        raise ConfigError(f"--cpus {shown(text)}", f"must be a number from 1 to {MAX_CPUS}")
    return count


def lab_main(argv: list[str]) -> int:
    """Run one command in the lab; return its exit status, or 125 if the lab failed."""
    open_standard_descriptors()
    tracebacks = False
    try:
        args = parse_options(COMMAND, argv)
        tracebacks = args.verbose > 1
        config = config_from(args)
        with contextlib.ExitStack() as locks:
            for image in args.lock:
                locks.enter_context(contextlib.closing(RawBackend(image, report=_say)))
            return run(config, _say)
    except PyvmmError as error:
        if tracebacks:
            raise
        say(str(shortage(error, MANY_FILES, "pyvmm lab") or error))
        return error.exit_status if isinstance(error, CommandError) else LAB_FAILED_STATUS
    except KeyboardInterrupt:
        return 128 + 2


def _say(line: str) -> None:
    # The terminal may be raw: the carriage return keeps lines at the left edge.
    say(f"lab: {line}", end="\r\n" if os.isatty(2) else "\n")
