"""``pyvmm snapshot``: look into snapshots' directories, check them, merge a chain of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from pyvmm.cli.parse import parse_moved_disks
from pyvmm.cli.termination import sigterm_raises
from pyvmm.config import format_size
from pyvmm.report import say, show
from pyvmm.snapshot.files.check import problems
from pyvmm.snapshot.files.info import facts
from pyvmm.snapshot.files.merge import merge
from pyvmm.snapshot.files.saved import open_saved
from pyvmm.startup.commands import Command, Option, Word
from pyvmm.startup.options import parse_options

DAMAGED_STATUS = 125
_MIB = 1 << 20
_DIRECTORY = Word(name="directory", metavar="DIR", help="the snapshot")
_VERBOSE = Option(name="--verbose", short="-v", help="-vv: tracebacks of errors")

EPILOG = """\
A snapshot is a directory that pyvmm run --snapshot or a script has made; pyvmm restore goes on from
it.  docs/snapshot-format.md says what is in it.

examples:
  pyvmm snapshot info warm
  pyvmm snapshot check warm
  pyvmm snapshot merge tests-ready full
"""
CHECK_DESCRIPTION = """\
check reads all of a snapshot and of its bases, compares every CRC, and looks for the files under
the disks.  Each thing that is wrong has a line, and the exit status is then 125.
"""
MERGE_DESCRIPTION = """\
merge makes OUT, a full snapshot, of DIR and its bases, which it checks.  OUT stands for the same
machine, and may take the place of DIR: it has the same id.
"""

COMMAND = Command(
    name="snapshot",
    description="Look into snapshots of machines, check them, and merge them.",
    epilog=EPILOG,
    verbs=(
        Command(
            name="snapshot info",
            description="say what is in a snapshot",
            words=(_DIRECTORY,),
            options=(Option(name="--json", help="as a JSON object"), _VERBOSE),
        ),
        Command(
            name="snapshot check",
            description=CHECK_DESCRIPTION,
            words=(_DIRECTORY,),
            options=(
                Option(name="--disk", metavar="N=FILE", many=True,
                       help="disk N (0 is /dev/vda) has moved to FILE, of which only the size "
                       "can be compared; repeat for more"),
                _VERBOSE,
            ),
        ),
        Command(
            name="snapshot merge",
            description=MERGE_DESCRIPTION,
            words=(_DIRECTORY, Word(name="out", metavar="OUT", help="the snapshot to make")),
            options=(_VERBOSE,),
        ),
    ),
)


def snapshot_main(argv: list[str]) -> int:
    """Run one of the verbs; return its exit status."""
    args = parse_options(COMMAND, argv)
    with sigterm_raises():
        match args.verb:
            case "info":
                return _info(args)
            case "check":
                return _check(args)
            case _:
                return _merge(args)


def _info(args: SimpleNamespace) -> int:
    with open_saved(args.directory) as saved:
        found = facts(saved)
    if args.json:
        import json

        show(json.dumps(found))
        return 0
    for name, value in _rows(found):
        show(f"{name:<10}{value}")
    return 0


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the lines for a person, as names and values."""
    live = ", while the guest went on" if found["live"] else ""
    rows = [
        ("snapshot", found["path"]),
        ("id", found["id"]),
        ("made", f"{found['made']} by pyvmm {found['pyvmm']}{live}"),
        ("kernel", found["kernel"] or "none"),
    ]
    if found["version"]:
        rows.append(("version", found["version"]))
    rate = f", TSC {found['tsc_khz'] / 1000:.1f} MHz" if found["tsc_khz"] else ""
    rows += [
        ("cpus", f"{found['cpus']}, made for a host of {found['cpu_vendor']}{rate}"),
        ("memory", f"{format_size(found['memory_bytes'])}, of which this snapshot holds "
         f"{_mib(found['ram_bytes'])}"),
    ]
    for index, disk in enumerate(found["disks"]):
        size = format_size(disk["size_bytes"])
        what = "nothing written" if disk["overlay_bytes"] is None \
            else f"{_mib(disk['overlay_bytes'])} written"
        if disk["read_only"]:
            what = "read-only"
        rows.append((f"disk {index}", f"{disk['file']} ({size}), {what}"))
    rows += [("base", f"{base['path']} ({base['id']})") for base in found["bases"]]
    rows.append(("stored", f"{_mib(found['stored_bytes'])}, with all bases"))
    return rows


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / _MIB:.1f} MiB"


def _check(args: SimpleNamespace) -> int:
    disks = parse_moved_disks(args.disk)
    with open_saved(args.directory) as saved:
        found = list(problems(saved, disks, report=say))
        for problem in found:
            say(str(problem))
        if found:
            return DAMAGED_STATUS
        bases = len(saved.chain) - 1
        chain = f", its {bases} base{'s' * (bases > 1)}" if bases else ""
        disks_named = f"{len(saved.disks)} disk{'s' * (len(saved.disks) != 1)}"
        show(f"{saved.path}: whole: state, {_mib(saved.ram.held_bytes)} of RAM, {disks_named}"
             f"{chain}")
    return 0


def _merge(args: SimpleNamespace) -> int:
    with open_saved(args.directory) as saved:
        ram = merge(saved, args.out)
        count = len(saved.chain)
    show(f"{args.out}: {_mib(ram.held_bytes)} of RAM, merged of {count} "
         f"snapshot{'s' * (count > 1)}")
    return 0
