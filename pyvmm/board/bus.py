"""The two address spaces a guest reaches devices through: port I/O (PIO) and MMIO.

A bus maps addresses to devices.  An address that no device has behaves as on a PC: reads give all
ones, writes vanish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pyvmm.startup.types import Protocol


class BusDevice(Protocol):
    """Something that answers accesses of 1, 2, 4 or 8 bytes at an offset from its base."""

    def read(self, offset: int, size: int) -> int:
        """The little-endian value of ``size`` bytes at ``offset``."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Take ``value``, ``size`` bytes wide, at ``offset``."""


class Bus:
    """Dispatch by a table of granules of ``1 << granule_bits`` addresses.

    PIO uses single ports (0 bits), MMIO 4 KiB pages (12 bits), so that an access costs one
    dictionary look-up whatever the number of devices.
    """

    def __init__(self, name: str, granule_bits: int) -> None:
        self.name = name
        self._bits = granule_bits
        self._table: dict[int, tuple[int, int, BusDevice]] = {}
        self.find: Callable[[int], tuple[int, int, BusDevice] | None] = self._table.get
        """``(base, end, device)`` of granule ``address >> granule_bits``, or None: for a loop that
        cannot afford ``read`` and ``write``."""

    def add(self, base: int, length: int, device: BusDevice) -> None:
        """Give ``length`` addresses from ``base`` to ``device``.

        ValueError if another device has one of them.
        """
        granule = 1 << self._bits
        if base < 0 or length <= 0 or base % granule or length % granule:
            raise ValueError(f"{self.name} {base:#x}+{length:#x}: not granules of {granule}")
        keys = range(base >> self._bits, (base + length) >> self._bits)
        for key in keys:
            if key in self._table:
                start, end, owner = self._table[key]
                raise ValueError(
                    f"{self.name} {base:#x}+{length:#x} cannot be a {type(device).__name__}: "
                    f"{start:#x}+{end - start:#x} is taken by a {type(owner).__name__}"
                )
        for key in keys:
            self._table[key] = (base, base + length, device)

    def put_before(
        self, granules: Iterable[int],
        make: Callable[[tuple[int, int, BusDevice] | None], BusDevice],
    ) -> None:
        """Have each granule of ``granules`` served by ``make(entry)``; at any time.

        ``entry`` is that of ``find``.  The device gets addresses, not offsets, also of accesses
        that leave the granule.
        """
        for key in granules:
            self._table[key] = (0, 1 << 65, make(self._table.get(key)))

    def read(self, address: int, size: int) -> int:
        """Return what the guest reads; all ones unless the access is inside one device."""
        entry = self._table.get(address >> self._bits)
        if entry is None or address + size > entry[1]:
            return (1 << 8 * size) - 1
        return entry[2].read(address - entry[0], size)

    def write(self, address: int, size: int, value: int) -> None:
        """Take what the guest writes; ignore it unless the access is inside one device."""
        entry = self._table.get(address >> self._bits)
        if entry is not None and address + size <= entry[1]:
            entry[2].write(address - entry[0], size, value)
