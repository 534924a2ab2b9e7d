"""``pyvmm ps``: the machines that run on this host, found in /proc: there is no registry."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from pyvmm.cli import restore as restore_command
from pyvmm.cli import run as run_command
from pyvmm.config import format_size
from pyvmm.control.client import Client
from pyvmm.errors import PyvmmError
from pyvmm.numerals import size_in_bytes
from pyvmm.report import show
from pyvmm.startup.commands import Command, Option
from pyvmm.startup.options import parse_options
from pyvmm.x86 import layout

ASK_S = 2.0
"""Seconds that a machine may take to answer."""
MAX_WORDS = 5
"""``pyvmm`` is among the first words of a command line that starts it."""
COLUMNS = ("pid", "age", "memory", "kernel", "agent", "socket")
COMMAND = Command(
    name="ps",
    description="List the virtual machines of pyvmm run and pyvmm restore on this host.",
    epilog="""\
The agent's state is known of machines with --control whose socket may be used; "-" stands for
what is not known or not there.  Other users' machines are listed as far as /proc shows them.

examples:
  pyvmm ps
  pyvmm ps --json
""",
    options=(Option(name="--json", help="as a JSON array"),),
)


def ps_main(argv: list[str]) -> int:
    """List the running machines; return the exit status."""
    args = parse_options(COMMAND, argv)
    found = list(machines())
    if args.json:
        import json

        show(json.dumps(found))
        return 0
    rows = [COLUMNS, *(tuple(_cell(name, machine[name]) for name in COLUMNS) for machine in found)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(COLUMNS))]
    for row in rows:
        show("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def machines(proc: str = "/proc") -> Iterator[dict[str, Any]]:
    """Yield the facts of each machine, by process number."""
    for name in sorted(filter(str.isdecimal, os.listdir(proc)), key=int):
        with contextlib.suppress(OSError, PyvmmError, ValueError, SystemExit):
            folder = f"{proc}/{name}"
            command_line = _read(f"{folder}/cmdline")
            command, *words = machine_words(command_line.split(b"\0")[:-1]) or [""]
            if command == "run":
                yield _facts(int(name), folder, words)
            elif command == "restore":
                args = parse_options(restore_command.COMMAND, words)
                # One that forks clones has no machine itself; its clones have its command line.
                if args.clones_fd is None or _read(_parent(proc, folder)) == command_line:
                    yield _clone_facts(int(name), folder, args)


def machine_words(argv: Sequence[bytes]) -> list[str]:
    """Return ``run`` or ``restore`` and its options, of a process's command line; [] if none."""
    words = [os.fsdecode(word) for word in argv]
    is_python = bool(words) and os.path.basename(words[0]).startswith("python")
    for place, word in enumerate(words[: MAX_WORDS if is_python else 1]):
        if os.path.basename(word) == "pyvmm":
            found = words[place + 1 :]
            return found if found[:1] in (["run"], ["restore"]) else []
    return []


def _facts(pid: int, folder: str, words: list[str]) -> dict[str, Any]:
    args = parse_options(run_command.COMMAND, words)
    status = _ask(args, folder)
    return {
        "pid": pid,
        "uid": os.stat(folder).st_uid,
        "age": round(_age_s(folder), 1),
        "memory": size_in_bytes(args.memory, layout.MAX_MEMORY),
        "kernel": args.kernel,
        "agent": status.get("agent"),
        "paused": status.get("paused"),
        "socket": args.control,
    }


def _clone_facts(pid: int, folder: str, args: SimpleNamespace) -> dict[str, Any]:
    status = _ask(args, folder)
    directory = os.path.join(f"{folder}/cwd", args.directory)
    memory = None
    with contextlib.suppress(OSError):
        memory = os.stat(f"{directory}/ram").st_size
    return {
        "pid": pid,
        "uid": os.stat(folder).st_uid,
        "age": round(_age_s(folder), 1),
        "memory": memory,
        "kernel": f"clone of {args.directory}",
        "agent": status.get("agent"),
        "paused": status.get("paused"),
        "socket": args.control,
    }


def _parent(proc: str, folder: str) -> str:
    """Return the file with the command line of the parent of the process in ``folder``."""
    # proc(5): field 4, counted after the last ')'.
    return f"{proc}/{int(_read(f'{folder}/stat').rpartition(b')')[2].split()[1])}/cmdline"


def _ask(args: SimpleNamespace, folder: str) -> dict[str, Any]:
    """Return the status that the machine itself tells; {} if it does not."""
    if args.control is None:
        return {}
    # The name is relative to the other process's directory; /proc leads there.
    path = args.control if args.control.startswith("/") else f"{folder}/cwd/{args.control}"
    try:
        with Client.connect(path, timeout_s=ASK_S) as client:
            return client.call("status", timeout_s=ASK_S)
    except PyvmmError:
        return {}


def _age_s(folder: str) -> float:
    # proc(5): field 22, starttime in clock ticks; fields are counted after the last ')'.
    ticks = int(_read(f"{folder}/stat").rpartition(b")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "memory":
        return format_size(value)
    if name == "age":
        minutes, seconds = divmod(int(value), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
    return str(value)


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pieces = []
        while piece := os.read(fd, 1 << 20):
            pieces.append(piece)
        return b"".join(pieces)
    finally:
        os.close(fd)
