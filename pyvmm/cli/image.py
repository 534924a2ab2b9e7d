"""``pyvmm image``: build a disk image from a directory, an archive, busybox or packages."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from types import SimpleNamespace

from pyvmm.cli.parse import parse_size
from pyvmm.cli.termination import sigterm_raises
from pyvmm.errors import ConfigError
from pyvmm.linux.images.additions import parse_added
from pyvmm.linux.images.build import Made, Request, build
from pyvmm.linux.images.kinds import KINDS, kind_of
from pyvmm.linux.images.tree import INITS
from pyvmm.report import say, show
from pyvmm.startup.commands import Command, Option, Word
from pyvmm.startup.options import parse_options

DESCRIPTION = """\
build makes a disk image for pyvmm run, without root and without a mount.  Exactly one option says
what is in it: --from-dir, --from-tar, --busybox or --debootstrap.
"""
EPILOG = """\
Files of a directory that are yours become root's; all others keep their owners.  An archive's files
have the owners that it names.

examples:
  pyvmm image build --busybox root.img
  pyvmm image build --from-dir rootfs --fs squashfs root.squashfs
  docker export CONTAINER | pyvmm image build --from-tar - root.img
  pyvmm image build --debootstrap bookworm --include strace,iproute2 --size 2G debian.img
"""
SOURCES = ("--from-dir", "--from-tar", "--busybox", "--debootstrap")

COMMAND = Command(
    name="image",
    description="Build a disk image for pyvmm run.",
    epilog="examples:\n  pyvmm image build --busybox root.img\n",
    verbs=(
        Command(
            name="image build",
            description=DESCRIPTION,
            epilog=EPILOG,
            words=(Word(name="out", metavar="OUT", help="the image to write"),),
            options=(
                Option(name="--from-dir", metavar="DIR", help="with the files of a directory"),
                Option(name="--from-tar", metavar="FILE",
                       help="with the files of a tar archive, packed or not; - is standard input"),
                Option(name="--busybox",
                       help="with busybox and pyvmm's init, which takes pyvmm.run=CMD and "
                       "pyvmm.shell"),
                Option(name="--debootstrap", metavar="SUITE",
                       help="with a Debian or Ubuntu, such as bookworm, installed by mmdebstrap; "
                       "systemd is its init, and root has no password"),
                Option(name="--include", metavar="PKG[,PKG]", many=True,
                       help="further packages for --debootstrap; repeat for more"),
                Option(name="--mirror", metavar="URL",
                       help="where --debootstrap has its packages from (default: as this host)"),
                Option(name="--fs", metavar="KIND", default="ext4",
                       help=f"{', '.join(KINDS)} (default ext4)"),
                Option(name="--size", metavar="SIZE",
                       help="as 256M or 1G (default: the contents, a quarter more, and 32M)"),
                Option(name="--label", metavar="NAME", help="the file system's name"),
                Option(name="--add", metavar="SRC:DST", many=True,
                       help="copy a file or directory of this host into the image; repeat for "
                       "more"),
                Option(name="--with-program", metavar="PATH", many=True,
                       help="copy a program of this host and the libraries that it loads; repeat "
                       "for more"),
                Option(name="--force", help="replace an image that is there"),
                Option(name="--verbose", short="-v", help="-vv: tracebacks of errors"),
            ),
        ),
    ),
)


def image_main(argv: list[str]) -> int:
    """Build one image and say what it is; return the exit status."""
    args = parse_options(COMMAND, argv)
    with sigterm_raises():
        made = build(_request(args), say)
    _show(made, " --append pyvmm.shell" if args.busybox else "")
    return 0


def _request(args: SimpleNamespace) -> Request:
    """Return what the options ask for; ConfigError if they contradict each other."""
    given = [name for name in SOURCES if getattr(args, name.removeprefix("--").replace("-", "_"))]
    if len(given) != 1:
        problem = f"needs one of {', '.join(SOURCES)}" if not given else (
            f"makes one image; {' and '.join(given)} are two"
        )
        raise ConfigError("image build", f"{problem} (pyvmm image build --help)")
    for name, value in (("--include", args.include), ("--mirror", args.mirror)):
        if value and not args.debootstrap:
            raise ConfigError(name, "is for --debootstrap, which installs packages")
    kind_of(args.fs)
    return Request(
        out=Path(args.out),
        directory=Path(args.from_dir) if args.from_dir else None,
        tar=args.from_tar or "",
        is_busybox=args.busybox > 0,
        suite=args.debootstrap or "",
        include=tuple(name for text in args.include for name in text.split(",") if name),
        mirror=args.mirror or "",
        kind=args.fs,
        size_bytes=parse_size("--size", args.size) if args.size is not None else None,
        label=args.label or "",
        added=tuple(parse_added(text) for text in args.add),
        programs=tuple(Path(path) for path in args.with_program),
        replaces=args.force > 0,
    )


def _show(made: Made, append: str) -> None:
    """Print what was made, and the command line that boots it, with ``append`` at its end."""
    mib = made.size_bytes / (1 << 20)
    show(f"image      {made.path}")
    show(f"holds      {made.kind}, {mib:.1f} MiB: {made.files} files of "
         f"{made.content_bytes / (1 << 20):.1f} MiB")
    name = shlex.quote(os.fspath(made.path))
    if made.kind == "initramfs":
        disk = f"--initrd {name}"
        if made.init != "/init":
            append = f" --append rdinit={made.init or 'PROGRAM'}{append and ' '}{append}"
    else:
        disk = f"--disk {name},ro" if KINDS[made.kind].is_read_only else f"--disk {name}"
    if made.init:
        show(f"init       {made.init}")
    else:
        show(f"init       none ({', '.join(INITS)}): files, and no system")
    if not made.init and made.kind != "initramfs":
        show(f"use it     pyvmm run --kernel KERNEL --disk ROOT {disk}")
    else:
        show(f"boot it    pyvmm run --kernel KERNEL {disk}{append}")
