"""A machine as a script asks for it: in words of Python, not of the command line."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence

from pyvmm.api.disks import Disk, as_disk
from pyvmm.config import (
    MAX_SIZE_BYTES,
    AnyDiskConfig,
    DiskConfig,
    RunConfig,
    VhostUserDiskConfig,
    format_size,
)
from pyvmm.errors import ConfigError
from pyvmm.numerals import shown, size_in_bytes
from pyvmm.startup.types import TYPE_CHECKING, Record
from pyvmm.virtio.rate_limit import RateLimit
from pyvmm.x86.cpu_model import parse_cpu_option

if TYPE_CHECKING:
    from os import PathLike

    from pyvmm.storage.backend import BlockBackend

    AnyDisk = str | PathLike[str] | Disk | BlockBackend | AnyDiskConfig


class MachineConfig(Record):
    """One machine.  Only ``kernel`` is needed.

    ``disks`` are paths, disks of pyvmm (``RawDisk``, ``MemoryDisk``, ...), objects with the
    ``BlockBackend`` protocol, or ``disk(...)`` of one of these with options.  ``memory`` is a text
    as ``256M``, or bytes.  ``cpu`` is a model as the command line's ``--cpu`` has it.  ``append``
    goes behind pyvmm's own kernel command line, ``cmdline`` takes its place.  ``timeout_s`` ends
    the run; None is no limit.  ``agent`` is ``image`` if the image brings an agent, ``inject`` or
    True to bring one into it, ``none`` or False for neither.  ``mmio``, ``serve``, ``rtc`` and
    ``discovery`` are explained by ``pyvmm run --help``.

    ConfigError, when a machine is made of it, names the option of the command line.
    """

    kernel: str | PathLike[str]
    disks: Sequence[AnyDisk] = ()
    initrd: str | PathLike[str] | None = None
    memory: str | int = "256M"
    cpus: int = 1
    cpu: str = "host"
    append: str = ""
    cmdline: str | None = None
    timeout_s: float | None = None
    mmio: str = "mapped"
    serve: str = "thread"
    rtc: str = "utc"
    discovery: str = "both"
    agent: str | bool = "none"

    def run_config(self) -> RunConfig:
        """Return the same as the command line's configuration; ConfigError, TypeError."""
        if isinstance(self.disks, (str, bytes)) or not isinstance(self.disks, Sequence):
            raise TypeError(
                f"disks is a list of disks, not {type(self.disks).__name__}: write disks=[...]"
            )
        path, number = (str, os.PathLike), (int, float)
        check_type("kernel", self.kernel, path, "a path")
        check_type("initrd", self.initrd, (*path, type(None)), "a path or None")
        check_type("cpus", self.cpus, int, "int")
        check_type("cpu", self.cpu, str, "str")
        check_type("append", self.append, str, "str")
        check_type("cmdline", self.cmdline, (str, type(None)), "str or None")
        check_type("timeout_s", self.timeout_s, (*number, type(None)), "seconds or None")
        return RunConfig(
            kernel=self.kernel,
            disks=tuple(as_disk_config(one) for one in self.disks),
            initrd=self.initrd,
            cmdline=self.cmdline,
            append=self.append,
            memory_bytes=_memory_bytes(self.memory),
            cpu=parse_cpu_option(self.cpu),
            cpus=self.cpus,
            timeout_s=self.timeout_s,
            console="none",
            mmio=self.mmio,
            serve=self.serve,
            rtc=self.rtc,
            discovery=self.discovery,
            agent=_agent_way(self.agent),
        )


def disk(
    what: AnyDisk,
    *,
    serial: str = "",
    queues: int = 1,
    writeback: bool = True,
    rate_limit: RateLimit | None = None,
) -> DiskConfig:
    """Return disk ``what`` with options for ``MachineConfig.disks``.

    ``serial`` is what the guest reads in /sys/block/vda/serial, at most 20 bytes.  With
    ``writeback`` off every write is stable when it completes.
    """
    if isinstance(what, (DiskConfig, VhostUserDiskConfig)):
        raise TypeError("disk() takes a disk without options")
    check_type("disk(): serial", serial, str, "str")
    check_type("disk(): queues", queues, int, "int")
    if not isinstance(writeback, bool):
        raise TypeError(f"disk(): writeback must be True or False, not {writeback!r}")
    check_type("disk(): rate_limit", rate_limit, (RateLimit, type(None)), "RateLimit or None")
    source = _Source(as_disk(what))
    return DiskConfig(
        source=source, serial=serial, queues=queues, writeback=writeback,
        rate_limit=rate_limit or RateLimit(),
    )


def disk_of(source: object) -> Disk | None:
    """Return the disk of a script behind ``source``; None if it is no script's."""
    return source.disk if isinstance(source, _Source) else None


def as_disk_config(what: AnyDisk) -> AnyDiskConfig:
    """Return the configuration of a disk of ``MachineConfig.disks``; ConfigError."""
    if isinstance(what, (DiskConfig, VhostUserDiskConfig)):
        return what
    return disk(what)


class _Source:
    """A disk of a script's, as ``config.Source``."""

    snapshot, overlay = False, ""
    files: tuple[str, ...] = ()

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.location = disk.name
        self.read_only = disk.read_only
        self.is_shared = disk.is_shared

    def open(
        self, *, report: Callable[[str], None], until_s: float | None,
        made: contextlib.ExitStack,
    ) -> BlockBackend:
        """See ``config.Source.open``."""
        return self.disk.open(report=report, until_s=until_s, made=made)


def check_type(name: str, value: object, kinds: type | tuple[type, ...], what: str) -> None:
    """Raise TypeError that calls it ``name`` unless ``value``, no bool, is one of ``kinds``."""
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise TypeError(f"{name} must be {what}, not {type(value).__name__}")


def _agent_way(agent: str | bool) -> str:
    """Return one of ``config.AGENT_WAYS``, or a word that is none."""
    if isinstance(agent, bool):
        return "inject" if agent else "none"
    check_type("agent", agent, str, "True, False, 'image', 'inject' or 'none'")
    return agent


def _memory_bytes(memory: str | int) -> int:
    if isinstance(memory, int) and not isinstance(memory, bool):
        return memory
    if not isinstance(memory, str):
        raise TypeError(f"memory must be a text as '256M' or bytes, not {type(memory).__name__}")
    size = size_in_bytes(memory, MAX_SIZE_BYTES)
    if size is None:
        raise ConfigError(
            f"memory {shown(memory)!r}",
            f"is not a size up to {format_size(MAX_SIZE_BYTES)}; write 256M or 1G",
        )
    if memory.isdecimal():
        raise ConfigError(f"memory {memory!r}", f"has no unit: write '{memory}M', or bytes as int")
    return size
