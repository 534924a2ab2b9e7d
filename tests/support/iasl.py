"""ACPICA's compiler and disassembler (Debian: acpica-tools), the judge of our ACPI tables."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

HEADER_BYTES = 36
# Of a table's header: the checksum, and the ID and revision of what wrote it.
_WRITERS_OWN = (slice(9, 10), slice(28, 36))
_COMPLAINT = re.compile(r"warning|error|invalid|incorrect|not contain", re.IGNORECASE)


def disassemble(table: bytes, directory: Path) -> str:
    """``table`` as source; fails on any complaint about it."""
    binary = directory / "table.dat"
    binary.write_bytes(table)
    done = subprocess.run(
        ["iasl", "-p", directory / "table", "-d", binary], capture_output=True, text=True
    )
    source = (directory / "table.dsl").read_text() if done.returncode == 0 else ""
    said = done.stdout + done.stderr + source
    assert done.returncode == 0, said
    assert not _COMPLAINT.search(said), said
    return source


def compile_source(source: str, directory: Path, *, remarks: bool = True) -> bytes:
    """The table that ``source`` describes, as written (not optimised); fails on any complaint.

    Without ``remarks``, advice on style is none.
    """
    text = directory / "source.asl"
    text.write_text(source)
    done = subprocess.run(
        ["iasl", "-oa", "-p", directory / "compiled", text], capture_output=True, text=True
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "0 Errors, 0 Warnings" + (", 0 Remarks" if remarks else "") in said, said
    return (directory / "compiled.aml").read_bytes()


def without_writer(table: bytes) -> bytes:
    """``table`` with the part of its header zeroed in which two writers of it may differ."""
    neutral = bytearray(table)
    for part in _WRITERS_OWN:
        neutral[part] = bytes(part.stop - part.start)
    return bytes(neutral)
