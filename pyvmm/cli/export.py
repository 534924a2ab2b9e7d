"""``pyvmm export``: a disk of ours for any VMM, over vhost-user."""

from __future__ import annotations

import contextlib
import signal
import sys
from types import SimpleNamespace

from pyvmm.cli.descriptors import (
    allow_many_descriptors,
    needed_for_export,
)
from pyvmm.cli.parse import parse_disk
from pyvmm.config import DiskConfig
from pyvmm.errors import ConfigError, PyvmmError
from pyvmm.open_files import descriptor_limit, refuse_shortage, too_few
from pyvmm.peers.eventfds import EventfdWriter
from pyvmm.report import RepeatFilter, Reporter
from pyvmm.run.io_loop import IoSource
from pyvmm.run.serving import serve
from pyvmm.startup.commands import Command, Option
from pyvmm.startup.options import parse_options
from pyvmm.vhost_user.server import Server
from pyvmm.virtio.block import BlockDevice
from pyvmm.virtio.block.config import MAX_QUEUE_SIZE
from pyvmm.virtio.rate_limit import RateLimiter

_ENDINGS = (signal.SIGTERM, signal.SIGINT)
"""Signals that end an export as intended, with status 0."""

_ONE_DISK = "start one export for each disk"

EPILOG = """\
The socket appears, for its owner alone, once front ends can connect, and is gone at the end.  A
disk that can be written serves one front end at a time, a read-only one as many as connect.

A front end shares its guest's memory.  Only memory that cannot shrink is taken, because access to
what is gone would kill the export: in QEMU that is memory-backend-memfd, not memory-backend-file.

signals:
  SIGTERM, SIGINT   end it, with status 0 once it serves; before, 128+n
  SIGUSR1           look how large the disk is now, and tell the front ends

exit status:
  0    ended by SIGTERM or SIGINT        125  bad option, bad file or unusable socket
  128+n  stopped by another signal n, or by any before it served

examples:
  pyvmm export --disk root.img --socket /run/user/1000/root.sock
  pyvmm export --disk base.img,overlay=today.ovl,queues=4 --socket s
  pyvmm export --disk root.img,faults=script --socket s
  pyvmm run --kernel build/bzImage --disk vhost-user=s
  qemu-system-x86_64 -m 512 -object memory-backend-memfd,id=m,size=512M,share=on \\
    -machine q35,memory-backend=m -chardev socket,id=c,path=s \\
    -device vhost-user-blk-pci,chardev=c ...
"""


COMMAND = Command(
    name="export",
    description="Serve a disk to QEMU, pyvmm or any other VMM, as a vhost-user-blk back end.",
    epilog=EPILOG,
    options=(
        Option(name="--disk", metavar="FILE[,ro][,snapshot][,...]", required=True, twice=_ONE_DISK,
               help="the disk, with the options it has in pyvmm run: ro, snapshot, "
               "overlay=FILE, serial=ID, queues=1..8, writeback=on|off, iops=RATE[:BURST], "
               "bps=RATE[:BURST], faults=FILE, format=raw; see docs/disks.md"),
        Option(name="--socket", metavar="PATH", required=True, twice=_ONE_DISK,
               help="the Unix socket to listen on; one that nobody listens on is replaced"),
        Option(name="--trust-memory",
               help="take memory from files that could shrink, too: a front end that shrinks "
               "one kills the export"),
        Option(name="--verbose", short="-v",
               help="say who connects and hangs up; -vv: tracebacks of errors too"),
    ),
    meant=("--disk", "--socket"),
)


def export_main(argv: list[str]) -> int:
    """Serve one disk until a signal; return the exit status."""
    args = parse_options(COMMAND, argv)
    disk = parse_disk(args.disk)
    if not isinstance(disk, DiskConfig):
        raise ConfigError(f"--disk {args.disk}", "is served already; export a file or nbd:// URI")
    # Regions and eventfds of many front ends: none must starve another of descriptors.
    allow_many_descriptors()
    needed = needed_for_export(disk)
    try:
        return _export(args, disk, needed)
    except (OSError, PyvmmError) as error:
        refuse_shortage(error, needed, "this export")
        raise


def _export(args: SimpleNamespace, disk: DiskConfig, needed: int) -> int:
    """Serve ``disk``, which needs ``needed`` open files; see ``export_main``."""
    report, eventfd_writer = Reporter(sys.stderr), EventfdWriter()
    with contextlib.ExitStack() as stack:
        stack.callback(report.close)
        made = contextlib.ExitStack()
        backend = stack.enter_context(
            contextlib.closing(disk.source.open(report=report, until_s=None, made=made))
        )
        stack.callback(made.close)  # an overlay of an export that never began
        servers: list[Server] = []
        # A front end cannot ask what size of ring it may choose: any that QEMU has will do.
        block = disk.block.replace(queue_size=MAX_QUEUE_SIZE)
        limit = block.rate_limit
        # One for the disk, not per connection: a front end that reconnects gets no fresh burst.
        limiter = RateLimiter(limit) if limit else None

        def start() -> list[IoSource]:
            server = Server(
                args.socket,
                lambda: BlockDevice(block, backend, limiter=limiter),
                exclusive=not (disk.read_only or backend.read_only),
                report=RepeatFilter(report),
                note=report if args.verbose else lambda line: None,
                trust_memory=args.trust_memory,
                eventfd_writer=eventfd_writer,
            )
            servers.append(stack.enter_context(contextlib.closing(server)))
            return [IoSource(server.fileno(), server.service, edge_triggered=False)]

        def begun() -> None:
            made.pop_all()
            if descriptor_limit() < needed:
                report(too_few(needed, "this export with a front end"))
            report(f"{disk.location} is served at {args.socket}")

        def refresh() -> None:
            before = backend.size_bytes
            try:
                after = backend.refresh_size()
            except OSError as error:
                report(f"{disk.location}: its size cannot be read: {error}")
                return
            if after != before:
                report(f"{disk.location}: {before} bytes before, {after} bytes now")
                for server in servers:
                    server.config_changed()

        number = serve(
            start, begun=begun, refresh=refresh, hurry=backend.hurry, eventfd_writer=eventfd_writer
        )
    return 0 if number in _ENDINGS else 128 + number
