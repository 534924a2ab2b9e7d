"""``pyvmm ctl SOCKET snapshot``, ``checkpoint`` and ``rewind``."""

from __future__ import annotations

import os
from types import SimpleNamespace

from pyvmm.control.client import Client, ControlError
from pyvmm.errors import ConfigError, SnapshotError
from pyvmm.numerals import shown, whole_number
from pyvmm.report import show
from pyvmm.startup.commands import Command, Option, Word

_VERBOSE = Option(name="--verbose", short="-v", help="-vv: tracebacks of errors")
_MAX_NUMBER = (1 << 53) - 1

COMMANDS = (
    Command(
        name="ctl SOCKET snapshot", description="save the machine, which goes on",
        options=(
            Option(name="--live", help="let the guest go on while its memory is written"),
            Option(name="--diff", help="save only what differs from the clone's snapshot"),
            _VERBOSE,
        ),
        words=(Word(name="dir", metavar="DIR", help="a directory that is not there yet"),),
    ),
    Command(name="ctl SOCKET checkpoint", description="take a checkpoint in memory",
            options=(_VERBOSE,)),
    Command(
        name="ctl SOCKET rewind", description="go back to a checkpoint or a snapshot",
        usage="pyvmm ctl SOCKET rewind [N]", options=(_VERBOSE,),
        words=(Word(name="number", metavar="N", takes_rest=True,
                    help="which checkpoint (default: the newest there is)"),),
    ),
)


def check_snapshot(args: SimpleNamespace) -> None:
    """Make the directory absolute: the machine's process may be elsewhere; SnapshotError."""
    if not args.dir:
        raise SnapshotError("snapshot ''", "names no directory")
    args.dir = os.path.abspath(args.dir)


def check_rewind(args: SimpleNamespace) -> None:
    """Raise ConfigError for what is no number of a checkpoint."""
    text = " ".join(args.number)
    args.number = whole_number(text, 0, _MAX_NUMBER) if text else None
    if text and args.number is None:
        raise ConfigError(f"rewind {shown(text)}", "is no number of a checkpoint")


def snapshot(client: Client, args: SimpleNamespace) -> int:
    """Save the machine."""
    _call(client, "snapshot", {"dir": args.dir, "live": bool(args.live), "diff": bool(args.diff)})
    return 0


def checkpoint(client: Client, _args: SimpleNamespace) -> int:
    """Take a checkpoint and show its number."""
    show(str(_call(client, "checkpoint", {})["number"]))
    return 0


def rewind(client: Client, args: SimpleNamespace) -> int:
    """Go back."""
    _call(client, "rewind", {"number": args.number})
    return 0


def _call(client: Client, method: str, params: dict[str, object]) -> dict[str, object]:
    """Call a method; SnapshotError as the machine's process had it."""
    try:
        return client.call(method, params)
    except ControlError as error:
        if error.kind == "snapshot" and error.details:
            raise SnapshotError(
                str(error.details["subject"]), str(error.details["problem"])
            ) from error
        raise
