"""Why a kernel will not boot here, or has not: what its configuration says, in lines for a person.

Imported only where there is something to explain: before a boot if a configuration lies beside the
kernel, and after a boot that failed.
"""

from __future__ import annotations

import contextlib
import os

from pyvmm.config import DiskConfig, RunConfig
from pyvmm.linux.file_systems import HEAD_BYTES
from pyvmm.linux.requirements import Problem
from pyvmm.outcome import MAYBE_SILENT, Kind, Outcome
from pyvmm.x86.inspect import missing_options

_NO_ROOT = ("Unable to mount root", "cannot mount the root", "No working init found")


def before(config: RunConfig) -> list[str]:
    """What a configuration beside the kernel says against booting it; [] if nothing."""
    return [f"{config.kernel}: {problem}" for problem in _problems(config, unpack=False)]


def after(config: RunConfig, outcome: Outcome, *, has_printed: bool) -> list[str]:
    """The remedy for an ``outcome`` that has one; seconds may pass, for a kernel is unpacked."""
    if outcome.kind is Kind.PANIC and any(text in outcome.detail for text in _NO_ROOT):
        found = [f"{config.kernel}: {problem}" for problem in _problems(config, unpack=True)]
        return found or [
            f"the root could not be mounted: root= and --disk must name it, and {config.kernel} "
            "must have its driver and file system (pyvmm kernel inspect says)"
        ]
    if not has_printed and outcome.kind in MAYBE_SILENT:
        words = config.kernel_command_line().split()
        consoles = [word for word in words if word.startswith("console=")]
        told = " ".join(consoles) or "none"
        return [
            f"the kernel printed nothing: its consoles are {told}; console=ttyS0 is the serial "
            f"port (or earlyprintk=ttyS0 for the first of it)",
            *(f"{config.kernel}: {problem}" for problem in _problems(config, unpack=True)),
        ]
    return []


def _problems(config: RunConfig, *, unpack: bool) -> list[Problem]:
    return missing_options(
        config.kernel, initrd=config.initrd, disk_head=_disk_head(config), unpack=unpack,
        acpi_off=config.discovery == "cmdline"
        or "acpi=off" in config.kernel_command_line().split(),
    )


def _disk_head(config: RunConfig) -> bytes | None:
    """The first bytes of the first disk: none of them if it is no file; None without a disk."""
    if not config.disks:
        return None
    disk = config.disks[0]
    if isinstance(disk, DiskConfig):
        with contextlib.suppress(OSError, ValueError):
            fd = os.open(disk.location, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                return os.pread(fd, HEAD_BYTES, 0)
            finally:
                os.close(fd)
    return b""
