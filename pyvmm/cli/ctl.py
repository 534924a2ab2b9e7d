"""``pyvmm ctl SOCKET``: drive a machine that was started with ``pyvmm run --control SOCKET``."""

from __future__ import annotations

import base64
import os
import queue
from collections.abc import Callable, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

from pyvmm.cli import ctl_agent, ctl_snapshot
from pyvmm.cli.parse import parse_seconds, parse_size
from pyvmm.config import format_size
from pyvmm.control.client import Client
from pyvmm.errors import ConfigError
from pyvmm.numerals import shown, whole_number
from pyvmm.report import say, show
from pyvmm.startup.commands import HELP, Command, Option, Word
from pyvmm.startup.options import parse_options
from pyvmm.testing.passed_on import PassedOn

TIMEOUT_STATUS = 124
MAX_READ_BYTES = 512 << 10
MAX_TYPED_CHARACTERS = 128 << 10
_REGISTERS_A_LINE = 4
_BYTES_A_LINE = 16

EPILOG = """\
Words behind run's -- are CMD's.  Its input, output and errors are passed on as they come; what
goes to a terminal is made harmless first.  Ctrl-C interrupts CMD, a second Ctrl-C kills it.

exit status:
  run    CMD's own; 128+n killed by signal n; 124 over --timeout; 126 CMD is not executable;
         127 not found
  wait   that of pyvmm run: 0 for a guest that ended well, 121 after a panic, ...
  125    the machine cannot be reached, or refuses; 124 wait or pause took longer than --timeout

examples:
  pyvmm run --kernel build/bzImage --disk build/root.img --control vm.sock
  pyvmm ctl vm.sock status
  pyvmm ctl vm.sock run -- dmesg
  pyvmm ctl vm.sock run --env LANG=C --cwd /tmp -- sh -c 'echo $LANG; cat' < file
  pyvmm ctl vm.sock put module.ko /tmp/
  pyvmm ctl vm.sock get /var/log .
  pyvmm ctl vm.sock type 'echo hello'
  pyvmm ctl vm.sock snapshot booted && pyvmm restore booted
"""

_VERBOSE = Option(name="--verbose", short="-v", help="-vv: tracebacks of errors")
_TIMEOUT = Option(name="--timeout", metavar="S", help="wait at most S seconds")
COMMAND = Command(
    name="ctl SOCKET",
    description="Drive a machine that was started with pyvmm run --control SOCKET.",
    epilog=EPILOG,
    verbs=(
        Command(name="ctl SOCKET status", description="say how the machine is", options=(
            Option(name="--json", help="as one JSON object"), _VERBOSE,
        )),
        Command(name="ctl SOCKET pause", description="pause the guest",
                options=(_TIMEOUT, _VERBOSE)),
        Command(name="ctl SOCKET resume", description="let a paused guest go on",
                options=(_VERBOSE,)),
        Command(name="ctl SOCKET stop", description="end the machine at once",
                options=(_VERBOSE,)),
        Command(name="ctl SOCKET wait", description="wait for the machine's end and say how it "
                "was", options=(_TIMEOUT, _VERBOSE)),
        Command(name="ctl SOCKET console", description="show the console's last bytes", options=(
            Option(name="--follow", short="-f", help="go on with what the guest prints"),
            _VERBOSE,
        )),
        Command(name="ctl SOCKET type", description="type a text and Enter at the console",
                options=(Option(name="--no-enter", short="-n", help="type no Enter behind it"),
                         _VERBOSE),
                words=(Word(name="text", metavar="TEXT", help="the text"),)),
        Command(
            name="ctl SOCKET run", description="run a command in the guest",
            usage="pyvmm ctl SOCKET run [OPTIONS] -- CMD...",
            options=(
                Option(name="--env", metavar="K=V", many=True,
                       help="a variable of CMD's environment; repeat for several"),
                Option(name="--cwd", metavar="DIR", default="", help="CMD's directory (default /)"),
                Option(name="--timeout", metavar="S", help="kill CMD after S seconds"),
                Option(name="--no-input", short="-n", help="CMD has no standard input"),
                _VERBOSE,
            ),
            words=(Word(name="command", metavar="CMD", takes_rest=True,
                        help="the command and its arguments"),),
        ),
        Command(name="ctl SOCKET put", description="copy a file or directory into the guest",
                options=(_VERBOSE,),
                words=(
                    Word(name="source", metavar="SRC", help="a file or directory here"),
                    Word(name="target", metavar="DST", help="a path in the guest; as for cp -r"),
                )),
        Command(name="ctl SOCKET get", description="copy a file or directory out of the guest",
                options=(_VERBOSE,),
                words=(
                    Word(name="source", metavar="SRC", help="a path in the guest"),
                    Word(name="target", metavar="DST", help="a path here; as for cp -r"),
                )),
        Command(name="ctl SOCKET registers", description="show the registers of a paused vCPU",
                usage="pyvmm ctl SOCKET registers [N]", options=(_VERBOSE,),
                words=(Word(name="vcpu", metavar="N", takes_rest=True,
                            help="which vCPU (default 0)"),)),
        Command(
            name="ctl SOCKET memory", description="show guest memory",
            options=(Option(name="--raw", help="as bytes, not as text"), _VERBOSE),
            words=(
                Word(name="gpa", metavar="GPA", help="a guest physical address, as 0x1000"),
                Word(name="length", metavar="LENGTH", help="a size, as 256 or 4K"),
            ),
        ),
        Command(name="ctl SOCKET refresh", description="have the disks look how large they are",
                options=(_VERBOSE,)),
        *ctl_snapshot.COMMANDS,
    ),
)


