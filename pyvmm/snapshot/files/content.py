"""The records that describe a snapshot's files: who made them, RAM, disks, the base of a diff.

Each has ``record()``, which makes the plain data, and ``read``, which checks it.
"""

from __future__ import annotations

import os
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from pyvmm.config import MAX_DISKS
from pyvmm.errors import StateError
from pyvmm.snapshot.files import layout
from pyvmm.startup.types import Record
from pyvmm.state import Fields
from pyvmm.x86.layout import MAX_MEMORY

ID_BYTES = 16
_PAGE = 4096
_MAX_U64 = (1 << 64) - 1
_MAX_REGIONS = 16
_MAX_TEXT = 4096
_CRC = struct.Struct("<II")  # a chunk's number, its CRC32


class About(Record):
    """The record ``about``: the snapshot's UUID, when, and by which pyvmm it was made."""

    id: bytes = bytes(ID_BYTES)
    made_ns: int = 0
    version: str = ""
    is_live: bool = False

    @classmethod
    def new(cls, *, live: bool = False) -> About:
        """Return that of a snapshot that is made now, with a fresh random UUID (version 4)."""
        raw = bytearray(os.urandom(ID_BYTES))
        raw[6] = raw[6] & 0x0F | 0x40
        raw[8] = raw[8] & 0x3F | 0x80
        # Not `import pyvmm`, whose file imports rooms above this one; it is loaded all the same.
        version: str = sys.modules["pyvmm"].__version__
        return cls(id=bytes(raw), made_ns=time.time_ns(), version=version, is_live=live)

    def record(self) -> dict[str, object]:
        """Return it as plain data."""
        return {
            "id": self.id, "made_ns": self.made_ns, "pyvmm": self.version, "live": self.is_live
        }

    @classmethod
    def read(cls, data: object) -> About:
        """Return what ``record`` made; StateError."""
        fields = Fields("about", data)
        found = cls(
            id=fields.octets("id", ID_BYTES, ID_BYTES),
            made_ns=fields.integer("made_ns", 0, _MAX_U64),
            version=_text(fields, "pyvmm"),
            is_live=fields.boolean("live"),
        )
        fields.end()
        return found


class Base(Record):
    """The record ``base`` of a diff: its base's directory and id.

    A relative ``path`` begins at the diff's directory, as ``../base`` does.
    """

    path: str
    id: bytes

    @classmethod
    def over(cls, base: str, base_id: bytes, diff: str) -> Base:
        """Return that of ``diff`` over ``base``, both absolute: a relative path if they lie side by
        side, so that they can be moved together."""
        folder, _, name = base.rpartition("/")
        is_beside = folder == diff.rpartition("/")[0]
        return cls(path=f"../{name}" if is_beside else base, id=base_id)

    def resolve(self, diff: str) -> str:
        """Return the absolute path of the base of the directory ``diff``."""
        folder, _, name = os.path.join(diff, self.path).rstrip("/").rpartition("/")
        return f"{os.path.realpath(folder).rstrip('/')}/{name}"

    def record(self) -> dict[str, object]:
        """Return it as plain data."""
        return {"path": self.path, "id": self.id}

    @classmethod
    def read(cls, data: object) -> Base | None:
        """Return what ``record`` made, None for None; StateError."""
        if data is None:
            return None
        fields = Fields("base", data)
        found = cls(path=_text(fields, "path"), id=fields.octets("id", ID_BYTES, ID_BYTES))
        fields.end()
        if not found.path or "\0" in found.path:
            raise fields.error("path", "is no file name")
        return found


