"""Directories of snapshots with a small RAM and made-up records, as ``Writer`` makes them."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import struct
import tempfile
import zlib
from pathlib import Path

from pyvmm.kvm.cpuid_entry import CpuidEntry, pack
from pyvmm.snapshot.files import layout
from pyvmm.snapshot.files.content import About, Base, SavedDisk, SavedRam
from pyvmm.snapshot.files.host import host_record
from pyvmm.snapshot.files.writer import Writer
from pyvmm.storage.raw import RawBackend
from pyvmm.storage.saving import write_overlay

MIB = 1 << 20
CPU = [CpuidEntry(0, 0, False, 1, *struct.unpack("<III", b"GenuntelineI"))]
REGIONS = ((0, 640 << 10), (MIB, 3 * MIB))


@functools.cache
def disk_image(index: int) -> Path:
    """A disk of 1 MiB for snapshots to be made over, until the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="pyvmm-disks-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / f"disk{index}.img"
    path.write_bytes(bytes([index + 1]) * MIB)
    return path


def make_overlay(path: str, index: int, content: bytes) -> None:
    """Make the overlay ``path`` over disk ``index``: the disk begins with ``content``."""
    held = content.ljust(-(-len(content) // 4096) * 4096, b"\0")

    def copy(store: RawBackend, at: int, offset: int, length: int) -> None:
        store.writev([memoryview(held)[offset : offset + length]], at)

    stamp_ns = disk_image(index).stat().st_mtime_ns
    write_overlay(path, MIB, stamp_ns, [(0, len(held))], copy)


def make_writable(path: Path) -> None:
    """Let a test damage the files of the snapshot at ``path``."""
    for file in path.iterdir():
        file.chmod(0o600)


def ram_content(size_bytes: int, mark: int = 1) -> bytearray:
    """RAM of which one page in eight holds something."""
    ram = bytearray(size_bytes)
    for at in range(0, size_bytes, 8 * 4096):
        ram[at : at + 4096] = struct.pack("<QQ", mark, at) * 256
    return ram


def crcs_of(ram: bytes | bytearray, runs: tuple[tuple[int, int], ...] | None) -> dict[int, int]:
    """The CRC32 of each chunk of ``ram``, as the record has them."""
    found = {}
    for at in range(0, len(ram), layout.CHUNK_BYTES):
        end = min(at + layout.CHUNK_BYTES, len(ram))
        part = ram[at:end] if runs is None else b"".join(
            ram[max(start, at) : min(start + length, end)] for start, length in runs
        )
        if part != bytes(len(part)):
            found[at // layout.CHUNK_BYTES] = zlib.crc32(part)
    return found


def write_sparse(fd: int, ram: bytes | bytearray) -> int:
    """Write the pages of ``ram`` that are not zero; return how many bytes."""
    os.ftruncate(fd, len(ram))
    held = 0
    for at in range(0, len(ram), 4096):
        page = ram[at : at + 4096]
        if page != bytes(len(page)):
            os.pwrite(fd, page, at)
            held += len(page)
    return held


def make_saved(
    path: Path,
    *,
    mark: int = 1,
    overlays: dict[int, bytes] | None = None,
    disks: int = 2,
    base: tuple[Path, bytes] | None = None,
    runs: tuple[tuple[int, int], ...] = ((MIB, 8192), (2 * MIB, 4096)),
    regions: tuple[tuple[int, int], ...] = REGIONS,
) -> bytes:
    """Make a snapshot at ``path``, a diff over ``base`` (path, id) if there is one; its id."""
    overlays = {0: b"overlay" * 100} if overlays is None else overlays
    size = sum(length for _, length in regions)
    about = About.new()
    with Writer(path) as writer:
        ram = ram_content(size, mark)
        if base is not None:
            whole, ram = ram, bytearray(size)
            for start, length in runs:
                ram[start : start + length] = whole[start : start + length]
        fd = writer.create(layout.RAM)
        try:
            held = write_sparse(fd, ram)
        finally:
            os.close(fd)
        for index, content in overlays.items():
            name = layout.overlay_name(index)
            try:
                make_overlay(writer.path_of(name), index, content)
            except OSError as error:
                raise writer.failed(error, name) from error
        saved_ram = SavedRam(
            regions=regions, crcs=crcs_of(ram, None if base is None else runs), held_bytes=held,
            runs=None if base is None else runs,
        )
        writer.finish({
            "about": about.record(),
            "host": host_record(supported=CPU, given=[pack(CPU)] * 2, tsc_khz=2_000_000),
            "config": {"memory_bytes": size, "cmdline": None, "append": "console=ttyS0"},
            "kernel": {"path": "/boot/bzImage", "version": "6.1.0-47-amd64 (debian)"},
            "ram": saved_ram.record(),
            "disks": [
                SavedDisk(
                    index=index, location=str(disk_image(index)), size_bytes=MIB,
                    stamp_ns=disk_image(index).stat().st_mtime_ns, read_only=False,
                    overlay_bytes=writer.size_of(layout.overlay_name(index))
                    if index in overlays else None,
                ).record()
                for index in range(disks)
            ],
            "machine": {"vcpus": {"vcpu0": {"regs": bytes(range(144)), "mark": mark}}},
            "base": None if base is None else Base.over(str(base[0]), base[1], str(path)).record(),
        })
    return about.id
