"""Partition tables, read as Linux reads them (block/partitions/): GPT and MBR with logical ones.

Nothing is trusted: a table that makes no sense has no partitions.
"""

from __future__ import annotations

from collections.abc import Callable

from pyvmm.startup.types import Record

MAX_PARTITIONS = 128
"""Partitions on a disk; any beyond are ignored."""
ROOT_KINDS = ("4f68bce3-e8cd-4db1-96e7-fbcaf984b709",)
"""The Discoverable Partitions Specification's type of a root for x86-64."""

_SECTOR, _LARGE_SECTOR = 512, 4096
_TABLE, _ENTRY, _ENTRIES = 446, 16, 4
_DISK_SIGNATURE = 440
_PROTECTIVE = 0xEE
_EXTENDED = (0x05, 0x0F, 0x85)
_FIRST_LOGICAL = 5
_GPT_ENTRY_MIN, _GPT_ENTRY_MAX = 128, 4096
_NAME_BYTES = 72


class Partition(Record):
    """``offset`` and ``length`` are bytes of the disk.

    ``kind`` is the type: a GUID or, in an MBR, two hexadecimal digits.  PARTUUID= finds it by
    ``uuid``, PARTLABEL= by ``label``.
    """

    number: int
    offset: int
    length: int
    kind: str
    uuid: str
    label: str = ""


def table_kind(head: bytes) -> str:
    """Return the kind of the partition table of a disk, ``gpt`` or ``dos``; "" without one."""
    if head[_SECTOR : _SECTOR + 8] == b"EFI PART":
        return "gpt"
    if head[510:512] != b"\x55\xaa":
        return ""
    # A boot sector without a table ends so, too.  In a table an entry's first byte is a flag.
    entries = _dos_entries(head)
    is_table = all(entry[0] in (0, 0x80) for entry in entries) and any(e[4] for e in entries)
    return "dos" if is_table and not _protects(entries) else ""


def lost_gpt(head: bytes) -> str:
    """Return the fault of a disk whose MBR protects a GPT that is not there; "" without fault.

    Linux takes no partition from such an MBR (block/partitions/msdos.c).
    """
    if head[_SECTOR : _SECTOR + 8] == b"EFI PART" or not _protects(_dos_entries(head)):
        return ""
    if head[_LARGE_SECTOR : _LARGE_SECTOR + 8] == b"EFI PART":
        return (f"is partitioned for sectors of {_LARGE_SECTOR} bytes, and has sectors of "
                f"{_SECTOR}: Linux sees no partition")
    return "has a protective MBR, but no GPT behind it: Linux sees no partition"


def read_partitions(read: Callable[[int], bytes]) -> tuple[Partition, ...]:
    """Return the partitions of a disk; ``read`` gives its bytes from an offset on, some KiB."""
    head = read(0)
    match table_kind(head):
        case "gpt":
            return tuple(_gpt(head, read))[:MAX_PARTITIONS]
        case "dos":
            return tuple(_dos(head, read))
    return ()


def _gpt(head: bytes, read: Callable[[int], bytes]) -> list[Partition]:
    # UEFI 2.10, 5.3: the place of the array of entries, their number, and the length of each.
    at = _number(head, _SECTOR + 72, 8) * _SECTOR
    count, size = _number(head, _SECTOR + 80, 4), _number(head, _SECTOR + 84, 4)
    if not _GPT_ENTRY_MIN <= size <= _GPT_ENTRY_MAX:
        return []
    table = head[at:] if at + size * count <= len(head) else read(at)
    found = []
    for index in range(min(count, MAX_PARTITIONS, len(table) // size)):
        entry = table[index * size : (index + 1) * size]
        first, last = _number(entry, 32, 8), _number(entry, 40, 8)
        if not any(entry[:16]) or not first:
            continue
        name = entry[56 : 56 + _NAME_BYTES].decode("utf-16-le", "replace").partition("\0")[0]
        found.append(Partition(
            number=index + 1, offset=first * _SECTOR, length=max(0, last - first + 1) * _SECTOR,
            kind=_guid(entry[:16]), uuid=_guid(entry[16:32]), label=name,
        ))
    return found


def _dos(head: bytes, read: Callable[[int], bytes]) -> list[Partition]:
    signature = _number(head, _DISK_SIGNATURE, 4)
    found = []
    extended = 0

    def add(number: int, entry: bytes, start: int) -> None:
        found.append(Partition(
            number=number, offset=start * _SECTOR, length=_number(entry, 12, 4) * _SECTOR,
            kind=f"{entry[4]:02x}", uuid=f"{signature:08x}-{number:02x}",
        ))

    for index, entry in enumerate(_dos_entries(head)):
        start = _number(entry, 8, 4)
        if not entry[4] or not start:
            continue
        if entry[4] in _EXTENDED:
            extended = extended or start
        else:
            add(index + 1, entry, start)
    # Each logical partition has its own table, which names it and the place of the next table.
    # Tables without one are counted as well, or a disk full of them would be read to its end.
    table_at, number = extended, _FIRST_LOGICAL
    been_at: set[int] = set()
    while table_at and table_at not in been_at and max(number, len(been_at)) < MAX_PARTITIONS:
        been_at.add(table_at)
        entries = _dos_entries(read(table_at * _SECTOR)[:_SECTOR])
        table_at, here = 0, table_at
        for entry in entries:
            start = _number(entry, 8, 4)
            if entry[4] in _EXTENDED:
                table_at = table_at or (extended + start if start else 0)
            elif entry[4] and start:
                add(number, entry, here + start)
                number += 1
    return found


def _dos_entries(sector: bytes) -> list[bytes]:
    if sector[510:512] != b"\x55\xaa":
        return []
    places = range(_TABLE, _TABLE + _ENTRIES * _ENTRY, _ENTRY)
    return [sector[at : at + _ENTRY] for at in places]


def _protects(entries: list[bytes]) -> bool:
    """True if the ``entries`` of an MBR leave the disk to a GPT."""
    return any(entry[4] == _PROTECTIVE for entry in entries)


def _guid(data: bytes) -> str:
    """Return 16 bytes as a GUID is written: its first three fields are little-endian."""
    text = (data[3::-1] + data[5:3:-1] + data[7:5:-1] + data[8:]).hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def _number(data: bytes, offset: int, length: int) -> int:
    return int.from_bytes(data[offset : offset + length], "little")
