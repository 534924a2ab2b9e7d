"""``pyvmm test``: boot a machine, run one command in it, exit with its status or a verdict."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, SimpleNamespace

from pyvmm.api.config import MachineConfig
from pyvmm.cli.parse import parse_cpus, parse_disk, parse_memory, parse_seconds
from pyvmm.cli.test_output import TestOutput
from pyvmm.errors import ConfigError, HostError, PyvmmError
from pyvmm.launcher.limits import BOOT_TIMEOUT_S, LAB_BOOT_TIMEOUT_S, boot_timeout_s
from pyvmm.launcher.vm import launch
from pyvmm.startup.commands import Command, Option, Word
from pyvmm.startup.options import parse_options
from pyvmm.startup.types import TYPE_CHECKING
from pyvmm.testing.boot_result import BootResult
from pyvmm.testing.boot_test import TIMEOUT_S, BootTest, run_boot_test
from pyvmm.testing.fail_on import CLASSES, FATAL, FailOn, check_pattern
from pyvmm.testing.junit import Suite, junit_xml
from pyvmm.testing.output_file import OutputFile
from pyvmm.testing.usable_kvm import INSIDE, problem_for
from pyvmm.testing.verdicts import HOST_STATUS, RunFailed
from pyvmm.x86 import layout

if TYPE_CHECKING:
    from pyvmm.testing.boot_test import Launch

AGENT_WAYS = ("inject", "image", "none")
DESCRIPTION = """\
Boot a kernel, run CMD in the guest, pass its output through and exit with its status.

A panic, an oops, a warning, a lock-up, a root that cannot be mounted, a reboot, a hang: each ends
the test at once with a verdict and an exit status of its own.  CMD is a program with arguments, not
a line for a shell (for that: -- sh -c 'TEXT').  Its standard input is empty.  Without CMD the test
is over once the console has shown all that --expect names.
"""
EPILOG = """\
exit status (docs/verdicts.md):
  0-119  CMD's own (119 for anything larger, or if a signal killed CMD: a line says which)
  120    the guest ended without a report, however clean: power-off, reboot
  121    panic, oops, warning, lock-up, a --fail-on line, root not mounted, a boot given up
  122    triple fault        123    KVM internal error
  124    no agent in --boot-timeout, CMD over --timeout, an --expect that never came
  125    bad option, bad file, unusable host, a report that cannot be written, agent lost
  126    CMD cannot be executed       127    CMD is not there
  128+n  stopped by signal n; reports are written all the same

examples:
  pyvmm test --kernel bzImage --disk root.img -- uname -r
  pyvmm test --kernel bzImage --disk root.img --put my.ko:/tmp/ --get /tmp/log:. \\
      --junit report.xml --console-log console.log -- sh -c 'insmod /tmp/my.ko && dmesg >/tmp/log'
  pyvmm test --kernel bzImage --disk root.img --expect 'login: '
