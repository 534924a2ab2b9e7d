"""The kernel loader: bzImage and ELF files, notes, an initrd, what the guest is told of them."""

from __future__ import annotations

import random
from collections.abc import Iterable

from fuzz.checks import check_one_line
from fuzz.files import MemoryFile
from fuzz.source import Source
from fuzz.target import Target
from pyvmm.errors import ConfigError
from pyvmm.memory import GuestMemory
from pyvmm.x86.loader import Kernel, load_initrd, load_kernel, write_boot_info
from tests.support.kernels import (
    MIB,
    SETUP_FIELDS,
    ElfSegment,
    bzimage,
    elf,
    note,
    note_segment,
    pvh_note,
)

_RAM_BYTES = 4 * MIB
_CMDLINE = "console=ttyS0 root=/dev/vda"
_DESCRIBED = b"described:"
"""A case that begins so is no file: the rest says which fields of a good one to bend."""
_PLACES = (2 * MIB, MIB, 3 * MIB, _RAM_BYTES, 0, 4096)
_SIZES = (64, 0, 4096, MIB, 2 * MIB)


class KernelTarget(Target):
    """A file is refused in one line and changes no RAM, or is loaded where a kernel may be."""

    max_bytes = 16 << 10
    words = (b"\x7fELF", b"HdrS", b"Xen\0", b"\x55\xaa", b"Linux\0\0\0", b"GNU\0", _DESCRIBED)

    def __init__(self) -> None:
        self._file = MemoryFile()
        self._ram = bytearray(_RAM_BYTES)
        self._zeros = bytes(_RAM_BYTES)

    def seeds(self) -> Iterable[bytes]:
        """Return small kernels of every kind."""
        code = bytes(range(64))
        segment = ElfSegment(data=code, p_memsz=4096)
        notes = [note(b"GNU\0", 5, bytes(16)), pvh_note(2 * MIB), note(b"Linux\0", 257, b"v")]
        return [
            bytes(bzimage(code=code)),
            bytes(bzimage(code=code, relocatable_kernel=0, setup_sects=0)),
            bytes(elf(segment)),
            bytes(elf(segment, note_segment(pvh_note(2 * MIB)))),
            bytes(elf(segment, note_segment(*notes), ElfSegment(data=code, p_paddr=3 * MIB))),
            *(_DESCRIBED + random.Random(seed).randbytes(60) for seed in range(8)),
        ]

    def run(self, data: bytes) -> None:
        """Load ``data`` as a kernel, then as its own initrd."""
        if data.startswith(_DESCRIBED):
            data = _build(Source(data[len(_DESCRIBED) :]))
        if not data:
            return
        memory = GuestMemory.over(self._ram)
        path = self._file.put(data)
        try:
            kernel = load_kernel(memory, path)
        except ConfigError as error:
            check_one_line(error, begins=f"{path}: ")
            assert self._is_blank(0, _RAM_BYTES), "refused, and RAM was written"
            return
        try:
            assert MIB <= kernel.start <= kernel.entry < kernel.end <= _RAM_BYTES, kernel
            assert self._is_blank(0, kernel.start), "RAM before the kernel was written"
            assert self._is_blank(kernel.end, _RAM_BYTES), "RAM behind the kernel was written"
            kernel.describe()
            cmdline = data[-48:].decode("utf-8", "surrogateescape") if data[-1] & 1 else _CMDLINE
            _tell(memory, kernel, path, len(data), cmdline)
        finally:
            self._ram[:] = self._zeros

    def _is_blank(self, start: int, end: int) -> bool:
        return self._ram[start:end] == self._zeros[start:end]

    def close(self) -> None:
        """See ``Target.close``."""
        self._file.close()


def _build(source: Source) -> bytes:
    """A good kernel of some kind, with fields bent as ``source`` says."""
    code = bytes(range(64))
    if source.chance(96):
        names = sorted(SETUP_FIELDS)
        fields = {}
        for _ in range(source.bits(2)):
            name = source.pick(names)
            bits = 8 * SETUP_FIELDS[name][1]
            fields[name] = source.edge(*_PLACES, *_SIZES, bits=bits)
        return bytes(bzimage(fields, code=code))
    segments = []
    for _ in range(source.number(1, 3)):
        if source.chance(64):
            size = source.pick((8, 4))
            what = pvh_note(source.edge(*_PLACES, bits=8 * size), size)
            segments.append(note_segment(what, p_filesz=_perhaps(source, *_SIZES),
                                         p_offset=_perhaps(source, 0, 64, 120)))
        else:
            segments.append(ElfSegment(
                data=code, p_type=source.pick((1, 1, 1, 0, 2, 3, 7)),
                p_paddr=source.edge(*_PLACES), p_memsz=_perhaps(source, *_SIZES),
                p_filesz=_perhaps(source, *_SIZES), p_offset=_perhaps(source, 0, 64, 120),
            ))
    header = {"e_entry": source.edge(*_PLACES)} if source.chance(128) else {}
    return bytes(elf(*segments, **header))


def _perhaps(source: Source, *values: int) -> int | None:
    """None for what is right, most often."""
    return source.edge(*values) if source.chance(64) else None


def _tell(
    memory: GuestMemory, kernel: Kernel, path: str, length: int, cmdline: str
) -> None:
    """Load the initrd and write what the kernel is told; each may be refused."""
    try:
        gpa, size = load_initrd(memory, path, kernel)
        assert kernel.end <= gpa, "the initrd overlaps the kernel"
        assert gpa + size <= min(_RAM_BYTES, kernel.initrd_addr_max + 1)
        assert size == length
        write_boot_info(memory, kernel, cmdline, (gpa, size))
    except ConfigError as error:
        check_one_line(error)


def make() -> Target:
    """Return the target."""
    return KernelTarget()
