"""Block requests as the specification describes them (virtio 1.2, 5.2.6 "Device Operation")."""

from __future__ import annotations

from dataclasses import dataclass, field

from pyvmm.virtio.spec import BlockFeature

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
SERIAL = b"fuzz"


@dataclass
class ModelDisk:
    """The disk as the specification describes it; ``unknown`` are sectors that were discarded."""

    now: bytearray
    features: int
    read_only: bool
    unknown: set[int] = field(default_factory=set)


@dataclass
class Ask:
    """A request that was offered: what the model says must come of it."""

    status_at: int = 0
    status: int = OK
    buffer: int = 0
    data: bytes = b""
    lengths: tuple[int, ...] = (0,)
    """Return the values that used.len may have."""
    kind: int | None = None
    sector: int = 0
    length: int = 0
    sent: bytes = b""
    room: int = 0
    ranges: list[tuple[int, int]] = field(default_factory=list)
    """Sectors, of a discard or write-zeroes request: the first, and how many."""

    def execute(self, disk: ModelDisk) -> None:
        """Do the request to the model, if it is one of the disk's (5.2.6 "Device Operation")."""
        kind, length, sent = self.kind, self.length, self.sent
        if kind is None:
            return
        self.status, self.lengths = OK, (1,)
        first, end = self.sector * 512, self.sector * 512 + length
        sectors = range(self.sector, self.sector + length // 512)
        fits = length > 0 and length % 512 == 0 and end <= len(disk.now)
        if kind == IN and fits:
            if disk.unknown.isdisjoint(sectors):
                self.data = bytes(disk.now[first:end])
            self.lengths = (self.room + 1,)
        elif kind == IN or (kind == OUT and (disk.read_only or not fits)):
            self.status = IOERR
        elif kind == OUT:
            disk.now[first:end] = sent
            disk.unknown.difference_update(sectors)
        elif kind == GET_ID:
            self.data = SERIAL.ljust(20, b"\0")[: self.room]
            self.lengths = (len(self.data) + 1,)
        elif kind == FLUSH and disk.features & BlockFeature.FLUSH:
            pass
        elif (kind == DISCARD and disk.features & BlockFeature.DISCARD) or (
            kind == WRITE_ZEROES and disk.features & BlockFeature.WRITE_ZEROES
        ):
            self._execute_ranges(disk)
        else:
            self.status = UNSUPP

    def _execute_ranges(self, disk: ModelDisk) -> None:
        """Discard or zero every range; none of them if one is not on the disk."""
        if any((first + count) * 512 > len(disk.now) for first, count in self.ranges):
            self.status = IOERR
            return
        for first, count in self.ranges:
            sectors = range(first, first + count)
            if self.kind == DISCARD:
                disk.unknown.update(sectors)
            else:
                disk.now[first * 512 : (first + count) * 512] = bytes(count * 512)
                disk.unknown.difference_update(sectors)
