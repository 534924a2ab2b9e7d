"""A machine's configuration and kernel as plain data, for the file ``state`` of a snapshot.

Disks have records of their own, because a snapshot holds their content too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from pyvmm.config import DiskConfig, RunConfig, Source
from pyvmm.errors import ConfigError, StateError
from pyvmm.state import Fields
from pyvmm.virtio.rate_limit import RateLimit
from pyvmm.x86 import layout
from pyvmm.x86.cpu_mask import CpuModel
from pyvmm.x86.image import EntryKind, Kernel, KernelKind

_TEXTS = ("append", "console", "mmio", "serve", "rtc", "discovery", "agent")
_LIMITS = ("ops_per_s", "ops_burst", "bytes_per_s", "bytes_burst")
_MAX_TEXT = 1 << 16
_MAX = (1 << 63) - 1


def save_config(config: RunConfig, own_devices: Sequence[str] = ()) -> dict[str, object]:
    """Return ``config`` as plain data: a disk without its source, the CPU's name only.

    ``own_devices`` are the names of the devices that a script brought.
    """
    state: dict[str, object] = {name: getattr(config, name) for name in _TEXTS}
    return state | {
        "kernel": os.fspath(config.kernel),
        "initrd": None if config.initrd is None else os.fspath(config.initrd),
        "cmdline": config.cmdline,
        "memory_bytes": config.memory_bytes,
        "cpu": config.cpu.name,
        "cpus": config.cpus,
        "timing": config.timing,
        "devices": list(own_devices),
        "disks": [_save_disk(disk) for disk in config.disks if isinstance(disk, DiskConfig)],
    }


def restore_config(
    data: object, sources: Sequence[Source]
) -> tuple[RunConfig, tuple[str, ...]]:
    """Return what ``save_config`` saved: the configuration, with ``sources`` of its disks, and the
    names of devices.

    It has no limit of time.  StateError.
    """
    fields = Fields("config", data)
    texts = {name: _text(fields, name) for name in _TEXTS}
    kernel, cpu = _text(fields, "kernel"), _text(fields, "cpu")
    initrd, cmdline = (fields.optional_text(name, _MAX_TEXT) for name in ("initrd", "cmdline"))
    memory_bytes = fields.integer("memory_bytes", 1, _MAX)
    cpus, timing = fields.integer("cpus", 1, 1 << 16), fields.boolean("timing")
    disks, devices = fields.take("disks"), fields.take("devices")
    fields.end()
    if not isinstance(disks, list) or len(disks) != len(sources):
        raise fields.error("disks", f"is not a list of {len(sources)}")
    if not isinstance(devices, list) or len(devices) > layout.MAX_VIRTIO_DEVICES:
        raise fields.error("devices", "is not a short list")
    names = tuple(name for name in devices if isinstance(name, str))
    if len(names) != len(devices):
        raise fields.error("devices", "has an element that is no name")
    try:
        config = RunConfig(
            kernel=kernel, initrd=initrd, cmdline=cmdline, append=texts["append"],
            memory_bytes=memory_bytes, cpu=CpuModel(name=cpu), cpus=cpus,
            console=texts["console"], mmio=texts["mmio"], serve=texts["serve"], rtc=texts["rtc"],
            timing=timing, discovery=texts["discovery"], agent=texts["agent"],
            disks=tuple(map(_restore_disk, disks, sources)),
        )
    except ConfigError as error:
        raise StateError("config", f"cannot be used: {error}") from error
    return config, names


def save_kernel(kernel: Kernel) -> dict[str, object]:
    """Return what is told of ``kernel`` once it has been loaded, as plain data."""
    return {
        "path": kernel.path, "kind": str(kernel.kind), "start": kernel.start, "end": kernel.end,
        "entry": kernel.entry, "entry_kind": str(kernel.entry_kind), "version": kernel.version,
        "protocol": kernel.protocol, "is_linux": kernel.is_linux,
    }


def restore_kernel(data: object) -> Kernel:
    """Return the kernel that ``save_kernel`` saved: it cannot be loaded again; StateError."""
    fields = Fields("kernel", data)
    path, kind, entry_kind = (_text(fields, name) for name in ("path", "kind", "entry_kind"))
    start, end, entry = (fields.integer(name, 0, _MAX) for name in ("start", "end", "entry"))
    version, protocol = _text(fields, "version"), fields.integer("protocol", 0, 0xFFFF)
    is_linux = fields.boolean("is_linux")
    fields.end()
    if kind not in tuple(KernelKind):
        raise fields.error("kind", "is no kind of kernel")
    if entry_kind not in tuple(EntryKind):
        raise fields.error("entry_kind", "is no kind of entry")
    return Kernel(
        path=path, kind=KernelKind(kind), start=start, end=end, entry=entry,
        entry_kind=EntryKind(entry_kind), segments=(), setup_header=None, initrd_addr_max=0,
        cmdline_limit=0, protocol=protocol, version=version, is_linux=is_linux,
    )


def _save_disk(disk: DiskConfig) -> dict[str, object]:
    return {
        "serial": disk.serial, "queues": disk.queues, "writeback": disk.writeback,
        "rate_limit": [getattr(disk.rate_limit, name) for name in _LIMITS],
    }


def _restore_disk(data: object, source: Source) -> DiskConfig:
    fields = Fields("config of a disk", data)
    serial, queues = _text(fields, "serial"), fields.integer("queues", 1, 1 << 16)
    writeback, limits = fields.boolean("writeback"), fields.take("rate_limit")
    fields.end()
    if (
        not isinstance(limits, list) or len(limits) != len(_LIMITS)
        or not all(type(limit) is int for limit in limits)
    ):
        raise fields.error("rate_limit", f"is not a list of {len(_LIMITS)} integers")
    return DiskConfig(
        source=source, serial=serial, queues=queues, writeback=writeback,
        rate_limit=RateLimit(**dict(zip(_LIMITS, limits, strict=True))),
    )


def _text(fields: Fields, name: str) -> str:
    value = fields.optional_text(name, _MAX_TEXT)
    if value is None:
        raise fields.error(name, "is None")
    return value
