"""The facts of a snapshot's directory, for people and programs."""

from __future__ import annotations

import os
import time
import uuid

from pyvmm.snapshot.files.host import read_host
from pyvmm.snapshot.files.layout import STATE
from pyvmm.snapshot.files.saved import Saved

_SECTOR = 512  # stat's st_blocks, whatever the file system


def facts(saved: Saved) -> dict[str, object]:
    """Return what ``pyvmm snapshot info --json`` prints; SnapshotError.

    Sizes are bytes.  ``stored_bytes`` are those that a file takes of its file system.
    """
    host = read_host(saved.record("host"), name=saved.path_of(STATE))
    kernel, config = saved.records.get("kernel"), saved.records.get("config")
    made_s, rest_ns = divmod(saved.about.made_ns, 1_000_000_000)
    return {
        "path": saved.path,
        "id": str(uuid.UUID(bytes=saved.id)),
        "made": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(made_s))}."
        f"{rest_ns // 1_000_000:03}Z",
        "pyvmm": saved.about.version,
        "live": saved.about.is_live,
        "kernel": _field(kernel, "path"),
        "version": _field(kernel, "version"),
        "command_line": _field(config, "cmdline") or _field(config, "append"),
        "cpus": len(host.given),
        "cpu_vendor": host.vendor,
        "tsc_khz": host.tsc_khz,
        "memory_bytes": saved.ram.size_bytes,
        "ram_bytes": saved.ram.held_bytes,
        "stored_bytes": sum(map(_stored_bytes, chain_fds(saved))),
        "disks": [
            {
                "file": disk.location,
                "size_bytes": disk.size_bytes,
                "read_only": disk.read_only,
                "overlay_bytes": None if disk.overlay_bytes is None
                else _stored_bytes(saved.overlay_fds[disk.index]),
            }
            for disk in saved.disks
        ],
        "bases": [
            {"path": base.path, "id": str(uuid.UUID(bytes=base.id))}
            for base in reversed(saved.chain[:-1])
        ],
    }


def chain_fds(saved: Saved) -> list[int]:
    """Return the descriptors of all files of a snapshot and its bases, but the small ones."""
    return [fd for one in saved.chain for fd in (one.ram_fd, *one.overlay_fds.values())]


def _stored_bytes(fd: int) -> int:
    return os.fstat(fd).st_blocks * _SECTOR


def _field(record: object, name: str) -> str | None:
    """Return a text of a record that other rooms read; None if it is not there."""
    value = record.get(name) if isinstance(record, dict) else None
    return value if isinstance(value, str) else None
