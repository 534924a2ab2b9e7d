"""``pyvmm run``: command line -> RunConfig -> a machine -> an exit status."""

from __future__ import annotations

import functools
import os

from pyvmm.cli.first_look import has_known_configuration, root_is_special
from pyvmm.cli.parse import parse_console, parse_cpus, parse_disk, parse_memory, parse_seconds
from pyvmm.cli.running import (
    CONTROL_OPTIONS,
    STATUSES,
    VERBOSE_OPTION,
    Running,
    has_control,
    process_start_s,
    with_control,
)
from pyvmm.config import DEFAULT_CMDLINE, RunConfig, format_size
from pyvmm.errors import PyvmmError
from pyvmm.report import Reporter, say
from pyvmm.startup.commands import Command, Option
from pyvmm.startup.options import parse_options
from pyvmm.startup.types import TYPE_CHECKING
from pyvmm.x86 import layout
from pyvmm.x86.cpu_model import parse_cpu_option

if TYPE_CHECKING:
    from types import SimpleNamespace

    from pyvmm.control.run_control import RunControl
    from pyvmm.machine import Machine
    from pyvmm.startup.bundle import Bundle

EPILOG = f"""\
exit status:
{STATUSES}
keys, when standard input is a terminal:
  Ctrl-A x quits, Ctrl-A p pauses and resumes, Ctrl-A ? helps, Ctrl-A Ctrl-A sends Ctrl-A; all
  others go to the guest.  With --snapshot, Ctrl-A s takes the snapshot.

examples:
  pyvmm run --kernel build/bzImage --disk build/root.img
  pyvmm run --kernel build/bzImage --disk build/root.img --append pyvmm.run='uname -a' --timeout 60
  pyvmm run --kernel build/vmlinux --disk root.img,ro --disk data.img,serial=d --console log
  pyvmm run --kernel build/bzImage --disk root.img,snapshot --snapshot warm --snapshot-at 'login:'
"""


COMMAND = Command(
    name="run",
    description="Boot a Linux kernel in a virtual machine, with disks from image files.",
    epilog=EPILOG,
    options=(
        Option(name="--kernel", metavar="FILE", required=True,
               help="the kernel: a bzImage or an ELF vmlinux, 64-bit x86; or a directory: a built "
               "kernel tree, or one that pyvmm kernel fetch --out filled"),
        Option(name="--disk", metavar="FILE[,ro][,snapshot][,...]", many=True,
               help="a raw disk image, block device, nbd:// server or vhost-user=SOCKET of "
               "another process, seen as /dev/vda; repeat for vdb, ...  Options: ro (the "
               "guest cannot write), snapshot (what it writes is dropped), overlay=FILE (or "
               "kept in FILE), serial=ID, queues=1..8, writeback=on|off, iops=RATE[:BURST], "
               "bps=RATE[:BURST], faults=FILE, format=raw; see docs/disks.md"),
        Option(name="--initrd", metavar="FILE", help="an initial RAM disk (initramfs) to load"),
        Option(name="--cmdline", metavar="S",
               help=f"kernel command line, instead of '{DEFAULT_CMDLINE} root=/dev/vda rw'; "
               "what announces the disks is always added in front"),
        Option(name="--append", metavar="S", many=True,
               help="text added at the end of the kernel command line; repeat for more (a console= "
               "takes the place of the default one)"),
        Option(name="--memory", metavar="SIZE", default="256M",
               help="guest RAM, as 256M or 1G (default 256M)"),
        Option(name="--cpu", metavar="MODEL", default="host",
               help="host, base or FILE.json, then features to take away, or to add if they are "
               "off: host,-xsave,+svm (default host; docs/cpu-models.md)"),
        Option(name="--cpus", metavar="N", default="1", help="vCPUs, 1 to 8 (default 1)"),
        Option(name="--timeout", metavar="S",
               help="stop the guest S seconds after it started, with exit status 124"),
        Option(name="--console", metavar="WHERE", default="stdio",
               help="where the guest's console goes (ttyS0, or hvc0 with --append console=hvc0): "
               "stdio, none, or a file to write (default stdio)"),
        Option(name="--mmio", metavar="MODE", default="mapped",
               help="how the guest sees a disk's registers: mapped (read-only memory, no exit "
               "a request) or trapped (every access is an exit; default mapped)"),
        Option(name="--serve", metavar="WHERE", default="thread",
               help="where a request is served: thread (the disk's own) or exit (on the vCPU "
               "that notifies; default thread)"),
        Option(name="--rtc", metavar="CLOCK", default="utc",
               help="the real-time clock: utc or none (default utc)"),
        Option(name="--discovery", metavar="WAY", default="both",
               help="how the guest is told of its disks: acpi, cmdline (there is no ACPI then) "
               "or both (default; a kernel that reads both complains: docs/kernels.md)"),
        Option(name="--agent",
               help="bring pyvmm's agent into the guest, by an initramfs: whatever the image is, "
               "it then takes orders (docs/devices.md)"),
        *CONTROL_OPTIONS,
        Option(name="--snapshot", metavar="DIR",
               help="save the whole machine in the new directory DIR, once, when the guest is "
               "warm; pyvmm restore DIR goes on from there, as often as you like "
               "(docs/snapshots.md)"),
        Option(name="--snapshot-at", metavar="RE",
               help="the guest is warm when a line of its console matches; else when it says so at "
               "a port (pyvmm-warm in our image), or at Ctrl-A s"),
        Option(name="--snapshot-exit",
               help="end the run once the snapshot is there, with status 0, or 125 if it fails; a "
               "run that ends without one has its own status, or 125 instead of 0"),
        Option(name="--snapshot-live",
               help="let the guest go on while its RAM is written"),
        Option(name="--timing",
               help="say how long start-up, kernel, init and user space took (the guest's init "
               "marks them: docs/devices.md)"),
        VERBOSE_OPTION,
    ),
    meant=("--kernel", "--disk"),
)


