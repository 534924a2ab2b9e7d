"""A reader of the newc archive format, written from its description, independent of the writer."""

from __future__ import annotations


def unpack(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Mode and contents of each member, by name."""
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        assert archive[at + 110 + name_size - 1] == 0
        at = (at + 110 + name_size + 3) & ~3
        if name == "TRAILER!!!":
            return found
        found[name] = mode, archive[at : at + size]
        at = (at + size + 3) & ~3
