"""The notes of an ELF kernel (System V ABI, chapter 5, "Note Section").

* XEN_ELFNOTE_PHYS32_ENTRY of Xen's ``elfnote.h``: its descriptor is the physical address of the
  PVH entry.  Linux has it with CONFIG_PVH, and so have other kernels that boot under Xen or QEMU.
* Notes by the name of Linux (``include/linux/elfnote-lto.h``, ``build-salt.h``).

Notes are hints, so one that makes no sense is skipped.  A segment's alignment tells little about
the notes in it.  The linker puts the assembler's ``.note.gnu.property``, aligned to 8 bytes, beside
Linux's own, aligned to 4, and gives the segment the greater alignment.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from pyvmm.errors import ConfigError
from pyvmm.startup.types import Record
from pyvmm.x86.image import ImageFile, align_up

XEN_NAME, LINUX_NAME = b"Xen\0", b"Linux\0"
XEN_ELFNOTE_PHYS32_ENTRY = 18

MAX_NOTE_BYTES = 64 << 10
"""Bytes of all PT_NOTE segments together that are read; Linux has some hundred."""
_MAX_NAME_BYTES = 64

_HEADER = struct.Struct("<III")
_WORD = 4
_PVH_HEAD = XEN_ELFNOTE_PHYS32_ENTRY.to_bytes(4, "little") + XEN_NAME
_ALIGNMENTS = (4, 8)
"""Alignments of notes in a 64-bit file: the linkers' and the ABI's."""


class Notes(Record):
    """``pvh_entries`` are the addresses that PVH notes give, each once, in their order.  ``linux``
    is True if a note has Linux's name."""

    pvh_entries: tuple[int, ...] = ()
    linux: bool = False


def read_notes(image: ImageFile, segments: Sequence[tuple[int, int]]) -> Notes:
    """Read the PT_NOTE ``segments``, each ``(file offset, length in bytes)``.

    No content is an error: a note that is cut off, too long or garbled is skipped.
    """
    entries: dict[int, None] = {}
    linux = False
    left = MAX_NOTE_BYTES
    for offset, length in segments:
        length = min(length, image.size_bytes - offset, left)
        if length <= 0:
            continue
        left -= length
        try:
            data = image.read_at(offset, length)
        except ConfigError:  # the file has shrunk, or its disk fails
            continue
        found: list[int] = []
        for alignment in _ALIGNMENTS:
            for name, kind, description in _each_note(data, alignment):
                linux = linux or name == LINUX_NAME
                is_pvh = name == XEN_NAME and kind == XEN_ELFNOTE_PHYS32_ENTRY
                if is_pvh and len(description) in (4, 8):
                    found.append(int.from_bytes(description, "little"))
            if found:
                break
        entries |= dict.fromkeys(found or _pvh_notes_anywhere(data))
    return Notes(pvh_entries=tuple(entries), linux=linux)


def _pvh_notes_anywhere(data: bytes) -> list[int]:
    """Return the entries of PVH notes at any word of ``data``, whatever comes before them.

    Header and name have 16 bytes, so under either alignment the descriptor is right behind them.
    """
    found, at = [], 0
    while (at := data.find(_PVH_HEAD, at)) >= 0:
        note_at = at - _WORD * 2
        if note_at >= 0 and not note_at % _WORD:
            name_bytes, length, _ = _HEADER.unpack_from(data, note_at)
            description = data[at + len(_PVH_HEAD) :][:length]
            if name_bytes == len(XEN_NAME) and length in (4, 8) and len(description) == length:
                found.append(int.from_bytes(description, "little"))
        at += 1
    return found


def _each_note(data: bytes, alignment: int) -> Iterator[tuple[bytes, int, bytes]]:
    """Yield ``(name, type, descriptor)`` of each note in ``data``, aligned to ``alignment`` bytes.

    After bytes that are no note, it looks for the next note at every word.
    """
    at = 0
    while at + _HEADER.size <= len(data):
        name_bytes, description_bytes, kind = _HEADER.unpack_from(data, at)
        name_at = at + _HEADER.size
        description_at = align_up(name_at + name_bytes, alignment)
        end = description_at + description_bytes
        if not 0 < name_bytes <= _MAX_NAME_BYTES or end > len(data):
            at += _WORD
            continue
        yield data[name_at : name_at + name_bytes], kind, data[description_at:end]
        at = align_up(end, alignment)
