"""The memory that a front end shares: regions mapped from file descriptors that it sent.

A region is known by two addresses.  Descriptors have guest physical ones (GPA).  SET_VRING_ADDR has
user addresses, which are the front end's own virtual ones.

Access to a page behind the end of a file is SIGBUS, which would end this process and every
connection of it.  So a region must lie in its file, and the file must be one that cannot shrink: a
memfd with the seal F_SEAL_SHRINK.  ``trust_memory`` accepts any other, too.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Callable, Sequence

from pyvmm.errors import PyvmmError
from pyvmm.memory import PAGE_SIZE, GuestMemory, Region
from pyvmm.vhost_user.protocol import MemoryRegion

MAX_REGIONS = 32
"""Regions of one front end, the answer to GET_MAX_MEM_SLOTS."""
MAX_BYTES = 1 << 40
"""Bytes of all regions of one front end: 1 TiB."""

_ADDRESS_END = 1 << 64


class UnusableRegionError(PyvmmError):
    """A region that cannot be mapped, or that is not there; the text names it and the reason."""


class _Mapping:
    """One region, mapped, but not yet part of a ``GuestMemory``."""

    __slots__ = ("_map", "described", "region", "view")

    def __init__(self, described: MemoryRegion, fd: int, *, trust: bool) -> None:
        """UnusableRegionError if ``fd`` cannot be ``described``; ``fd`` stays the caller's."""
        self.described = described
        self.region: Region | None = None
        gpa, size, user_address, offset = described
        if not size:
            raise UnusableRegionError(f"{named(described)} is empty")
        if max(gpa, user_address) + size > _ADDRESS_END:
            raise UnusableRegionError(f"{named(described)} goes beyond 2^64")
        if not trust and not _cannot_shrink(fd):
            raise UnusableRegionError(
                f"{named(described)} is in a file that could shrink and so end this process; share"
                " memory from a memfd sealed with F_SEAL_SHRINK (QEMU: memory-backend-memfd)"
                " or allow it by pyvmm export --trust-memory"
            )
        try:
            status = os.fstat(fd)
            if offset + size > status.st_size:
                raise UnusableRegionError(
                    f"{named(described)}, at {offset:#x} of its file, leaves it: it has"
                    f" {status.st_size:#x} bytes"
                )
            # Offset and length in huge pages, if the file is made of these.
            page = max(PAGE_SIZE, status.st_blksize)
            start = offset // page * page
            end = min(-(-(offset + size) // page) * page, status.st_size)
            self._map = mmap.mmap(fd, end - start, offset=start)
        except (OSError, ValueError, OverflowError) as error:
            raise UnusableRegionError(f"{named(described)} cannot be mapped: {error}") from error
        skipped = offset - start
        self.view = memoryview(self._map)[skipped : skipped + size]

    def overlaps(self, other: MemoryRegion) -> bool:
        """True if both regions would contain some address of the same kind."""
        mine = self.described
        return (
            mine.gpa < other.gpa + other.size and other.gpa < mine.gpa + mine.size
        ) or (
            mine.user_address < other.user_address + other.size
            and other.user_address < mine.user_address + mine.size
        )

    def close(self) -> None:
        self.view.release()
        # If a view of it is left somewhere, the mapping goes when that view does.
        with contextlib.suppress(BufferError):
            self._map.close()


class PeerMemory:
    """All regions of one front end; a device sees them as ``memory``."""

    def __init__(self, *, trust: bool = False) -> None:
        self.memory = GuestMemory.empty()
        self._trust = trust
        self._mappings: list[_Mapping] = []

    def add(self, described: MemoryRegion, fd: int) -> None:
        """Map one more region from ``fd``, which stays the caller's.

        UnusableRegionError, with nothing changed, if that fails.
        """
        self._mappings.append(self._map(described, fd, self._mappings))
        self._show()

    def remove(self, described: MemoryRegion) -> None:
        """Unmap the region of these addresses and size: "The mmap offset is ignored".

        The caller has dropped every view of it.  UnusableRegionError if there is none.
        """
        for mapping in self._mappings:
            if mapping.described[:3] == described[:3]:
                self._mappings.remove(mapping)
                self._hide([mapping])
                return
        raise UnusableRegionError(f"{named(described)} is not mapped")

    def replace(
        self,
        regions: Sequence[tuple[MemoryRegion, int]],
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Replace all regions by these with their file descriptors, then call ``then``.

        The caller has dropped every view of the old ones.  UnusableRegionError if one cannot be
        mapped.  After that, or if ``then`` raises, nothing has changed; ``then`` must drop its
        views first.
        """
        new: list[_Mapping] = []
        try:
            for described, fd in regions:
                new.append(self._map(described, fd, new))
        except UnusableRegionError:
            self._hide(new)
            raise
        old, self._mappings = self._mappings, new
        self._take_away(old)
        self._show()
        try:
            then()
        except BaseException:
            self._mappings = old
            self._hide(new)
            self._show()
            raise
        self._hide(old)

    def gpa_of(self, user_address: int) -> int | None:
        """Return the GPA of the front end's ``user_address``; None if that is not shared."""
        for mapping in self._mappings:
            offset = user_address - mapping.described.user_address
            if 0 <= offset < mapping.described.size:
                return mapping.described.gpa + offset
        return None

    def close(self) -> None:
        """Unmap everything; idempotent.  The caller has dropped every view."""
        old, self._mappings = self._mappings, []
        self._hide(old)

    def _map(self, described: MemoryRegion, fd: int, mapped: Sequence[_Mapping]) -> _Mapping:
        if len(mapped) >= MAX_REGIONS:
            raise UnusableRegionError(f"{named(described)} is one more than {MAX_REGIONS}")
        if sum(one.described.size for one in mapped) + described.size > MAX_BYTES:
            raise UnusableRegionError(f"{named(described)}: all memory is over {MAX_BYTES} bytes")
        for other in mapped:
            if other.overlaps(described):
                raise UnusableRegionError(f"{named(described)} overlaps {named(other.described)}")
        return _Mapping(described, fd, trust=self._trust)

    def _show(self) -> None:
        for mapping in self._mappings:
            if mapping.region is None:
                mapping.region = self.memory.add(mapping.described.gpa, mapping.view)

    def _take_away(self, mappings: Sequence[_Mapping]) -> None:
        for mapping in mappings:
            if mapping.region is not None:
                self.memory.remove(mapping.region)
                mapping.region = None

    def _hide(self, mappings: Sequence[_Mapping]) -> None:
        self._take_away(mappings)
        for mapping in mappings:
            mapping.close()


def named(region: MemoryRegion) -> str:
    """Return a description of ``region`` for people."""
    return (
        f"the region of {region.size:#x} bytes at GPA {region.gpa:#x}"
        f" (user address {region.user_address:#x})"
    )


def _cannot_shrink(fd: int) -> bool:
    """True if the file of ``fd`` cannot become shorter; False if it knows no seals."""
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:
        return False
