"""Opening, reading and writing frozen disks and the private ones over them, for tests."""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from pyvmm.storage.backend import BlockBackend
from pyvmm.storage.freezing import freeze
from pyvmm.storage.frozen import FrozenDisk
from pyvmm.storage.layers import Layer
from pyvmm.storage.open import DiskSource, open_backend
from pyvmm.storage.private import PrivateDisk

BLOCK = 4096
SIZE = 64 * BLOCK
MIB = 1 << 20


def from_source(stack: ExitStack, **fields: object) -> BlockBackend:
    """Open the disk of a ``DiskSource``; ``stack`` closes it."""
    source = DiskSource(**fields)  # type: ignore[arg-type]
    return stack.enter_context(closing(open_backend(source, report=pytest.fail)))


def snapshot_disk(stack: ExitStack, path: Path, size: int) -> PrivateDisk:
    """Open the file ``path``, made ``size`` bytes long, as a snapshot."""
    path.touch()
    os.truncate(path, size)
    disk = from_source(stack, location=str(path), snapshot=True)
    assert isinstance(disk, PrivateDisk)
    return disk


def frozen_of(disk: BlockBackend, stack: ExitStack) -> FrozenDisk:
    return stack.enter_context(closing(freeze(disk)))


def opened_clone(frozen: FrozenDisk, stack: ExitStack) -> BlockBackend:
    return stack.enter_context(closing(frozen.open(report=pytest.fail)))


def content(disk: BlockBackend) -> bytes:
    return read(disk, 0, disk.size_bytes)


def read(disk: BlockBackend | FrozenDisk, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    disk.readv([memoryview(buffer)], offset)
    return bytes(buffer)


def write(disk: BlockBackend, data: bytes, offset: int) -> None:
    disk.writev([memoryview(data)], offset)


def layers_of(disk: PrivateDisk) -> list[Layer]:
    """Return the layers below ``disk``, the newest first."""
    found, layer = [], disk.frozen.newest
    while layer is not None:
        found.append(layer)
        layer = layer.below
    return found
