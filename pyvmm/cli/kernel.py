"""``pyvmm kernel``: look into a kernel file, fetch a distribution's kernel, or build one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pyvmm.cli.first_look import config_cache_path
from pyvmm.cli.termination import sigterm_raises
from pyvmm.linux.compression import Compression
from pyvmm.linux.config import KernelConfig
from pyvmm.linux.config_cache import remember
from pyvmm.linux.file_systems import SQUASHFS_COMPRESSORS
from pyvmm.linux.guest import Guest
from pyvmm.linux.requirements import (
    FILE_SYSTEMS,
    Finding,
    State,
    judge,
    notes,
    problems,
)
from pyvmm.report import show
from pyvmm.startup.commands import Command, Option, Word
from pyvmm.startup.options import parse_options
from pyvmm.x86.image import dotted
from pyvmm.x86.inspect import Inspection, inspect

CANNOT_BOOT_STATUS = 1

_WITHOUT_INITRD = Guest()
_WITH_INITRD = Guest(initrd_compression=Compression.GZIP)
# Needs of some runs beyond those of every run.
_SPECIAL = (
    ("with an initramfs", (
        *(Guest(initrd_compression=kind) for kind in Compression),
        Guest(initrd_compression=Compression.NONE, is_ram_disk=True),
    )),
    ("with console=hvc0", (Guest(console="hvc0"),)),
    ("with --agent", (Guest(agent_port=True),)),
    ("with --cpus 2", (Guest(cpus=2),)),
    ("with --discovery acpi", (Guest(cmdline_devices=False),)),
    ("with --discovery cmdline or acpi=off", (Guest(acpi=False), Guest(acpi=False, cpus=2))),
    ("with the root on a partition", (Guest(partitions="gpt"), Guest(partitions="dos"))),
    ("with the root on another file system", (
        *(Guest(file_system=name) for name in FILE_SYSTEMS),
        *(Guest(file_system="squashfs", squashfs=name)
          for name in filter(None, SQUASHFS_COMPRESSORS)),
    )),
)

DESCRIPTION = """\
inspect says what a kernel file is and, where the kernel or its configuration tells, whether it can
boot here, naming each option that is missing (as a note if it depends on the image).  The
configuration is the one inside the kernel (CONFIG_IKCONFIG), else config-VERSION beside it, else
.config of the tree it was built in.  It is remembered: pyvmm run then says before the boot what
that one lacks.

fetch unpacks a distribution's kernel into ~/.cache/pyvmm (PYVMM_CACHE says where else) and prints
where its files are; nothing is installed.  debian is linux-image-cloud-amd64 and ubuntu is
linux-image-virtual, by this host's apt; on any other host give a .deb, or a directory with boot/
and lib/modules/.  With them is an initramfs that loads virtio-mmio, virtio-blk and ext4, mounts
root= and starts the init there.

build compiles a kernel that boots here without an initramfs.
"""

EPILOG = """\
exit status of inspect:
  0  it can boot here, or nothing says that it cannot    1  it cannot    125  it is no kernel

examples:
  pyvmm kernel inspect /boot/vmlinuz-$(uname -r)
  pyvmm kernel inspect bzImage --config .config
  pyvmm kernel fetch debian --backports
  pyvmm kernel fetch debian --out kernel && pyvmm run --kernel kernel --disk root.img
  pyvmm kernel fetch linux-image-6.8.0-31-generic_6.8.0-31.31_amd64.deb
  pyvmm kernel build ~/src/linux && pyvmm run --kernel ~/src/linux --disk root.img
"""


BUILD_DESCRIPTION = """\
build compiles a kernel.  A tree is built where it is, as make does it, so that a second build takes
seconds.  Without a .config it gets tinyconfig and pyvmm's options; a .config of yours keeps all it
has, and gets what a guest needs.  A tarball, and debian, are built in the cache, with tinyconfig
and pyvmm's options.
"""
BUILD_EPILOG = """\
examples:
  pyvmm kernel build .
  pyvmm kernel build linux-6.12.tar.xz --config my.config --out kernel
