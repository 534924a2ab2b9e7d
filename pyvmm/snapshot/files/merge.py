"""Make one full snapshot of a diff and its bases."""

from __future__ import annotations

import os

from pyvmm.errors import SnapshotError
from pyvmm.memory import GuestMemory
from pyvmm.ram.write import Written, write_ram
from pyvmm.snapshot.files import layout
from pyvmm.snapshot.files.check import content_problems
from pyvmm.snapshot.files.content import SavedRam
from pyvmm.snapshot.files.saved import Saved
from pyvmm.snapshot.files.sparse import copy_sparse
from pyvmm.snapshot.files.writer import Writer


def merge(saved: Saved, out: str | os.PathLike[str]) -> SavedRam:
    """Make the directory ``out``, a full snapshot of the same machine; return its record of RAM.

    Everything is checked, and SnapshotError leaves no ``out``.  It has the same id, because a clone
    of it is the same: it may take the place of ``saved``, also as the base of diffs.
    """
    for one in saved.chain:
        for problem in content_problems(one):
            raise SnapshotError(problem.subject, problem.problem)
    with Writer(out) as writer:
        written = _merge_ram(saved, writer)
        for index in saved.overlay_fds:
            _copy_overlay(saved, index, writer)
        ram = SavedRam(
            regions=saved.ram.regions, crcs=written.crcs, held_bytes=written.held_bytes
        )
        writer.finish(saved.records | {"ram": ram.record(), "base": None})
    return ram


def _merge_ram(saved: Saved, writer: Writer) -> Written:
    """Write the file ``ram``; SnapshotError, HostError."""
    with saved.open_ram() as image, GuestMemory(saved.ram.regions, image=image) as memory:
        fd = writer.create(layout.RAM)
        try:
            return write_ram(memory, fd)
        except OSError as error:
            raise writer.failed(error) from error
        finally:
            os.close(fd)


def _copy_overlay(saved: Saved, index: int, writer: Writer) -> None:
    """Copy what disk ``index`` has over its file: it has all layers; SnapshotError."""
    name = layout.overlay_name(index)
    fd = writer.create(name)
    try:
        crc = copy_sparse(saved.overlay_fds[index], fd)
    except OSError as error:
        raise writer.failed(error, name) from error
    finally:
        os.close(fd)
    if crc != saved.crcs.get(name):
        raise SnapshotError(saved.path_of(name), "is damaged: its CRC is wrong")
