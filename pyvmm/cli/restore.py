"""``pyvmm restore``: a snapshot's directory -> a machine that goes on from there -> an exit status.
"""

from __future__ import annotations

import contextlib
import functools

from pyvmm.cli.running import (
    CONTROL_OPTIONS,
    STATUSES,
    VERBOSE_OPTION,
    Running,
    process_start_s,
    with_control,
)
from pyvmm.errors import ConfigError, PyvmmError
from pyvmm.startup.commands import Command, Option, Word
from pyvmm.startup.options import parse_options
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from types import SimpleNamespace

    from pyvmm.config import RunConfig
    from pyvmm.control.run_control import RunControl
    from pyvmm.machine import Machine
    from pyvmm.report import Reporter
    from pyvmm.snapshot.snapshot import Snapshot
    from pyvmm.startup.bundle import Bundle

CLOCKS = ("keep", "now")

EPILOG = f"""\
A restore never writes DIR: any number of them may go on from it at once.  The guest finds the disks
as they were, and what it writes is dropped at the end.  docs/snapshots.md has the whole story.

exit status:
{STATUSES}
keys, when standard input is a terminal: as in pyvmm run.

examples:
  pyvmm restore warm
  pyvmm restore warm --console log --timeout 60
  pyvmm restore warm --disk 0=/srv/images/root.img
"""

COMMAND = Command(
    name="restore",
    description="Go on from a snapshot, which pyvmm run --snapshot has made.",
    epilog=EPILOG,
    words=(Word(name="directory", metavar="DIR", help="the snapshot"),),
    options=(
        Option(name="--disk", metavar="N=FILE", many=True,
               help="disk N (0 is /dev/vda) of the snapshot has moved to FILE, which must be the "
               "same image: only its size can be compared; repeat for more"),
        Option(name="--clock", metavar="CLOCK", default="keep",
               help="keep: the guest's clock goes on from the snapshot's time; now: it shows the "
               "present time (default keep)"),
        Option(name="--console", metavar="WHERE", default="stdio",
               help="where the guest's console goes: stdio, none, or a file to write (default "
               "stdio)"),
        Option(name="--timeout", metavar="S",
               help="stop the guest S seconds after it went on, with exit status 124"),
        *CONTROL_OPTIONS,
        Option(name="--clones-fd", metavar="N",
               help="serve the owner of socket N, which is inherited: fork a clone for each of its "
               "messages (used by pyvmm.launch)"),
        VERBOSE_OPTION,
    ),
)


def restore_main(argv: list[str], bundle: Bundle) -> int:
    """Run one clone of a snapshot to its end; return the exit status of its outcome.

    Modules come from ``bundle`` until the guest runs.
    """
    started_s = process_start_s()
    args = parse_options(COMMAND, argv)
    if args.clones_fd is not None:
        return _serve_clones(args, bundle)
    return with_control(args, functools.partial(_restore, args, started_s, bundle, None))


def _restore(
    args: SimpleNamespace, started_s: float, bundle: Bundle, opened: Snapshot | None,
    control: RunControl | None,
) -> int:
    """Make and run the clone that ``args`` ask for, of ``opened`` if that is the snapshot."""
    from pyvmm.cli.parse import parse_console, parse_moved_disks, parse_seconds

    if args.clock not in CLOCKS:
        raise ConfigError(f"--clock {args.clock}", f"is none of {', '.join(CLOCKS)}")
    disks = parse_moved_disks(args.disk)
    console = parse_console(args.console)
    timeout_s = parse_seconds("--timeout", args.timeout) if args.timeout is not None else None
    running = Running(
        verbose=bool(args.verbose), timing=False, started_s=started_s, bundle=bundle,
        control=control, sets_clock=args.clock == "now",
    )
    configs: list[RunConfig] = []

    def make(report: Reporter) -> tuple[Machine, RunConfig]:
        from pyvmm.snapshot.opening import open_snapshot

        snapshot = opened or open_snapshot(args.directory, disks=disks, report=report)
        with contextlib.closing(snapshot):
            configs.append(snapshot.facts.config)
            machine = snapshot.clone(
                console=console, timeout_s=timeout_s, clock=args.clock, report=report
            )
            return machine, machine.config

    def tell(machine: Machine, report: Reporter) -> None:
        if args.verbose:
            report(f"{args.directory}: a clone of {machine.kernel.describe()}")

    try:
        return running.run(make, tell)
    except (OSError, PyvmmError) as error:
        from pyvmm.cli.descriptors import MANY_FILES, needed_descriptors
        from pyvmm.open_files import refuse_shortage

        needed = needed_descriptors(configs[0]) if configs else MANY_FILES
        refuse_shortage(error, needed, "this restore")
        raise


def _serve_clones(args: SimpleNamespace, bundle: Bundle) -> int:
    """Fork clones for the owner of the socket of ``args``, until it is closed; return 0.

    All that a clone needs is opened and imported once, here: a first clone is made and dropped.
    """
    import gc
    from socket import SOCK_SEQPACKET

    import pyvmm.cli.session
    import pyvmm.control.target  # noqa: F401 - for each clone's --control-fd
    from pyvmm.cli.errors_told import guarded
    from pyvmm.cli.fork_server import ForkServer
    from pyvmm.cli.parse import parse_moved_disks
    from pyvmm.control.run_control import owner_socket
    from pyvmm.report import say
    from pyvmm.snapshot.opening import open_snapshot

    with (
        contextlib.closing(
            owner_socket(args.clones_fd, option="--clones-fd", kind=SOCK_SEQPACKET)
        ) as owner,
        contextlib.closing(
            open_snapshot(args.directory, disks=parse_moved_disks(args.disk), report=say)
        ) as snapshot,
    ):
        snapshot.clone(report=say).close()
        bundle.update(bundle.left_out())
        bundle.__exit__()
        gc.freeze()  # a collection in a clone would copy the pages of all these objects

        def run(options: list[str]) -> int:
            words = [args.directory, *options]
            return guarded("restore", words, lambda: _run_clone(words, bundle, snapshot))

        ForkServer(owner, run).serve()
    return 0


def _run_clone(argv: list[str], bundle: Bundle, snapshot: Snapshot) -> int:
    started_s = process_start_s()
    args = parse_options(COMMAND, argv)
    opened = None if args.disk else snapshot
    return with_control(args, functools.partial(_restore, args, started_s, bundle, opened))
