"""Guest RAM: host mappings, reached only through bounds-checked guest physical addresses.

Python slices silently shorten, and ``struct.pack_into`` accepts negative offsets.  So every access
checks start, length, sign and wrap here (compare vm-memory's ``bytes.rs``).  A bad one raises
``GuestMemoryError(gpa, length)``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator, Sequence
from types import TracebackType

from pyvmm.errors import GuestMemoryError, HostError
from pyvmm.startup.types import Protocol, Record

PAGE_SIZE = 4096
HUGE_PAGE = 2 << 20
_GIB = 1 << 30
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000  # mmap.MAP_NORESERVE came with Python 3.13
_MREMAP_TO = 1 | 2  # MREMAP_MAYMOVE | MREMAP_FIXED
_MAP_FAILED = (1 << 64) - 1
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class RamLayer(Record, kw_only=False):
    """A file that holds ``runs``, ``(offset, length)`` in bytes, of a RAM image; None: all of it.

    A byte of the image is at the same offset in the file.
    """

    fd: int
    runs: tuple[tuple[int, int], ...] | None


class MappableImage(Protocol):
    """The content of all RAM, as ``pyvmm.ram.image`` keeps it.  Regions follow without gaps."""

    @property
    def size_bytes(self) -> int:
        """The size of the RAM in bytes."""

    @property
    def layers(self) -> Sequence[RamLayer]:
        """The files, each over those before it; the first one holds everything."""

    def share(self) -> MappableImage:
        """Return another handle of the same image; each is closed once."""

    def close(self) -> None:
        """Give up this handle."""


class Region:
    """``length`` bytes of RAM at guest physical ``gpa``: ``view``.

    They begin at ``offset`` in ``GuestMemory.fd``, if it has one, at ``position`` in an image.
    """

    __slots__ = ("end", "gpa", "length", "offset", "position", "view")

    def __init__(self, gpa: int, view: memoryview, offset: int = 0, position: int = 0) -> None:
        self.gpa = gpa
        self.view = view
        self.length = len(view)
        self.end = gpa + self.length
        self.offset = offset
        self.position = position

    @property
    def host_address(self) -> int:
        """Host virtual address of the first byte."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.view))