class SavedRam(Record):
    """The record ``ram``: what the file ``ram`` holds.

    ``regions`` are (GPA, bytes) and lie one behind the other in the file.  ``crcs`` has a CRC32 for
    each chunk that is not all zero, by its number.  ``held_bytes`` were written.  A diff has
    ``runs``, (offset, bytes) in the file: all other bytes are the base's, and a chunk's CRC covers
    the bytes in runs only, one behind the other.  (``ram.write.Written`` has the same.)
    """

    regions: tuple[tuple[int, int], ...]
    crcs: Mapping[int, int] = MappingProxyType({})
    held_bytes: int = 0
    runs: tuple[tuple[int, int], ...] | None = None

    @property
    def size_bytes(self) -> int:
        """The size of the file, which is that of all RAM."""
        return sum(length for _, length in self.regions)

    def record(self) -> dict[str, object]:
        """Return it as plain data."""
        return {
            "regions": [list(region) for region in self.regions],
            "chunk": layout.CHUNK_BYTES,
            "crcs": b"".join(_CRC.pack(*pair) for pair in sorted(self.crcs.items())),
            "bytes": self.held_bytes,
            "runs": None if self.runs is None else [list(run) for run in self.runs],
        }

    @classmethod
    def read(cls, data: object) -> SavedRam:
        """Return what ``record`` made; StateError."""
        fields = Fields("ram", data)
        regions = fields.pairs("regions", _MAX_REGIONS, (_MAX_U64, MAX_MEMORY))
        _check_ranges(fields, "regions", regions, _MAX_U64 + 1)
        total = sum(length for _, length in regions)
        if not 0 < total <= MAX_MEMORY:
            raise fields.error("regions", f"are not 1 to {MAX_MEMORY} bytes together")
        fields.integer("chunk", layout.CHUNK_BYTES, layout.CHUNK_BYTES)
        crcs = _crcs(fields, -(-total // layout.CHUNK_BYTES))
        held_bytes = fields.integer("bytes", 0, total)
        runs: list[tuple[int, int]] | None = None
        value = fields.take("runs")
        fields.end()
        if value is not None:
            own = Fields("ram", {"runs": value})
            runs = own.pairs("runs", layout.MAX_RUNS, (MAX_MEMORY, MAX_MEMORY))
            _check_ranges(own, "runs", runs, total)
        return cls(
            regions=tuple(regions), crcs=crcs, held_bytes=held_bytes,
            runs=None if runs is None else tuple(runs),
        )


class SavedDisk(Record):
    """One of ``disks``: disk ``index`` is what ``diskN.overlay`` has over the file ``location``.

    The file had ``size_bytes``, and was last modified at ``stamp_ns``, when the snapshot was made.
    ``overlay_bytes`` is the size of the overlay; None if nothing was written.
    """

    index: int
    location: str
    size_bytes: int
    stamp_ns: int
    read_only: bool
    overlay_bytes: int | None

    def record(self) -> dict[str, object]:
        """Return it as plain data."""
        return {
            "location": self.location, "size_bytes": self.size_bytes, "stamp_ns": self.stamp_ns,
            "read_only": self.read_only, "has_overlay": self.overlay_bytes is not None,
            "overlay_bytes": self.overlay_bytes or 0,
        }

    @classmethod
    def read(cls, index: int, data: object) -> SavedDisk:
        """Return what ``record`` made; StateError."""
        fields = Fields(f"disks, disk {index}", data)
        location = _text(fields, "location")
        size_bytes = fields.integer("size_bytes", 1, 1 << 63)
        stamp_ns = fields.integer("stamp_ns", 0, _MAX_U64)
        read_only = fields.boolean("read_only")
        has_overlay = fields.boolean("has_overlay")
        overlay_bytes = fields.integer("overlay_bytes", 0, 1 << 63)
        fields.end()
        return cls(
            index=index, location=location, size_bytes=size_bytes, stamp_ns=stamp_ns,
            read_only=read_only, overlay_bytes=overlay_bytes if has_overlay else None,
        )


def read_disks(data: object) -> tuple[SavedDisk, ...]:
    """Return the record ``disks``, a list of ``SavedDisk.record``; StateError."""
    if not isinstance(data, list) or len(data) > MAX_DISKS:
        raise StateError("disks", f"is no list of at most {MAX_DISKS}")
    return tuple(SavedDisk.read(index, one) for index, one in enumerate(data))


def read_files(data: object) -> dict[str, int]:
    """Return the record ``files``: the CRC of each overlay by name; StateError."""
    found: dict[str, int] = {}
    fields = Fields(layout.FILES, {} if data is None else data)
    for index in range(MAX_DISKS):
        name = layout.overlay_name(index)
        if isinstance(data, dict) and name in data:
            found[name] = fields.integer(name, 0, 0xFFFF_FFFF)
    fields.end()
    return found


def _crcs(fields: Fields, chunks: int) -> dict[int, int]:
    """Return the CRC of each chunk of RAM that has one; there are ``chunks`` chunks."""
    packed = fields.octets("crcs", 0, chunks * _CRC.size)
    if len(packed) % _CRC.size:
        raise fields.error("crcs", f"is no multiple of {_CRC.size} bytes")
    found = dict(_CRC.iter_unpack(packed))
    numbers = list(found)
    if len(found) * _CRC.size != len(packed) or numbers != sorted(numbers):
        raise fields.error("crcs", "has chunks that do not ascend")
    if numbers and numbers[-1] >= chunks:
        raise fields.error("crcs", f"has chunk {numbers[-1]}, and there are {chunks}")
    return found


def _check_ranges(
    fields: Fields, name: str, ranges: Sequence[tuple[int, int]], end: int
) -> None:
    """StateError unless ``ranges`` are whole pages, ascend, do not overlap and end by ``end``."""
    at = 0
    for start, length in ranges:
        if start < at or not length or start + length > end or (start | length) % _PAGE:
            raise fields.error(name, f"are no ascending ranges of pages below {end:#x}")
        at = start + length


def _text(fields: Fields, name: str) -> str:
    text = fields.optional_text(name, _MAX_TEXT)
    if text is None:
        raise fields.error(name, "is no text")
    return text