def config_from(args: SimpleNamespace) -> RunConfig:
    """Return the validated RunConfig of the parsed options; ConfigError names the option."""
    kernel, initrd = args.kernel, args.initrd
    if os.path.isdir(kernel):
        from pyvmm.linux.kernel_directory import kernel_in

        kernel, its_initramfs = kernel_in(kernel)
        if not args.agent:  # it finds that one by itself
            initrd = initrd or its_initramfs
        also = f" with {initrd}" if initrd and initrd == its_initramfs else ""
        say(f"--kernel {args.kernel}: booting {kernel}{also}")
    return RunConfig(
        kernel=kernel,
        disks=tuple(parse_disk(text) for text in args.disk),
        initrd=initrd,
        cmdline=args.cmdline,
        append=" ".join(args.append),
        memory_bytes=parse_memory(
            "--memory", args.memory, layout.MIN_MEMORY, layout.MAX_MEMORY
        ),
        cpu=parse_cpu_option(args.cpu),
        cpus=parse_cpus(args.cpus),
        timeout_s=parse_seconds("--timeout", args.timeout) if args.timeout is not None else None,
        console=parse_console(args.console),
        mmio=args.mmio,
        serve=args.serve,
        rtc=args.rtc,
        discovery=args.discovery,
        timing=bool(args.timing),
        agent="inject" if args.agent else "image" if has_control(args) else "none",
    )


def run_main(argv: list[str], bundle: Bundle) -> int:
    """Run one machine to its end; return the exit status of its outcome.

    Modules come from ``bundle`` until the guest runs.
    """
    started_s = process_start_s()
    if not argv:
        from pyvmm.cli.newcomer import show_first_steps

        return show_first_steps()
    args = parse_options(COMMAND, argv)
    return with_control(args, functools.partial(_run, args, started_s, bundle))


def _run(
    args: SimpleNamespace, started_s: float, bundle: Bundle, control: RunControl | None
) -> int:
    """Build and run the machine of ``args``; see ``run_main``."""
    config = config_from(args)
    running = Running(
        verbose=bool(args.verbose), timing=bool(args.timing), started_s=started_s, bundle=bundle,
        control=control,
    )
    warm = None
    if args.snapshot is not None or args.snapshot_at or args.snapshot_exit or args.snapshot_live:
        from pyvmm.cli.warm import prepare

        warm = prepare(args)

    def make(report: Reporter) -> tuple[Machine, RunConfig]:
        from pyvmm.machine import build

        return build(config, report=report), config

    def tell(machine: Machine, report: Reporter) -> None:
        _warn(config, machine, report)
        if args.verbose:
            report(f"{config.kernel}: {machine.kernel.describe()}")

    try:
        return running.run(make, tell, warm)
    except (OSError, PyvmmError) as error:
        from pyvmm.cli.descriptors import needed_descriptors
        from pyvmm.open_files import refuse_shortage

        refuse_shortage(error, needed_descriptors(config), "this run")
        raise


def _warn(config: RunConfig, machine: Machine, report: Reporter) -> None:
    """Report each choice that is allowed but probably a mistake."""
    kernel = machine.kernel
    if kernel.is_linux and not config.disks and config.initrd is None:
        report("neither --disk nor --initrd: a kernel without either has no root to mount")
    is_known = has_known_configuration(config.kernel, kernel.version)
    if is_known or (kernel.is_linux and root_is_special(config)):
        from pyvmm.cli import explain

        for line in explain.before(config, kernel.version, is_known=is_known):
            report(line)
    host_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if config.memory_bytes > host_bytes:
        report(
            f"--memory {format_size(config.memory_bytes)} is more than this host has "
            f"({host_bytes >> 20}M): it may be killed when the guest uses it"
        )