class GuestMemory:
    """The only holder of guest RAM.

    ``ranges`` are ``(gpa, length)`` pairs in bytes, ascending and disjoint.  The mapping is private
    anonymous memory with huge pages (0.2 us a page).  With ``shared=True`` it is a memfd (5 us a
    page), needed only where another process must see it.  ``fd`` is then its descriptor, sealed.
    Otherwise its receiver could shrink it under us, which would be a SIGBUS.

    Host and guest address of a region agree modulo 2 MiB, from 1 GiB on modulo 1 GiB.  If they did
    not, KVM would map pages of 4 KiB whatever the host has: a boot makes 3.5 times the exits then.
    A region under 2 MiB has no room for a huge page.

    With an ``image`` RAM begins as the image is.  Reads share its pages, and a page that is written
    becomes this memory's own.  A forked child has the RAM only inside ``copied_by_fork``.
    """

    def __init__(
        self,
        ranges: Sequence[tuple[int, int]],
        *,
        shared: bool = False,
        image: MappableImage | None = None,
    ) -> None:
        offsets, total = _place(ranges)
        self.fd: int | None = None
        self.image: MappableImage | None = None
        self._map: mmap.mmap | None = None
        try:
            if shared:
                self.fd = os.memfd_create("pyvmm-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
                os.ftruncate(self.fd, total)
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._map, start = map_aligned(total, self.fd)
        except (OSError, ValueError, OverflowError) as error:
            if self.fd is not None:
                os.close(self.fd)
            raise HostError(f"cannot map {total >> 20} MiB of guest RAM: {error}") from error
        # Fewer faults and TLB misses; a kernel without THP refuses, which costs only speed.
        with contextlib.suppress(OSError):
            self._map.madvise(mmap.MADV_HUGEPAGE, start, total)
        self._closed = False
        self._start, self._extent = start, total
        position, regions = 0, []
        with memoryview(self._map) as root:
            for (gpa, length), offset in zip(ranges, offsets, strict=True):
                view = root[start + offset : start + offset + length]
                regions.append(Region(gpa, view, offset, position))
                position += length
        self.regions = tuple(regions)
        self._advise_fork(mmap.MADV_DONTFORK)
        if image is not None:
            with contextlib.ExitStack() as on_error:
                on_error.callback(self.close)
                self.map_image(image)
                on_error.pop_all()

    @classmethod
    def over(cls, buffer: bytearray | mmap.mmap, gpa: int = 0) -> GuestMemory:
        """Return RAM over a buffer that the caller owns, at ``gpa``, as tests of devices need."""
        memory = cls.empty()
        memory.add(gpa, buffer)
        return memory

    @classmethod
    def empty(cls) -> GuestMemory:
        """Return a memory without RAM; ``add`` gives it regions that somebody else owns."""
        memory = cls.__new__(cls)
        memory.fd = None
        memory.image = None
        memory._map = None
        memory._closed = False
        memory.regions = ()
        return memory

    def add(self, gpa: int, buffer: bytearray | mmap.mmap | memoryview) -> Region:
        """Add a region: ``buffer``, which the caller owns, at ``gpa``.

        GuestMemoryError if it is empty, ends above 2^64 or overlaps another region.
        """
        region = Region(gpa, memoryview(buffer).cast("B"))
        existing = self.regions
        if (
            not region.length or gpa < 0 or region.end > 1 << 64
            or any(gpa < other.end and other.gpa < region.end for other in existing)
        ):
            region.view.release()
            raise GuestMemoryError(gpa, len(buffer))
        self.regions = tuple(sorted((*existing, region), key=lambda one: one.gpa))
        return region

    def remove(self, region: Region) -> None:
        """Remove a region that ``add`` made; views taken from it remain the caller's business."""
        self.regions = tuple(one for one in self.regions if one is not region)
        region.view.release()

    @property
    def size_bytes(self) -> int:
        """The size of all RAM in bytes."""
        return sum(region.length for region in self.regions)

    @property
    def is_closed(self) -> bool:
        """True after ``close``: no access works any more."""
        return self._closed

    def contains(self, gpa: int, length: int) -> bool:
        """True if all ``length`` bytes at ``gpa`` lie in one region of RAM."""
        if length < 0:
            return False
        return any(r.gpa <= gpa and gpa + length <= r.end for r in self.regions)

    def view(self, gpa: int, length: int) -> memoryview:
        """Return a writable view of exactly ``length`` bytes of RAM at ``gpa``."""
        if length >= 0:
            end = gpa + length
            for region in self.regions:
                start = region.gpa
                if start <= gpa and end <= region.end:
                    return region.view[gpa - start : end - start]
        raise GuestMemoryError(gpa, length)

    def read(self, gpa: int, length: int) -> bytes:
        """Return a copy of ``length`` bytes at ``gpa``."""
        return bytes(self.view(gpa, length))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Store ``data`` at ``gpa``."""
        self.view(gpa, len(data))[:] = data

    def read_int(self, gpa: int, size: int) -> int:
        """Return the little-endian unsigned integer of ``size`` bytes at ``gpa``."""
        return int.from_bytes(self.read(gpa, size), "little")

    def write_int(self, gpa: int, size: int, value: int) -> None:
        """Store ``value`` as ``size`` little-endian bytes; OverflowError if it does not fit."""
        self.write(gpa, value.to_bytes(size, "little"))

    def map_image(self, image: MappableImage) -> None:
        """Make all RAM what ``image`` holds, at the host addresses that it has; keep a share of it.

        Nobody may use RAM meanwhile.  ValueError for RAM that is shared or somebody else's, or not
        the image's size.  HostError if the host cannot: RAM is then lost.
        """
        if self._map is None or self.fd is not None:
            raise ValueError("only private RAM can be mapped over an image")
        if image.size_bytes != self.size_bytes:
            raise ValueError(f"the image has {image.size_bytes} bytes, RAM {self.size_bytes}")
        share, libc, base = image.share(), _libc(), _address_of(self._map)
        flags = mmap.MAP_PRIVATE | _MAP_FIXED | _MAP_NORESERVE
        try:
            for layer in share.layers:
                runs = ((0, image.size_bytes),) if layer.runs is None else layer.runs
                for start, length, offset in self._places(runs):
                    _mmap(libc, base + start, length, flags, layer.fd, offset)
        except OSError as error:
            share.close()
            hint = "; see vm.max_map_count" if error.errno == errno.ENOMEM else ""
            raise HostError(f"cannot map an image of RAM: {error.strerror}{hint}") from error
        self._advise_fork(mmap.MADV_DONTFORK)
        if self.image is not None:
            self.image.close()
        self.image = share

    def _places(self, runs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
        """Yield start in the mapping, length and position of each part of ``runs`` in a region."""
        for region in self.regions:
            base, stop = region.position, region.position + region.length
            shift = self._start + region.offset - base
            for position, length in runs:
                first, last = max(position, base), min(position + length, stop)
                if first < last:
                    yield first + shift, last - first, first

    def drop_own_pages(self, runs: Sequence[tuple[int, int]]) -> None:
        """Make ``runs``, positions and lengths of whole pages, again as the image is.

        Nobody may use RAM meanwhile.  ValueError without an image.
        """
        if self._map is None or self.image is None:
            raise ValueError("RAM that has no image cannot go back to it")
        for start, length, _ in self._places(runs):
            self._map.madvise(mmap.MADV_DONTNEED, start, length)

    @contextlib.contextmanager
    def copied_by_fork(self) -> Iterator[None]:
        """Let a child that is forked inside have a copy of RAM, which slows fork and guest."""
        self._advise_fork(mmap.MADV_DOFORK)
        try:
            yield
        finally:
            self._advise_fork(mmap.MADV_DONTFORK)

    def _advise_fork(self, advice: int) -> None:
        if self._map is not None:
            self._map.madvise(advice, self._start, self._extent)

    def close(self) -> None:
        """Unmap the RAM; idempotent.

        A view that somebody still has keeps the mapping until it goes, and is no error: the end of
        a run must not depend on it.
        """
        if self._closed:
            return
        self._closed = True
        for region in self.regions:
            region.view.release()
        if self._map is not None:
            with contextlib.suppress(BufferError):
                self._map.close()
            self._map = None
        if self.fd is not None:
            os.close(self.fd)
        if self.image is not None:
            self.image.close()

    def __enter__(self) -> GuestMemory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def map_aligned(length: int, fd: int | None = None) -> tuple[mmap.mmap, int]:
    """Map ``length`` bytes so that their pages can be huge: the first of ``fd``, or private zeroes.

    Return a mapping and the offset of these bytes in it; use no other bytes of it.  They begin at a
    multiple of 2 MiB, from 1 GiB on at a multiple of 1 GiB.  Without room for that they begin at
    any page.  Errors are those of mmap.mmap.
    """
    for alignment in (_GIB, HUGE_PAGE) if length >= _GIB else (HUGE_PAGE,):
        # Python's mmap takes no address: map more than is needed.
        with contextlib.suppress(OSError):
            mapping = _map_private(length + alignment)
            start = -_address_of(mapping) % alignment
            if fd is not None:
                _map_over(mapping, start, length, fd)
            return mapping, start
    return _map_private(length) if fd is None else mmap.mmap(fd, length), 0


def _place(ranges: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """Return each range's offset in one mapping, and the end of all.

    A range with room for a huge page is aligned as its ``gpa`` is.
    """
    offsets, end = [], 0
    for gpa, length in ranges:
        if length >= HUGE_PAGE:
            end += (gpa - end) % (_GIB if length >= _GIB else HUGE_PAGE)
        offsets.append(end)
        end += length
    return offsets, end


def _map_private(length: int) -> mmap.mmap:
    return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)


def _map_over(mapping: mmap.mmap, start: int, length: int, fd: int) -> None:
    """Replace ``length`` bytes of ``mapping`` by the first ones of ``fd``.

    Closing ``mapping`` unmaps them, too.  OSError if the host cannot; ``mapping`` is then closed.
    """
    place = _address_of(mapping) + start
    flags = mmap.MAP_SHARED | _MAP_FIXED
    try:
        _mmap(_libc(), place, length, flags, fd)
    except OSError:
        mapping.close()
        raise


def _address_of(mapping: mmap.mmap | memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    address, length = ctypes.c_void_p, ctypes.c_size_t
    libc.mmap.argtypes = (address, length, *[ctypes.c_int] * 3, ctypes.c_int64)
    libc.mremap.argtypes = (address, length, length, ctypes.c_int, address)
    libc.munmap.argtypes = (address, length)
    return libc


def _mmap(
    libc: ctypes.CDLL, place: int | None, length: int, flags: int, fd: int, offset: int = 0
) -> int:
    """Return the address of a new writable mapping; OSError."""
    found: int = libc.mmap(place, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, offset)
    if found == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found


def replace_page(page: mmap.mmap | memoryview, content: bytes) -> None:
    """Swap in a new page with ``content``: a reader sees the old or the new content, never a mix.

    Plain stores arrive one by one.  Here another page takes the place of ``page`` with one mremap,
    also in a guest that has the page mapped.  Views of ``page`` stay good; a store into it
    meanwhile is lost.  OSError if the host cannot; then nothing has changed.
    """
    libc = _libc()
    fresh = _mmap(libc, None, PAGE_SIZE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, -1)
    ctypes.memmove(fresh, content, PAGE_SIZE)
    if libc.mremap(fresh, PAGE_SIZE, PAGE_SIZE, _MREMAP_TO, _address_of(page)) == _MAP_FAILED:
        error = ctypes.get_errno()
        libc.munmap(fresh, PAGE_SIZE)
        raise OSError(error, "mremap")
