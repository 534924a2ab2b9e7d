"""Read all of a snapshot, and find what is damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from pyvmm.errors import HostError, SnapshotError
from pyvmm.ram.runs import Run, common, total
from pyvmm.ram.write import chunk_crcs, zero_crc
from pyvmm.snapshot.files import layout
from pyvmm.snapshot.files.saved import Saved
from pyvmm.snapshot.files.sparse import data_ranges, sparse_crc
from pyvmm.storage.frozen import FrozenDisk


def problems(
    saved: Saved, disks: Mapping[int, str], *, report: Callable[[str], None]
) -> Iterator[SnapshotError]:
    """Yield everything that is wrong with a snapshot that could be opened, and with its bases.

    All of RAM and of the overlays is read.  ``disks`` names the files under the guest's disks, by
    index, that are at other places now.
    """
    for one in saved.chain:
        yield from content_problems(one)
    yield from _image_problems(saved)
    for index in disks:
        if index not in range(len(saved.disks)):
            yield layout.no_such_disk(index, saved.path, len(saved.disks))
    for disk in saved.disks:
        try:
            FrozenDisk.open_saved(
                disks.get(disk.index, disk.location), saved.overlay_path(disk.index),
                size_bytes=disk.size_bytes, stamp_ns=disk.stamp_ns, read_only=disk.read_only,
                replaced=disk.index in disks, report=report,
            ).close()
        except SnapshotError as error:
            yield error


def content_problems(saved: Saved) -> Iterator[SnapshotError]:
    """Yield what is wrong with the files in one directory."""
    name = saved.path_of(layout.RAM)
    try:
        damaged = list(_damaged_chunks(saved))
    except (OSError, HostError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        yield SnapshotError(name, f"cannot be read: {reason}")
    else:
        if damaged:
            offset = damaged[0] * layout.CHUNK_BYTES
            count = -(-saved.ram.size_bytes // layout.CHUNK_BYTES)
            yield SnapshotError(
                name, f"is damaged: the CRCs of {len(damaged)} of {count} chunks of 1 MiB are "
                f"wrong, the first at {offset:#x}",
            )
    for index, fd in saved.overlay_fds.items():
        overlay = layout.overlay_name(index)
        try:
            if sparse_crc(fd) != saved.crcs.get(overlay):
                yield SnapshotError(saved.path_of(overlay), "is damaged: its CRC is wrong")
        except OSError as error:
            yield SnapshotError(saved.path_of(overlay), f"cannot be read: {error.strerror}")
    for extra in saved.names:
        if not layout.is_file_name(extra):
            yield SnapshotError(saved.path_of(extra), "is no file of a snapshot")


def _damaged_chunks(saved: Saved) -> Iterator[int]:
    """Yield the numbers of chunks of RAM whose CRC is wrong; OSError, HostError."""
    ram, fd = saved.ram, saved.ram_fd
    runs = ram.runs if ram.runs is not None else _data_chunks(fd, ram.size_bytes)
    left = dict(ram.crcs)
    for chunk, crc in chunk_crcs(fd, ram.size_bytes, runs):
        expected = left.pop(chunk, None)
        if expected is None:
            whole = (chunk * layout.CHUNK_BYTES, layout.CHUNK_BYTES)
            expected = zero_crc(total(common(runs, [whole])))
        if crc != expected:
            yield chunk
    yield from left  # chunks that held something, and are holes now


def _data_chunks(fd: int, size_bytes: int) -> list[Run]:
    """Return the chunks of a file that are not holes as runs; OSError."""
    chunk, found = layout.CHUNK_BYTES, list[Run]()
    at = 0
    for start, end in data_ranges(fd):
        start, end = max(at, start // chunk * chunk), min(-(-end // chunk) * chunk, size_bytes)
        if start < end:
            found.append((start, end - start))
            at = end
    return found


def _image_problems(saved: Saved) -> Iterator[SnapshotError]:
    """Yield why RAM could not be mapped by a clone, if it could not."""
    try:
        saved.open_ram().close()
    except SnapshotError as error:
        yield error
