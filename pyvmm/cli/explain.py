"""Explain, in lines for a person, why a kernel will not boot here or has not booted.

Imported only if there is something to explain: before a boot, if a configuration lies beside the
kernel or in the cache, and after a boot that failed.  Judging imports little
(``linux.requirements``).  The code that reads and unpacks kernels is imported only when needed.
"""

from __future__ import annotations

import contextlib
import os

from pyvmm.cli.first_look import config_cache_path
from pyvmm.config import DiskConfig, RunConfig
from pyvmm.linux.config_cache import covers, recall, remember
from pyvmm.linux.file_systems import HEAD_BYTES
from pyvmm.linux.formats import GZIP_MAGIC
from pyvmm.linux.guest import Boot, describe
from pyvmm.linux.requirements import notes, problems
from pyvmm.run.outcome import MAYBE_SILENT, Kind, Outcome
from pyvmm.run.verdict import Evidence
from pyvmm.startup.types import TYPE_CHECKING
from pyvmm.storage.backend import SECTOR_SIZE
from pyvmm.storage.files import logical_block_size
from pyvmm.x86 import layout

if TYPE_CHECKING:
    from os import PathLike

    from pyvmm.linux.options import KernelConfig

_EARLY = (
    "Linux says so whenever a program has it halt or restart, even with `quiet`; this one did not, "
    "and nothing shows that it started an init: earlyprintk=ttyS0 shows more of an early end"
)
_NO_ROOT = ("Unable to mount root", "cannot mount the root", "No working init found")


def before(config: RunConfig, version: str = "", *, is_known: bool = True) -> list[str]:
    """Return the lines that speak against this boot; [] if nothing does.

    ``version`` is the kernel's own text.  Unpack nothing, and look for a configuration only if
    ``is_known``.
    """
    boot = _boot(config, version)
    kernel_config = _configuration(config.kernel, boot, unpack=False) if is_known else None
    return _lines(config, boot, kernel_config)


def after(
    config: RunConfig,
    outcome: Outcome,
    evidence: Evidence,
    *,
    is_known: bool = True,
    is_linux: bool = True,
    version: str = "",
) -> list[str]:
    """Return the remedy for an ``outcome`` that has one.

    That may take seconds, because a kernel is unpacked, but no more than EXPLAIN_S of
    ``linux.work``.  After Ctrl-A x or a signal, use only a configuration that can be read at once,
    if there is one (``is_known``): nobody wants to wait.

    A guest that is not Linux starts no init, and is not stuck.
    """
    is_stuck = is_linux and outcome.kind is Kind.TIMEOUT and not evidence.reached_init
    is_silent = not evidence.has_printed and outcome.kind in MAYBE_SILENT
    has_no_root = (is_stuck and evidence.waits_for_root) or (
        outcome.kind is Kind.PANIC and any(text in outcome.detail for text in _NO_ROOT)
    )
    if outcome.kind is Kind.GAVE_UP:
        return [_damaged(config)]
    is_early = outcome.kind in (Kind.EARLY_HALT, Kind.EARLY_RESET)
    if not (has_no_root or is_silent or is_stuck or is_early):
        return []
    boot = _boot(config, version)
    may_wait = outcome.kind not in (Kind.QUIT, Kind.SIGNAL)
    kernel_config = None
    if may_wait or is_known:
        kernel_config = _configuration(config.kernel, boot, unpack=may_wait)
    found = []
    if is_linux or has_no_root or kernel_config is not None:
        found = _lines(config, boot, kernel_config)
    # Notes are about the boot after the root is mounted.
    is_mounted = not has_no_root or "No working init found" in outcome.detail
    if kernel_config is not None and is_mounted:
        remarks = notes(kernel_config, describe(boot, kernel_config))
        found += [f"{config.kernel}: {remark}" for remark in remarks]
    if is_silent and not has_no_root:
        return [_silent(config), *found]
    if is_early:
        return [*found, _EARLY]
    if has_no_root and not found:
        return [
            f"the root could not be mounted: root= and --disk must name it, and {config.kernel} "
            "must have its driver and file system (pyvmm kernel inspect says)"
        ]
    return found


def _silent(config: RunConfig) -> str:
    words = config.kernel_command_line().split()
    told = " ".join(word for word in words if word.startswith("console=")) or "none"
    return (
        f"the kernel printed nothing: its consoles are {told}; console=ttyS0 is the serial "
        "port (or earlyprintk=ttyS0 for the first of it); should every kernel be silent here, "
        "`pyvmm doctor` says whether this host's KVM is complete"
    )


def _damaged(config: RunConfig) -> str:
    return (
        f"{config.kernel}: the code in front of the kernel gave up, most often because the file is "
        "damaged or cut: copy or build it again"
    )


def _lines(config: RunConfig, boot: Boot, kernel_config: KernelConfig | None) -> list[str]:
    guest = describe(boot, kernel_config)
    found = [] if kernel_config is None else problems(kernel_config, guest)
    return [*guest.mistakes, *(f"{config.kernel}: {problem}" for problem in found)]


def _configuration(
    kernel: str | PathLike[str], boot: Boot, *, unpack: bool
) -> KernelConfig | None:
    """Return the configuration of ``kernel`` from the cache; else read it and put it there."""
    try:
        entry = config_cache_path(kernel)
    except (OSError, ValueError):
        return None
    found = recall(entry)
    # The configuration inside the kernel is the truth; a file beside it may be another kernel's.
    is_final = found is not None and not (unpack and os.path.isabs(found.source))
    if found is not None and is_final and covers(found, describe(boot, found)):
        return found
    from pyvmm.linux.work import EXPLAIN_S, Budget
    from pyvmm.x86.inspect import read_configuration

    found = read_configuration(kernel, unpack=unpack, budget=Budget(wall_s=EXPLAIN_S))
    if found is not None:
        remember(entry, found)
    return found


def _boot(config: RunConfig, version: str) -> Boot:
    initrd = None if config.initrd is None else _read(os.fspath(config.initrd), 0)
    if initrd is None and config.agent == "inject":
        initrd = GZIP_MAGIC  # of an initramfs of ours

    def read_disk(index: int, offset: int) -> bytes:
        disk = config.disks[index]
        # The base does not show the blocks that an overlay holds.
        is_all = isinstance(disk, DiskConfig) and not disk.source.overlay
        return _read(disk.location, offset) if is_all else b""

    # There always is a device: one shows whether the command line announces any.
    command_line = config.kernel_command_line([layout.virtio_slot(0)])
    return Boot(
        command_line=command_line, version=version, cpus=config.cpus, disks=len(config.disks),
        acpi=config.discovery != "cmdline", initrd=initrd, agent_port=config.agent != "none",
        read_disk=read_disk,
    )


def _read(path: str, offset: int) -> bytes:
    """Return the start of a file or disk.

    b"" if ``path`` is neither or may not be read, or if its sectors have another size than the
    one with which tables and file systems are read here.
    """
    with contextlib.suppress(OSError, ValueError, OverflowError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            is_usual = logical_block_size(fd) == SECTOR_SIZE
            return os.pread(fd, HEAD_BYTES, offset) if is_usual else b""
        finally:
            os.close(fd)
    return b""
