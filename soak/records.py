"""Guests that write numbered records and acknowledge them, and what must be found of these.

``guest/bare/write_records.S`` fills sector N with N, has it flushed, and only then says so.  So
after any end of the VM every record that was acknowledged is there, and whole; and because the
guest writes one after another, nothing is behind the first that is missing.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from pyvmm.storage.open import DiskSource
from soak.errors import TrialError
from soak.processes import pyvmm
from tests.support.bare import LONG_MODE_ENTRY, assemble
from tests.support.kernels import ElfSegment, elf

SECTOR = 512
ACK = re.compile(rb"^([ae])([0-9a-f]{8})$", re.MULTILINE)
NUMBERS = 3 * 4
"""The bytes at the end of the code that the host sets."""


@dataclass(frozen=True, slots=True)
class RecordsGuest:
    """Makes kernel files of the guest; ``folder`` is for the assembler."""

    code: bytes

    @classmethod
    def assembled(cls, folder: Path) -> RecordsGuest:
        """Return one; an error of the assembler's is an AssertionError."""
        folder.mkdir(parents=True, exist_ok=True)
        return cls(assemble("write_records", LONG_MODE_ENTRY, folder)[:-NUMBERS])

    def write(self, path: Path, *, first: int, end: int, packed: bool) -> Path:
        """Return the new kernel file ``path``, of a guest that writes records ``first`` to ``end``.
        """
        numbers = b"".join(number.to_bytes(4, "little") for number in (first, end, packed))
        code = self.code + numbers
        path.write_bytes(elf(ElfSegment(data=code, p_memsz=len(code) + 4096)))
        return path

    @staticmethod
    def start(
        kernel: Path, disk: str, *options: str, timeout_s: float
    ) -> subprocess.Popen[bytes]:
        """Start a VM with ``kernel`` and ``disk``, its console on a pipe."""
        words = pyvmm(
            "run", "--kernel", kernel, "--memory", "16M", "--disk", disk,
            "--timeout", f"{timeout_s:g}", *options,
        )
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )


def acknowledged(console: bytes) -> tuple[list[int], list[int]]:
    """Return the records that ``console`` says are durable, and those that it says are not."""
    found: dict[bytes, list[int]] = {b"a": [], b"e": []}
    # A line that has no end yet was not all said: it may be another number.
    for kind, number in ACK.findall(console[: console.rfind(b"\n") + 1]):
        found[kind].append(int(number, 16))
    return found[b"a"], found[b"e"]


def new_disk(path: Path, sectors: int) -> Path:
    """Return the new file ``path``, all holes."""
    with path.open("wb") as file:
        os.ftruncate(file.fileno(), sectors * SECTOR)
    return path


def read_disk(source: DiskSource) -> bytes:
    """Return all bytes of a disk; of a plain file without asking for its lock, which a server may
    have."""
    if not source.snapshot:
        return Path(source.location).read_bytes()
    with closing(source.open(report=lambda _line: None)) as backend:
        data = bytearray(backend.size_bytes)
        backend.readv([memoryview(data)], 0)
    return bytes(data)


def record(number: int) -> bytes:
    """Return the content of a record's sector."""
    return number.to_bytes(4, "little") * (SECTOR // 4)


def check_records(
    data: bytes | bytearray, acked: Sequence[int], *, first: int, failed: Sequence[int] = ()
) -> int:
    """Return how many records from ``first`` on are in ``data``, as many as were made.

    TrialError if one of ``acked`` is not, if a record is behind one that is missing, or if a sector
    holds anything but its record or zeros; of those that ``failed`` anything may be left.
    """
    nothing = bytes(SECTOR)
    found = {
        number for number in range(len(data) // SECTOR)
        if number not in failed
        and (sector := data[number * SECTOR : (number + 1) * SECTOR]) != nothing
        and _is_record(sector, number)
    }
    if lost := sorted(set(acked) - found):
        raise TrialError(f"lost of {len(acked)} acknowledged records: {_some(lost)}")
    last = max(found, default=first - 1)
    if missing := sorted(set(range(1, last + 1)) - found - set(failed)):
        raise TrialError(f"written up to {last}, without: {_some(missing)}")
    return len([number for number in found if number >= first])


def _is_record(sector: bytes | bytearray, number: int) -> bool:
    if sector != record(number):
        raise TrialError(f"sector {number} is not its record: {sector[:16].hex()} ...")
    return True


def _some(numbers: Sequence[int]) -> str:
    more = ", ..." if len(numbers) > 5 else ""
    return ", ".join(map(str, numbers[:5])) + more
