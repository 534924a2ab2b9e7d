"""What a kernel file is, and whether it can boot here, found out without booting it.

``inspect`` takes the time to unpack the kernel; ``missing_options`` is for ``pyvmm run``, which has
none to spare before a boot and more after a failed one.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from pyvmm.errors import ConfigError, PyvmmError
from pyvmm.linux import config as linux_config
from pyvmm.linux import file_systems, payload
from pyvmm.linux.compression import Compression, UnpackError, detect
from pyvmm.linux.config import KernelConfig
from pyvmm.linux.requirements import Guest, Problem, problems
from pyvmm.x86 import layout
from pyvmm.x86.image import ImageFile, Kernel
from pyvmm.x86.loader import parse_kernel

IN_KERNEL = "in the kernel (IKCONFIG)"

_BANNER = re.compile(rb"Linux version ([\x20-\x7e]{1,256})")
_MAGIC_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Everything that a kernel file says of itself.

    ``packed_bytes`` is the size of its compressed part, ``unpacked_bytes`` of what comes out of it:
    both are 0 for a kernel that is not compressed.  ``unknown`` says why it could not be unpacked,
    "" if it could.  ``config`` is None if the kernel has none inside and none lies beside it.
    """

    kernel: Kernel
    size_bytes: int
    version: str
    compression: Compression
    packed_bytes: int
    unpacked_bytes: int
    unknown: str
    config: KernelConfig | None


def inspect(
    path: str | os.PathLike[str], config_file: str | os.PathLike[str] | None = None
) -> Inspection:
    """Inspect the kernel at ``path``, its configuration taken from ``config_file`` if there is one.

    Else that is the kernel's own, or what lies beside it.  ConfigError if ``path`` is no kernel
    that could be loaded into any amount of RAM, or ``config_file`` no configuration.
    """
    config = _read_config(Path(config_file)) if config_file is not None else None
    with ImageFile(path) as image:
        kernel = parse_kernel(image, layout.MMIO_GAP_START)
        compression, packed_bytes, unpacked, unknown = _unpack(image, kernel)
        size_bytes = image.size_bytes
    version = kernel.version
    if not version and (banner := _BANNER.search(unpacked)):
        version = banner[1].decode("ascii")
    if config is None:
        config = linux_config.extract(unpacked, IN_KERNEL)
    if config is None:
        config = linux_config.beside(Path(path), version)
    return Inspection(
        kernel=kernel,
        size_bytes=size_bytes,
        version=version,
        compression=compression,
        packed_bytes=packed_bytes,
        unpacked_bytes=len(unpacked) if packed_bytes else 0,
        unknown=unknown,
        config=config,
    )


def missing_options(
    path: str | os.PathLike[str],
    *,
    initrd: str | os.PathLike[str] | None,
    disk_head: bytes | None,
    acpi_off: bool = False,
    unpack: bool = False,
) -> list[Problem]:
    """Why the kernel at ``path`` will not boot with this initrd and disk; [] if nothing is known.

    ``disk_head`` is the start of the root disk, up to ``file_systems.HEAD_BYTES``; None without a
    disk.  ``acpi_off`` is what the command line says.  Only a configuration beside the kernel is
    looked at, which takes some milliseconds; with ``unpack``, first the one inside the kernel,
    which takes seconds.  It never raises because of what it reads: this is to explain a failure,
    not to be one.
    """
    try:
        guest = replace(describe_guest(initrd, disk_head), acpi_off=acpi_off)
        with ImageFile(path) as image:
            kernel = parse_kernel(image, layout.MMIO_GAP_START)
            config = None
            if unpack:
                config = linux_config.extract(_unpack(image, kernel)[2], IN_KERNEL)
        if config is None:
            config = linux_config.beside(Path(path), kernel.version)
    except (PyvmmError, OSError, MemoryError):
        return []
    return problems(config, guest) if config is not None else []


def describe_guest(
    initrd: str | os.PathLike[str] | None, disk_head: bytes | None
) -> Guest:
    """What a guest with this initrd and this root disk asks of its kernel; ConfigError, initrd."""
    compression = None
    if initrd is not None:
        with ImageFile(initrd) as image:
            compression = detect(image.read_at(0, min(image.size_bytes, _MAGIC_BYTES)))
    # With an initrd, it is the initrd that knows what is on the disk.
    known = disk_head is not None and initrd is None
    return Guest(
        has_disk=disk_head is not None,
        initrd_compression=compression,
        file_system=file_systems.detect(disk_head) if known and disk_head is not None else None,
    )


def _unpack(image: ImageFile, kernel: Kernel) -> tuple[Compression, int, bytes, str]:
    """``(compression, packed size in bytes, the kernel as it runs, why that is not known)``."""
    if kernel.setup_header is None:
        if sum(segment.length for segment in kernel.segments) > payload.MAX_KERNEL_BYTES:
            return Compression.NONE, 0, b"", f"it is over {payload.MAX_KERNEL_BYTES} bytes"
        parts = [image.read_at(part.file_offset, part.length) for part in kernel.segments]
        return Compression.NONE, 0, b"".join(parts), ""
    compression, length = Compression.NONE, 0
    try:
        offset, length = payload.locate(image.read_at(0, payload.HEAD_BYTES))
        if not 0 < length <= payload.MAX_KERNEL_BYTES or offset + length > image.size_bytes:
            return Compression.NONE, 0, b"", "its header says nothing of a payload"
        packed = image.read_at(offset, length)
        compression = detect(packed)
        return compression, length, payload.unpack(packed)[1], ""
    except (UnpackError, PyvmmError) as error:
        return compression, length, b"", str(error)


def _read_config(path: Path) -> KernelConfig:
    try:
        config = linux_config.read(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError("--config", f"cannot read {path}: {reason}") from error
    except UnpackError as error:
        raise ConfigError("--config", f"{path}: {error}") from error
    if config is None:
        raise ConfigError("--config", f"{path} is no kernel configuration (CONFIG_...=y)")
    return config
