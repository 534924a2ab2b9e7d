"""The PVH entry of an ELF kernel, given in a note (System V ABI, chapter 5, "Note Section").

The note is XEN_ELFNOTE_PHYS32_ENTRY of Xen's ``elfnote.h``; its descriptor is the entry's physical
address.  Linux has it with CONFIG_PVH, and so have other kernels that boot under Xen or QEMU.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from pyvmm.x86.image import ImageFile, align_up

XEN_NAME = b"Xen\0"
XEN_ELFNOTE_PHYS32_ENTRY = 18

MAX_NOTE_BYTES = 1 << 20
"""How much of all PT_NOTE segments together is looked at; Linux has some hundred bytes."""

_HEADER = struct.Struct("<III")


def find_pvh_entry(image: ImageFile, notes: Sequence[tuple[int, int, int]]) -> int | None:
    """The PVH entry's physical address, None without such a note.

    ``notes`` are the PT_NOTE segments as ``(file offset, length in bytes, alignment)``.
    ConfigError for notes that are cut off, too long together, or that contradict each other.
    """
    if (total := sum(length for _, length, _ in notes)) > MAX_NOTE_BYTES:
        raise image.error(f"its notes (PT_NOTE) are {total} bytes long; "
                          f"the limit is {MAX_NOTE_BYTES}")
    entry = None
    for offset, length, alignment in notes:
        if offset + length > image.size_bytes:
            raise image.error(f"truncated: a note segment (PT_NOTE) ends at byte "
                              f"{offset + length}, the file at {image.size_bytes}")
        data = image.read_at(offset, length)
        # The ABI says 8 for 64-bit files; every linker writes 4 unless the segment says 8.
        for name, kind, description in _each_note(image, data, offset, 8 if alignment == 8 else 4):
            if name != XEN_NAME or kind != XEN_ELFNOTE_PHYS32_ENTRY:
                continue
            if len(description) not in (4, 8):
                raise image.error(f"PVH note: descsz is {len(description)}, must be 4 or 8")
            found = int.from_bytes(description, "little")
            if entry not in (None, found):
                raise image.error(f"two PVH notes, with entries {entry:#x} and {found:#x}")
            entry = found
    return entry


def _each_note(
    image: ImageFile, data: bytes, base: int, alignment: int
) -> Iterator[tuple[bytes, int, bytes]]:
    """``(name, type, descriptor)`` of each note in ``data``, which is at ``base`` in the file."""
    at = 0
    while any(data[at : at + _HEADER.size]):  # zeros are padding at the end
        if at + _HEADER.size > len(data):
            raise image.error(f"note at byte {base + at} is cut off by the end of its segment")
        name_bytes, description_bytes, kind = _HEADER.unpack_from(data, at)
        name_at = at + _HEADER.size
        description_at = align_up(name_at + name_bytes, alignment)
        end = description_at + description_bytes
        if end > len(data):
            raise image.error(f"note at byte {base + at}: namesz {name_bytes:#x} and descsz "
                              f"{description_bytes:#x} run past the end of its segment, "
                              f"{len(data) - at} bytes on")
        yield data[name_at : name_at + name_bytes], kind, data[description_at:end]
        at = align_up(end, alignment)
