"""Overlays: against a model, through power cuts and new starts, and as damaged files"""

from __future__ import annotations

import contextlib
import zlib

from fuzz.source import Source
from fuzz.target import Target
from pyvmm.errors import ConfigError
from pyvmm.storage.bitmap import BLOCK_SIZE
from pyvmm.storage.memory import MemoryBackend
from pyvmm.storage.overlay import OverlayBackend
from pyvmm.storage.overlay_format import BITMAP_OFFSET, format_store, store_bytes

_SIZES = (16 * BLOCK_SIZE, 15 * BLOCK_SIZE + 512, 512, BLOCK_SIZE, 9 * BLOCK_SIZE - 512)
_HEADER_BYTES = 40
_MOST_STEPS = 60


class OverlayTarget(Target):
    """An overlay reads as what was written, else as its base, whatever happens in between."""

    is_structured = True
    max_bytes = 1024

    def run(self, data: bytes) -> None:
        """Do to an overlay what ``data`` says, then damage its file."""
        source = Source(data)
        size = source.pick(_SIZES)
        base = b"".join(bytes([sector * 7 + 1 & 0xFF]) * 512 for sector in range(size // 512))
        store = bytearray(store_bytes(size))
        format_store(MemoryBackend(store), size, 7)
        case = _Case(source, base, store)
        for _ in range(_MOST_STEPS):
            if not source.more:
                break
            case.step()
        case.check_all()
        case.close()
        _damage(source, base, store)


class _Case:
    """An open overlay and its model."""

    def __init__(self, source: Source, base: bytes, store: bytearray) -> None:
        self._source = source
        self._base = base
        self._store = store
        self._model = bytearray(base)
        self._discarded: set[int] = set()
        self._disk = _open(base, store)

    def step(self) -> None:
        """One request, or a new start."""
        source, disk, size = self._source, self._disk, len(self._base)
        sectors = size // 512
        first = source.number(0, sectors - 1)
        count = source.number(1, min(sectors - first, 24))
        offset, length = first * 512, count * 512
        match source.number(0, 7):
            case 0 | 1:
                self._write(offset, length, durable=source.chance(64))
            case 2:
                self._check(offset, length)
            case 3:
                disk.discard(offset, length)
                self._discarded.update(range(first, first + count))
            case 4:
                disk.write_zeroes(offset, length, unmap=source.chance(128))
                self._know(offset, bytes(length))
            case 5:
                disk.flush()
            case 6:
                disk.close()
                self._disk = _open(self._base, self._store)
            case 7:
                with contextlib.suppress(OSError):
                    outside = source.edge(0, size, size - 512)
                    disk.readv([memoryview(bytearray(512))], outside)
                    assert outside + 512 <= size, f"512 bytes read at {outside} of {size}"

    def _write(self, offset: int, length: int, *, durable: bool) -> None:
        data = (self._source.take(4) or b"\xee") * length
        data = data[:length]
        cut = self._source.number(0, length)
        self._disk.writev([memoryview(data)[:cut], memoryview(data)[cut:]], offset,
                          durable=durable)
        self._know(offset, data)

    def _know(self, offset: int, data: bytes) -> None:
        self._model[offset : offset + len(data)] = data
        self._discarded.difference_update(range(offset // 512, (offset + len(data)) // 512))

    def _check(self, offset: int, length: int) -> None:
        got = bytearray(length)
        self._disk.readv([memoryview(got)], offset)
        if got == self._model[offset : offset + length]:
            return
        for at in range(0, length, 512):
            sector = (offset + at) // 512
            if sector not in self._discarded:
                wanted = self._model[offset + at : offset + at + 512]
                assert got[at : at + 512] == wanted, f"sector {sector} reads as something else"

    def check_all(self) -> None:
        """The whole disk reads as the model, in one piece."""
        self._check(0, len(self._base))

    def close(self) -> None:
        """Close it, and open it once more: nothing is lost."""
        self._disk.close()
        self._disk = _open(self._base, self._store)
        self.check_all()
        self._disk.close()


def _open(base: bytes, store: bytearray) -> OverlayBackend:
    reports: list[str] = []
    disk = OverlayBackend(MemoryBackend(base), MemoryBackend(store), name="fuzz.overlay",
                          base_stamp=7, report=reports.append)
    assert not reports, reports
    return disk


def _damage(source: Source, base: bytes, store: bytearray) -> None:
    """Another file in the overlay's place: refused, or used without any other error."""
    at = source.number(0, _HEADER_BYTES + 8) if source.chance(128) \
        else source.number(0, len(store))
    patch = source.take(source.bits(5))
    store[at : at + len(patch)] = patch
    if source.chance(128):  # with a checksum that is right
        store[_HEADER_BYTES : _HEADER_BYTES + 4] = zlib.crc32(store[:_HEADER_BYTES]).to_bytes(
            4, "little")
    if source.chance(64):
        del store[source.number(0, len(store)) // 512 * 512 :]
    with contextlib.suppress(ConfigError):
        disk = OverlayBackend(
            MemoryBackend(base), MemoryBackend(store), name="fuzz.overlay", base_stamp=7,
            report=lambda line: None,
        )
        with contextlib.suppress(OSError):
            disk.readv([memoryview(bytearray(len(base)))], 0)
            disk.writev([memoryview(bytes(512))], 0)
            disk.flush()
        disk.close()


def make() -> Target:
    """Return the target."""
    assert BITMAP_OFFSET > _HEADER_BYTES
    return OverlayTarget()
