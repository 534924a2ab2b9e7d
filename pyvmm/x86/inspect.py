"""Find out a kernel file's kind and whether it can boot here, without booting it.

``inspect`` takes the time to unpack the kernel.  ``read_configuration`` is for ``pyvmm run``, which
has no time before a boot and some after a failed one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyvmm.errors import ConfigError, PyvmmError
from pyvmm.linux import config as linux_config
from pyvmm.linux import payload
from pyvmm.linux.compression import PIECE_BYTES, Compression, UnpackError, detect
from pyvmm.linux.config import KernelConfig
from pyvmm.linux.formats import MAGIC_BYTES
from pyvmm.linux.scan import IN_KERNEL, Scan, check_packed, scan, unpack_and_scan
from pyvmm.linux.work import Budget, WorkError
from pyvmm.x86 import layout
from pyvmm.x86.image import ImageFile, Kernel
from pyvmm.x86.loader import parse_kernel

__all__ = ["IN_KERNEL", "Inspection", "inspect", "read_configuration"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Everything that a kernel file tells about itself.

    ``packed_bytes`` is the size of its compressed part, ``unpacked_bytes`` the size of that part
    unpacked; both are 0 for a kernel that is not compressed.  ``unknown`` is the reason why it
    could not be unpacked, "" if it could.  ``config`` is None if the kernel has none inside and
    none lies beside it.
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
    """Inspect the kernel at ``path``, with the configuration ``config_file`` if given.

    Otherwise the kernel's own configuration counts, or the file beside it.  ConfigError if ``path``
    is no kernel that could be loaded into any amount of RAM, or ``config_file`` no configuration.
    """
    config = _read_config(Path(config_file)) if config_file is not None else None
    budget = Budget()
    with ImageFile(path) as image:
        kernel = parse_kernel(image, layout.MMIO_GAP_START)
        look = _look_into(image, kernel, budget)
        size_bytes = image.size_bytes
    version = kernel.version or look.inside.version
    if config is None:
        config = look.inside.config
    if config is None:
        config = linux_config.beside(Path(path), version)
    return Inspection(
        kernel=kernel,
        size_bytes=size_bytes,
        version=version,
        compression=look.compression,
        packed_bytes=look.packed_bytes,
        unpacked_bytes=look.inside.size_bytes if look.packed_bytes else 0,
        unknown=look.unknown,
        config=config,
    )


def read_configuration(
    path: str | os.PathLike[str], *, unpack: bool, budget: Budget | None = None
) -> KernelConfig | None:
    """Return the configuration of the kernel at ``path``: its own, else the file beside it.

    Without ``unpack`` only that file is read, which takes some milliseconds.  Unpacking takes
    seconds, and stops once a configuration is found.  If it takes more than ``budget``, the file
    beside the kernel counts.  None if there is neither, and after any error: this function explains
    a failure and must not be one.
    """
    budget = budget or Budget()
    config = beside = None
    with contextlib.suppress(PyvmmError, OSError, MemoryError), ImageFile(path) as image:
        kernel = parse_kernel(image, layout.MMIO_GAP_START)
        # First, because unpacking may leave nothing of the budget.
        with contextlib.suppress(PyvmmError, OSError, MemoryError):
            beside = linux_config.beside(Path(path), kernel.version, budget)
        if unpack:
            config = _look_into(image, kernel, budget, whole=False).inside.config
    return config or beside


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """The contents of a kernel file; ``inside`` is empty if ``unknown`` gives a reason."""

    inside: Scan
    compression: Compression = Compression.NONE
    packed_bytes: int = 0
    unknown: str = ""


def _look_into(
    image: ImageFile, kernel: Kernel, budget: Budget, *, whole: bool = True
) -> _Look:
    """Look into the kernel as it runs; without ``whole``, stop once everything is found."""
    if kernel.setup_header is None:
        if sum(segment.length for segment in kernel.segments) > payload.MAX_KERNEL_BYTES:
            return _Look(inside=Scan(), unknown=f"it is over {payload.MAX_KERNEL_BYTES} bytes")
        try:
            return _Look(inside=scan(_parts(image, kernel), whole=whole, budget=budget))
        except WorkError as error:
            return _Look(inside=Scan(), unknown=f"to look through it {error}")
    compression, length = Compression.NONE, 0
    try:
        offset, length = payload.locate(image.read_at(0, payload.HEAD_BYTES))
        if length == 0 or offset + length > image.size_bytes:
            return _Look(inside=Scan(), unknown="its header says nothing of a payload")
        compression = detect(image.read_at(offset, min(length, MAGIC_BYTES)))
        check_packed(compression, length)
        inside = unpack_and_scan(image.read_at(offset, length), whole=whole, budget=budget)
    except PyvmmError as error:
        return _Look(inside=Scan(), compression=compression, packed_bytes=length,
                     unknown=str(error))
    return _Look(inside=inside, compression=compression, packed_bytes=length)


def _parts(image: ImageFile, kernel: Kernel) -> Iterator[bytes]:
    """Yield the segments of an ELF kernel, a piece at a time."""
    for segment in kernel.segments:
        end = segment.file_offset + segment.length
        for offset in range(segment.file_offset, end, PIECE_BYTES):
            yield image.read_at(offset, min(PIECE_BYTES, end - offset))


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
