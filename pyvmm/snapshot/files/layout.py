"""The names in a snapshot's directory, the records of its ``state``, and its limits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType

from pyvmm.config import MAX_DISKS
from pyvmm.errors import SnapshotError
from pyvmm.ram.runs import MOST_RUNS as MAX_RUNS

__all__ = [
    "CHUNK_BYTES", "FILES", "MAX_CHAIN", "MAX_RUNS", "RAM", "RECORDS", "STATE", "TEMPORARY",
    "absolute", "is_file_name", "no_such_disk", "overlay_name",
]

STATE = "state"
FILES = "files"
RAM = "ram"
TEMPORARY = ".tmp"
"""Behind the name of a directory in the making."""
MAX_CHAIN = 8
"""Directories of a diff and its bases, down to the full one."""
CHUNK_BYTES = 1 << 20
"""Bytes of RAM with a CRC of their own."""

RECORDS: Mapping[str, int] = MappingProxyType({
    "about": 1, "host": 1, "config": 1, "kernel": 1, "ram": 1, "disks": 1, "machine": 1,
    "base": 1, "files": 1,
})  # fmt: skip
"""The records that a ``state`` may have, and the version of each.  ``Writer`` adds "files"."""

_OVERLAY = ".overlay"
_DISK = "disk"


def overlay_name(index: int) -> str:
    """Return the name of the file that holds what disk ``index`` has over its own file."""
    return f"{_DISK}{index}{_OVERLAY}"


def is_file_name(name: str) -> bool:
    """True if a snapshot may have a file ``name``."""
    if name in (STATE, RAM):
        return True
    digits = name.removeprefix(_DISK).removesuffix(_OVERLAY)
    return digits.isdecimal() and int(digits) < MAX_DISKS and name == overlay_name(int(digits))


def absolute(path: str | os.PathLike[str]) -> str:
    """Return ``path`` as an absolute one, without a slash at its end; SnapshotError if it is no
    file name."""
    text = os.fspath(path)
    if not text:
        raise SnapshotError("the snapshot's directory", "has no name")
    if "\0" in text:
        raise SnapshotError(repr(text), "is no file name: it has a NUL")
    return os.path.join(os.getcwd(), text).rstrip("/") or "/"


def no_such_disk(index: int, snapshot: str, count: int) -> SnapshotError:
    """Return the error for a disk ``index`` that is none of the ``count`` of ``snapshot``."""
    numbers = {0: "no disks", 1: "1 disk, number 0"}.get(
        count, f"{count} disks, numbers 0 to {count - 1}"
    )
    return SnapshotError(f"disk {index}", f"{snapshot} has {numbers}")