def ctl_main(argv: list[str]) -> int:
    """Do what ``argv`` says to a running machine; return the exit status."""
    if not argv or argv[0] in HELP:
        args = parse_options(COMMAND, argv)  # help, or the error for nothing
        raise AssertionError(args)
    socket = argv[0]
    if socket.startswith("-"):
        raise ConfigError(socket, "pyvmm ctl needs the socket first: pyvmm ctl SOCKET status")
    if socket in _VERBS and not os.path.exists(socket):
        raise ConfigError(
            socket, f"pyvmm ctl needs the socket first: pyvmm ctl SOCKET {socket}"
        )
    args = parse_options(COMMAND, argv[1:])
    if check := _CHECKS.get(args.verb):
        check(args)
    if args.verb == "console":
        return _console(socket, args)
    with Client.connect(socket) as client:
        return _VERBS[args.verb](client, args)


def _status(client: Client, args: SimpleNamespace) -> int:
    status = client.call("status")
    if args.json:
        import json

        show(json.dumps(status))
        return 0
    release = status.get("kernel_release") or "not known"
    paused = ", paused" if status["paused"] else ""
    problem = f": {status['problem']}" if status["problem"] else ""
    outcome = status["outcome"]
    for name, value in (
        ("pid", str(status["pid"])),
        ("kernel", f"{status['kernel']} ({release})"),
        ("memory", f"{format_size(status['memory_bytes'])}, vCPUs: {status['cpus']}"),
        ("disks", ", ".join(status["disks"]) or "none"),
        ("runs", f"{status['running_s']:.1f} s{paused}"),
        ("agent", f"{status['agent']}{problem}"),
        ("console", f"{status['console_bytes']} bytes printed"),
        *((("clone", _clone_of(status)),) if status.get("clone_id") else ()),
        *((("rewind", f"to {_moments_of(status)}"),) if _moments_of(status) else ()),
        *((("ended", outcome["text"]),) if outcome else ()),
    ):
        show(f"{name:8} {value}")
    return 0


def _moments_of(status: Mapping[str, Any]) -> str:
    """Return the moments that a machine can go back to; "" if there is none."""
    snapshot, numbers = status.get("snapshot"), status.get("checkpoints")
    found = [] if snapshot is None else [f"snapshot {snapshot['path'] or 'in memory'}"]
    if numbers:
        found.append(f"checkpoints {numbers[0]} to {numbers[-1]}")
    return ", ".join(found)


def _clone_of(status: Mapping[str, Any]) -> str:
    """Return which clone a machine is, and how its guest took it."""
    told = status.get("clone")
    if told is None:
        return str(status["clone_id"])
    if not told["told"]:
        return f"{status['clone_id']}; its agent is too old to be told"
    seeded = "new random numbers" if told["reseeded"] else "the old random numbers"
    return f"{status['clone_id']}; {seeded}, hook: {told['hook']}"


def _pause(client: Client, args: SimpleNamespace) -> int:
    client.call("pause", {} if args.timeout is None else {"timeout_s": args.timeout})
    return 0


def _resume(client: Client, _args: SimpleNamespace) -> int:
    client.call("resume")
    return 0


def _stop(client: Client, _args: SimpleNamespace) -> int:
    client.call("stop")
    return 0


def _wait(client: Client, args: SimpleNamespace) -> int:
    outcome = client.call("wait", {"timeout_s": args.timeout})["outcome"]
    if outcome is None:
        say(f"the machine still runs after {args.timeout:g} s")
        return TIMEOUT_STATUS
    for line in outcome["text"].split("\n"):
        show(line)
    status: int = outcome["exit_status"]
    return status


def _refresh(client: Client, _args: SimpleNamespace) -> int:
    client.call("disks.refresh")
    return 0