"""

COMMAND = Command(
    name="test",
    usage="pyvmm test --kernel FILE [OPTIONS] -- CMD...",
    description=DESCRIPTION,
    epilog=EPILOG,
    options=(
        Option(name="--kernel", metavar="FILE", required=True,
               help="the kernel, or a directory with one, as in pyvmm run"),
        Option(name="--disk", metavar="FILE[,ro][,snapshot][,...]", many=True,
               help="a disk, as in pyvmm run; repeat for vdb, ..."),
        Option(name="--expect", metavar="RE", many=True,
               help="a regular expression that a line of the console must match, at any time of "
               "the test; repeat for more: all must come, in any order"),
        Option(name="--fail-on", metavar="RE", many=True,
               help="a regular expression: a line of the console that matches ends the test"),
        Option(name="--no-fail-on", metavar="CLASS", many=True,
               help="lines of the kernel's that do not end the test: "
               f"{', '.join(name for name in CLASSES if name not in FATAL)} or all of these"),
        Option(name="--allow", metavar="RE", many=True,
               help="lines that end no test although they are of such a class"),
        Option(name="--boot-timeout", metavar="S",
               help="seconds from the start until CMD can run; without CMD: until all was shown "
               f"(default {BOOT_TIMEOUT_S:g}, in the lab {LAB_BOOT_TIMEOUT_S:g})"),
        Option(name="--timeout", metavar="S",
               help=f"seconds that CMD may take (default {TIMEOUT_S:g})"),
        Option(name="--put", metavar="SRC:DST", many=True,
               help="copy a file or directory of this host to DST in the guest, before CMD"),
        Option(name="--get", metavar="SRC:DST", many=True,
               help="copy SRC of the guest to this host, after CMD, even if that failed"),
        Option(name="--env", metavar="NAME=VALUE", many=True, help="a variable for CMD"),
        Option(name="--cwd", metavar="DIR", default="", help="CMD's working directory (default /)"),
        Option(name="--junit", metavar="FILE", help="write the result as JUnit XML"),
        Option(name="--json", metavar="FILE", help="write the result as JSON (docs/verdicts.md)"),
        Option(name="--console-log", metavar="FILE", help="write all that the guest prints"),
        Option(name="--name", metavar="NAME", default="",
               help="the test's name in reports (default: CMD)"),
        Option(name="--agent", metavar="WAY", default="inject",
               help="how CMD gets into the guest: inject (our agent is brought into the image at "
               "boot), image (it is there) or none (no CMD; default inject)"),
        Option(name="--initrd", metavar="FILE", help="an initial RAM disk, as in pyvmm run"),
        Option(name="--cmdline", metavar="S", help="the kernel command line, as in pyvmm run"),
        Option(name="--append", metavar="S", many=True,
               help="text added at the end of the kernel command line"),
        Option(name="--memory", metavar="SIZE", default="256M",
               help="guest RAM, as 256M or 1G (default 256M)"),
        Option(name="--cpu", metavar="MODEL", default="host", help="as in pyvmm run"),
        Option(name="--cpus", metavar="N", default="1", help="vCPUs, 1 to 8 (default 1)"),
        Option(name="--verbose", short="-v",
               help="show the console as it comes, on standard error; -vv: tracebacks of errors"),
    ),
    words=(
        Word(name="command", metavar="CMD", takes_rest=True, help="the command and its arguments"),
    ),
    meant=("--kernel", "--disk"),
)


class Interrupted(KeyboardInterrupt):
    """A signal that ends the test: Ctrl-C's, or one that a CI server sends."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def boot_test_from(args: SimpleNamespace) -> BootTest:
    """Return the boot test of the parsed options; ConfigError names the option."""
    if args.agent not in AGENT_WAYS:
        raise ConfigError(f"--agent {args.agent}", f"must be one of {', '.join(AGENT_WAYS)}")
    if args.command and args.agent == "none":
        raise ConfigError("--agent none", "leaves nobody to run CMD; give inject or image")
    if not args.command and not args.expect:
        raise ConfigError("test", "has nothing to do; write -- CMD..., or --expect RE")
    for option in ("put", "get"):
        if getattr(args, option) and not args.command:
            raise ConfigError(f"--{option}", "needs a CMD: write -- CMD...")
    for pattern in args.expect:
        check_pattern("--expect", pattern)
    kernel, initrd = args.kernel, args.initrd
    if os.path.isdir(kernel):
        from pyvmm.linux.kernel_directory import kernel_in

        kernel, its_initramfs = kernel_in(kernel)
        initrd = initrd or its_initramfs
    return BootTest(
        machine=MachineConfig(
            kernel=kernel,
            disks=tuple(parse_disk(text) for text in args.disk),
            initrd=initrd,
            memory=parse_memory("--memory", args.memory, layout.MIN_MEMORY, layout.MAX_MEMORY),
            cpus=parse_cpus(args.cpus),
            cpu=args.cpu,
            append=" ".join(args.append),
            cmdline=args.cmdline,
            agent=args.agent if args.command else "none",
        ),
        command=tuple(args.command),
        name=args.name,
        env=_environment(args.env) if args.env else None,
        cwd=args.cwd,
        expect=tuple(args.expect),
        fail_on=FailOn.parse(
            add=args.fail_on, without=args.no_fail_on, allow=args.allow,
            names=("--fail-on", "--no-fail-on", "--allow"),
        ),
        boot_timeout_s=_seconds("--boot-timeout", args.boot_timeout, boot_timeout_s()),
        timeout_s=_seconds("--timeout", args.timeout, TIMEOUT_S),
        puts=tuple(_put(text) for text in args.put),
        gets=tuple(_get(text) for text in args.get),
        console_log=args.console_log,
    )


def boot_test_main(argv: list[str], *, launch: Launch = launch) -> int:
    """Run one test; return the exit status."""
    args = parse_options(COMMAND, argv)
    test = boot_test_from(args)
    _check_different_files(args)
    with contextlib.ExitStack() as stack:
        wanted: tuple[tuple[str, str | None, Callable[[BootResult], str]], ...] = (
            ("--junit", args.junit, _junit), ("--json", args.json, _json)
        )
        files = [
            (stack.enter_context(OutputFile(option, path)), form)
            for option, path, form in wanted if path is not None
        ]
        if args.console_log is not None:
            with OutputFile("--console-log", args.console_log):
                pass  # can be made; the process of the machine writes it
        if problem := problem_for(test.machine.kernel):
            raise HostError(_with_remedy(problem, argv))
        output = stack.enter_context(TestOutput(os.environ, shows_console=args.verbose > 0))
        complaints = []
        with _signals_as_interrupts():
            result, error = _result(test, output, launch)
            for file, form in files:
                try:
                    file.write(form(result))
                except HostError as refused:
                    complaints.append(str(refused))
        complaints += _lost_log(result, output.console_bytes)
        status = output.finish(result, complaints)
        if error is not None and args.verbose > 1:
            raise error
        return status


