"""Pages of guest RAM that hold something: this process's own ones, and those of an image.

The kernel knows the own pages of a private mapping, so nothing needs to log what the guest writes.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import struct
from collections.abc import Iterator

from pyvmm.errors import HostError
from pyvmm.memory import PAGE_SIZE, GuestMemory
from pyvmm.ram.image import RamImage
from pyvmm.ram.runs import Run, coarser, joined, total, union

# Of a pagemap entry's highest byte: bit 63 present, 62 swapped, 61 a page of a file (or shared).
_OWN = bytes(int(top & 0xC0 != 0 and not top & 0x20) for top in range(256))
_ENTRY = 8
_ENTRIES_AT_ONCE = 64 << 10

# linux/fs.h: struct pm_scan_arg, from Linux 6.7 on.
_PAGEMAP_SCAN = 0xC0606610
_SCAN = struct.Struct("<12Q")
_FILE, _PRESENT, _SWAPPED, _ZERO_PAGE = 1 << 2, 1 << 3, 1 << 4, 1 << 5
_REGIONS_AT_ONCE = 4096
_NO_SCAN = frozenset({errno.ENOTTY, errno.EINVAL, errno.ENOSYS})


def own_runs(memory: GuestMemory) -> list[Run]:
    """Return the pages that differ from what ``memory`` was mapped over, at most: its own.

    Of memory without an image these are the touched ones.  ValueError for shared memory, whose
    pages are all in a file.  The guest may run: then some of its last pages may be missing.
    """
    if memory.fd is not None:
        raise ValueError("shared RAM has no own pages")
    try:
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"cannot see which pages of RAM are used: {error}") from error
    try:
        return list(joined(_own_runs(memory, pagemap)))
    finally:
        os.close(pagemap)


def own_bytes(memory: GuestMemory) -> int:
    """Return the bytes of RAM that belong to ``memory`` alone."""
    return total(own_runs(memory))


def drop_own(memory: GuestMemory) -> None:
    """Make RAM again as its image is; nobody may use it meanwhile.  ValueError without an image.

    Pages that were only read stay mapped: a guest that had to fault all of them in again would run
    slower for a while, and to unmap them takes longer than to find the own pages.
    """
    memory.drop_own_pages(coarser(own_runs(memory), memory.size_bytes))


def held_runs(memory: GuestMemory) -> list[Run]:
    """Return the parts of RAM that may not be zero: own pages, and data of the image."""
    own = own_runs(memory)
    return union(own, data_runs(memory.image)) if isinstance(memory.image, RamImage) else own


def data_runs(image: RamImage) -> list[Run]:
    """Return the parts of ``image`` that may not be zero; all, on file systems without holes."""
    found: list[Run] = []
    for layer in image.layers:
        found = union(found, list(file_runs(layer.fd, layer.runs, image.size_bytes)))
    return found


def file_runs(fd: int, within: tuple[Run, ...] | None, size_bytes: int) -> Iterator[Run]:
    """Yield the parts of the file ``fd`` that are no holes, and lie in ``within``."""
    for offset, length in ((0, size_bytes),) if within is None else within:
        at, end = offset, offset + length
        while at < end:
            try:
                at = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    break
                raise
            stop = min(os.lseek(fd, at, os.SEEK_HOLE), end)
            if at < stop:
                yield at, stop - at
            at = stop


def _own_runs(memory: GuestMemory, pagemap: int) -> Iterator[Run]:
    with_zero_page = memory.image is not None
    for region in memory.regions:
        address = region.host_address
        shift = region.position - address
        try:
            for start, end in _scanned(pagemap, address, region.length, with_zero_page):
                yield start + shift, end - start
        except OSError as error:
            if error.errno not in _NO_SCAN:
                raise
            for start, end in _read(pagemap, address, region.length):
                yield start + shift, end - start


def _scanned(
    pagemap: int, address: int, length: int, with_zero_page: bool
) -> Iterator[tuple[int, int]]:
    """Yield start and end of runs of own pages; OSError from kernels that cannot tell."""
    regions = array.array("Q", bytes(24 * _REGIONS_AT_ONCE))  # start, end, categories
    place, _ = regions.buffer_info()
    unwanted = _FILE if with_zero_page else _FILE | _ZERO_PAGE
    end = address + length
    while address < end:
        argument = bytearray(_SCAN.pack(
            _SCAN.size, 0, address, end, 0, place, _REGIONS_AT_ONCE, 0,
            unwanted, unwanted, _PRESENT | _SWAPPED, _FILE,
        ))  # fmt: skip
        found = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, argument)
        for index in range(0, 3 * found, 3):
            yield regions[index], regions[index + 1]
        address = _SCAN.unpack(argument)[4]


def _read(pagemap: int, address: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield the same on any kernel, from an entry a page."""
    first, count = address // PAGE_SIZE, -(-length // PAGE_SIZE)
    entries = bytearray(_ENTRIES_AT_ONCE * _ENTRY)
    for done in range(0, count, _ENTRIES_AT_ONCE):
        wanted = min(_ENTRIES_AT_ONCE, count - done) * _ENTRY
        with memoryview(entries)[:wanted] as view:
            got = os.preadv(pagemap, [view], (first + done) * _ENTRY)
        if got != wanted:
            raise HostError("cannot see which pages of RAM are used: /proc/self/pagemap is short")
        flags, at = entries[_ENTRY - 1 : wanted : _ENTRY].translate(_OWN), 0
        base = address + done * PAGE_SIZE
        while (start := flags.find(1, at)) >= 0:
            stop = flags.find(0, start)
            at = stop if stop >= 0 else len(flags)
            yield base + start * PAGE_SIZE, base + at * PAGE_SIZE