"""

_VERBOSE = Option(name="--verbose", short="-v", help="-vv: tracebacks of errors")

COMMAND = Command(
    name="kernel",
    description=DESCRIPTION,
    epilog=EPILOG,
    verbs=(
        Command(
            name="kernel inspect",
            description="what a kernel file is, and whether it can boot here",
            words=(Word(name="file", metavar="FILE", help="a bzImage or an ELF vmlinux"),),
            options=(
                Option(name="--config", metavar="FILE",
                       help="the configuration it was built with"),
                _VERBOSE,
            ),
        ),
        Command(
            name="kernel fetch",
            description="unpack a distribution's kernel into the cache",
            words=(
                Word(name="source", metavar="debian|ubuntu|FILE.deb|DIR",
                     help="debian or ubuntu by way of apt; the file of a package (Ubuntu's "
                     "linux-modules file is taken from beside it); or a directory where packages "
                     "are unpacked"),
            ),
            options=(
                Option(name="--backports",
                       help="the newer kernel that Debian's backports have for this release"),
                Option(name="--version", metavar="VERSION",
                       help="this version of the package, such as 6.1.192-2 (default: the "
                       "newest); of a directory: this release, if it has several"),
                Option(name="--modules",
                       help="all modules of the package too, unpacked, with depmod's tables"),
                Option(name="--out", metavar="DIR",
                       help="copy all of it there; pyvmm run --kernel DIR then boots it"),
                _VERBOSE,
            ),
        ),
        Command(
            name="kernel build",
            description=BUILD_DESCRIPTION,
            epilog=BUILD_EPILOG,
            words=(
                Word(name="source", metavar="SRC",
                     help="a kernel tree, a tarball of one, or debian (linux-source-6.1)"),
            ),
            options=(
                Option(name="--config", metavar="FRAGMENT", many=True,
                       help="a file of further options, such as CONFIG_XFS_FS=y; repeat for more, "
                       "the last one wins"),
                Option(name="--out", metavar="DIR",
                       help="copy bzImage, vmlinux and config there"),
                Option(name="--jobs", metavar="N", help="compilers at a time (default: the CPUs)"),
                _VERBOSE,
            ),
        ),
    ),
)


def kernel_main(argv: list[str]) -> int:
    """Run one of the verbs; return its exit status."""
    args = parse_options(COMMAND, argv)
    if args.verb != "inspect":
        from pyvmm.cli import kernel_files

        with sigterm_raises():
            return kernel_files.fetch(args) if args.verb == "fetch" else kernel_files.build(args)
    return _inspect(args.file, args.config)


def _inspect(path: str, config_file: str | None) -> int:
    found = inspect(path, config_file)
    for name, value in _facts(found):
        show(f"{name:<15}{value}")
    if found.config is None:
        show(f"{'boots here':<15}not known: {_why_unknown(found)}")
        return 0
    if config_file is None:
        with contextlib.suppress(OSError):
            remember(config_cache_path(path), found.config)
    for title, findings in _findings(found.config):
        show()
        if title:
            show(f"{title}:")
        for finding in findings:
            show(f"{finding.state.value:<9}{finding.requirement.purpose:<37}{finding}")
    verdict, can_boot = _verdict(found.config)
    show()
    show(f"{'boots here':<15}{verdict}")
    for note in notes(found.config, _WITHOUT_INITRD):
        show(f"{'note':<15}{note}")
    return 0 if can_boot else CANNOT_BOOT_STATUS


def _facts(found: Inspection) -> Iterator[tuple[str, str]]:
    kernel = found.kernel
    yield "format", f"{kernel.kind}, {_size(found.size_bytes)}"
    yield "version", found.version or "not known"
    if kernel.protocol:
        yield "boot protocol", dotted(kernel.protocol)
    if found.compression is Compression.NONE:
        packed = "none" if not found.packed_bytes else "of no known kind"
    elif found.unknown:
        packed = f"{found.compression.value}, {_size(found.packed_bytes)}; {found.unknown}"
    else:
        packed = (f"{found.compression.value}, {_size(found.packed_bytes)} unpack to "
                  f"{_size(found.unpacked_bytes)}")
    yield "compression", packed
    yield "load address", f"{kernel.start:#x}"
    yield "needs RAM", f"{_size(kernel.end - kernel.start)}, up to {kernel.end:#x}"
    yield "entry", f"{kernel.entry_kind} at {kernel.entry:#x}"
    yield "initrd", f"up to {kernel.initrd_addr_max:#x}"
    yield "command line", f"up to {kernel.cmdline_limit} bytes"
    yield "config", found.config.source if found.config is not None else "not known"


def _why_unknown(found: Inspection) -> str:
    if found.unknown:
        return f"{found.unknown}; and no configuration lies beside it (--config FILE)"
    return "no configuration is in the kernel or lies beside it (--config FILE)"


def _findings(config: KernelConfig) -> Iterator[tuple[str, list[Finding]]]:
    """Yield the needs of every guest under no title, then the further needs of some, by title."""
    seen: set[tuple[str, tuple[str, ...]]] = set()
    for title, guests in (("", (_WITHOUT_INITRD,)), *_SPECIAL):
        found = []
        for guest in guests:
            for finding in judge(config, guest):
                what = finding.requirement.purpose, finding.requirement.options
                if what not in seen:
                    seen.add(what)
                    found.append(finding)
        yield title, found


def _verdict(config: KernelConfig) -> tuple[str, bool]:
    """Say in words if a guest with a disk of ext4 boots, and return True if it does."""
    bare = problems(config, _WITHOUT_INITRD)
    if not bare:
        return "yes, from a disk of ext4, without an initramfs", True
    helped = problems(config, _WITH_INITRD)
    if not helped:
        modules = [
            option
            for finding in judge(config, _WITHOUT_INITRD)
            if finding.state is State.MODULE
            for option, value in finding.settings
            if value == "m"
        ]
        names = f" that loads the modules of {', '.join(modules)}" if modules else ""
        return f"yes, with an initramfs{names}", True
    return "no: " + "; ".join(str(problem) for problem in min(bare, helped, key=len)), False


def _size(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.1f} MiB"