def _result(
    test: BootTest, output: TestOutput, launch: Launch
) -> tuple[BootResult, PyvmmError | None]:
    """Run ``test``; a machine that cannot be started is a result too, with its error."""
    try:
        return run_boot_test(
            test, on_console=output.console, on_stdout=output.stdout, on_stderr=output.stderr,
            on_vm=output.watch, launch=launch,
        ), None
    except (PyvmmError, OSError) as error:
        return BootResult(
            name=test.shown_name, verdict=RunFailed.name, exit_status=HOST_STATUS,
            message=f"not started: {error}", command=tuple(test.command),
        ), error if isinstance(error, PyvmmError) else HostError(str(error))
    except KeyboardInterrupt as interrupt:  # before there was a machine, or at its end
        number = int(getattr(interrupt, "number", signal.SIGINT))
        return BootResult(
            name=test.shown_name, verdict="interrupted", exit_status=128 + number,
            message=f"interrupted by signal {number}", command=tuple(test.command),
        ), None


def _check_different_files(args: SimpleNamespace) -> None:
    """Raise ConfigError if two reports would go into one regular file, and spoil each other."""
    seen: dict[str, str] = {}
    for option, path in (
        ("--junit", args.junit), ("--json", args.json), ("--console-log", args.console_log)
    ):
        if path is None or (os.path.exists(path) and not os.path.isfile(path)):
            continue
        first = seen.setdefault(os.path.realpath(path), option)
        if first != option:
            raise ConfigError(f"{option} {path}", f"is the file of {first} already")


def _lost_log(result: BootResult, console_bytes: int) -> list[str]:
    """Return the complaint about a console's log that has not all ``console_bytes``."""
    printed = console_bytes + result.lost_console_bytes
    with contextlib.suppress(OSError):
        if result.console_log and os.path.isfile(result.console_log):
            size = os.stat(result.console_log).st_size
            if size < printed:
                return [
                    f"--console-log {result.console_log}: has {size} of {printed} bytes: the disk "
                    "is full, or another program changed it"
                ]
    return []


def _junit(result: BootResult) -> str:
    suite = Suite(name="pyvmm test", cases=[result.as_case()], began_s=result.began_at_s)
    return junit_xml([suite])


def _json(result: BootResult) -> str:
    return json.dumps(result.as_dict(), indent=1) + "\n"


def _with_remedy(problem: str, argv: list[str]) -> str:
    """Return ``problem`` with the command line that works, unless this is the lab."""
    if os.environ.get(INSIDE):
        return problem
    return f"{problem}; run it as: pyvmm lab -- {shlex.join(['pyvmm', 'test', *argv])}"


@contextlib.contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """Have the signals that end a command raise Interrupted; main thread only, else nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise Interrupted(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {
        number: signal.signal(number, interrupt)
        for number in numbers if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _seconds(option: str, text: str | None, default: float) -> float:
    return default if text is None else parse_seconds(option, text)


def _environment(texts: list[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise ConfigError(f"--env {text}", "must be NAME=VALUE")
        found[name] = value
    return found


def _put(text: str) -> tuple[str, str]:
    """Return source and target of ``SRC:DST``; DST begins behind the last colon."""
    source, _, target = text.rpartition(":")
    if not source or not target:
        raise ConfigError(f"--put {text}", "must be SRC:DST, a path here and one in the guest")
    if not os.path.lexists(source):
        raise ConfigError(f"--put {text}", f"there is no {source}")
    if not target.startswith("/"):
        raise ConfigError(f"--put {text}", f"DST must be an absolute path, as /tmp/, not {target}")
    return source, target


def _get(text: str) -> tuple[str, str]:
    """Return source and target of ``SRC:DST``; SRC ends at the first colon."""
    source, _, target = text.partition(":")
    if not source or not target:
        raise ConfigError(f"--get {text}", "must be SRC:DST, a path in the guest and one here")
    if not source.startswith("/"):
        raise ConfigError(f"--get {text}", f"SRC must be an absolute path, not {source}")
    folder = target if target.endswith("/") else os.path.dirname(target) or "."
    if not os.path.isdir(folder):
        raise ConfigError(f"--get {text}", f"there is no directory {folder}")
    return source, target