def _type(client: Client, args: SimpleNamespace) -> int:
    data = args.text.encode("utf-8", "surrogateescape") + (b"" if args.no_enter else b"\r")
    client.call("console.write", {"data": base64.b64encode(data).decode()})
    return 0


def _registers(client: Client, args: SimpleNamespace) -> int:
    values = client.call("registers", {"vcpu": args.vcpu})["values"]
    cells = [f"{name:>8} {int(value, 16):016x}" for name, value in values.items()]
    for at in range(0, len(cells), _REGISTERS_A_LINE):
        show(" ".join(cells[at : at + _REGISTERS_A_LINE]))
    return 0


def _memory(client: Client, args: SimpleNamespace) -> int:
    gpa, length = args.gpa, args.length
    out = PassedOn(1, is_terminal=False)
    if length > MAX_READ_BYTES:  # its end may be outside: better to say so before it is shown
        client.call("memory.read", {"gpa": gpa + length - 1, "length": 1})
    for at in range(gpa, gpa + length, MAX_READ_BYTES):
        count = min(MAX_READ_BYTES, gpa + length - at)
        data = base64.b64decode(client.call("memory.read", {"gpa": at, "length": count})["data"])
        if args.raw:
            out.write(data)
            continue
        for offset in range(0, len(data), _BYTES_A_LINE):
            piece = data[offset : offset + _BYTES_A_LINE]
            text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in piece)
            show(f"{at + offset:016x}  {piece.hex(' '):{3 * _BYTES_A_LINE - 1}}  {text}")
    if out.problem is not None:
        raise out.problem
    return 0


def _console(socket: str, args: SimpleNamespace) -> int:
    """Show the console as it is: a terminal obeys it, as it does ``pyvmm run``'s."""
    events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    out = PassedOn(1, is_terminal=False)
    with Client.connect(
        socket, on_event=events.put, on_end=lambda: events.put(None)
    ) as client:
        text = client.call("console.text", {"limit": MAX_READ_BYTES})
        data = base64.b64decode(text["data"])
        out.write(data)
        if not args.follow:
            return 0 if out.problem is None else ctl_agent.reader_gone(out.problem)
        client.call("subscribe", {
            "events": ["console", "ended"], "console_from": text["at"] + len(data),
        })
        while (event := events.get()) is not None and out.problem is None:
            if event["event"] == "console":
                out.write(base64.b64decode(event["data"]))
            elif event["event"] == "console.lost":
                say(f"{event['bytes']} bytes of the console are lost: they came too fast")
    return 0 if out.problem is None else ctl_agent.reader_gone(out.problem)


# Mistakes in the words themselves are told before anybody is asked.


def _check_timeout(args: SimpleNamespace) -> None:
    if args.timeout is not None:
        args.timeout = parse_seconds("--timeout", args.timeout)


def _check_registers(args: SimpleNamespace) -> None:
    text = " ".join(args.vcpu) or "0"
    args.vcpu = whole_number(text, 0, 255)
    if args.vcpu is None:
        raise ConfigError(f"registers {shown(text)}", "is no number of a vCPU")


def _check_memory(args: SimpleNamespace) -> None:
    args.gpa, args.length = _address(args.gpa), parse_size("LENGTH", args.length)


def _check_text(args: SimpleNamespace) -> None:
    if len(args.text) > MAX_TYPED_CHARACTERS:
        raise ConfigError(
            "TEXT", f"has {len(args.text)} characters; the limit is {MAX_TYPED_CHARACTERS}"
        )


def _address(text: str) -> int:
    digits = text.removeprefix("0x")
    if digits.isascii() and 0 < len(digits) <= 16 and digits.isalnum():
        try:
            return int(digits, 16 if digits != text else 10)
        except ValueError:
            pass
    raise ConfigError(f"GPA {text[:40]}", "is no address; write 0x100000 or 1048576")


_CHECKS: Mapping[str, Callable[[SimpleNamespace], None]] = MappingProxyType({
    "pause": _check_timeout, "wait": _check_timeout, "registers": _check_registers,
    "memory": _check_memory, "type": _check_text, "run": ctl_agent.check_run,
    "put": ctl_agent.check_put, "get": ctl_agent.check_get,
    "snapshot": ctl_snapshot.check_snapshot, "rewind": ctl_snapshot.check_rewind,
})
_VERBS: Mapping[str, Callable[[Client, SimpleNamespace], int]] = MappingProxyType({
    "status": _status, "pause": _pause, "resume": _resume, "stop": _stop, "wait": _wait,
    "type": _type, "registers": _registers, "memory": _memory, "refresh": _refresh,
    "run": ctl_agent.run, "put": ctl_agent.put, "get": ctl_agent.get,
    "snapshot": ctl_snapshot.snapshot, "checkpoint": ctl_snapshot.checkpoint,
    "rewind": ctl_snapshot.rewind,
})
