"""Read an ELF ``vmlinux`` (System V ABI, chapter 4 "Object Files" and 5 "Program Loading").

Each PT_LOAD segment goes to its physical address (p_paddr).  A kernel can be entered in two ways:

* By PVH, if a note gives an entry for it.  This is preferred, because it is a written-down
  interface that the kernel offers on purpose, and other VMMs have tried it most.
* At e_entry, which Linux gives as a physical address too.  A bzImage's decompressor jumps
  there, in 64-bit mode with boot_params.  No document promises this for a vmlinux, but it works.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence

from pyvmm.memory import PAGE_SIZE
from pyvmm.x86.elf_notes import read_notes
from pyvmm.x86.image import (
    EntryKind,
    ImageFile,
    Kernel,
    KernelKind,
    Segment,
    align_up,
    require_ram,
)

HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
"""Elf64_Ehdr."""
PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
"""Elf64_Phdr."""

ELFCLASS64, ELFDATA2LSB, EV_CURRENT = 2, 1, 1
ET_EXEC = 2
EM_X86_64 = 62
PT_LOAD, PT_NOTE = 1, 4
# Segments of an operating system's program, which no kernel has: a linker, libraries, threads.
_PROGRAM_ONLY = {2: "PT_DYNAMIC", 3: "PT_INTERP", 7: "PT_TLS"}

# e_type of what is no kernel.
_NO_KERNELS = {
    1: "an object file or a kernel module", 3: "a program or shared library", 4: "a core dump",
}

# An ELF header has neither of these.  Every x86-64 Linux has these values in its setup header
# (COMMAND_LINE_SIZE - 1, and initrd_addr_max in arch/x86/boot/header.S).
CMDLINE_LIMIT = 2047
INITRD_ADDR_MAX = 0x7FFF_FFFF


def parse(image: ImageFile, head: bytes, ram_end: int) -> Kernel:
    """Return the plan for loading the ELF kernel ``image``, whose first bytes are ``head``.

    ``ram_end`` is the end of RAM below 4 GiB.  ConfigError names the field or the segment.
    """
    entry, table_offset, table_length = _read_header(image, head)
    table = image.read_at(table_offset, table_length * PROGRAM_HEADER.size)
    segments = []
    extents = []
    notes = []
    for index, fields in enumerate(PROGRAM_HEADER.iter_unpack(table)):
        kind, _, offset, _, gpa, file_bytes, memory_bytes, _ = fields
        if kind in _PROGRAM_ONLY:
            raise image.error(f"is a program for an operating system, not a kernel: "
                              f"segment {index} is {_PROGRAM_ONLY[kind]}")
        if kind == PT_NOTE:
            notes.append((offset, file_bytes))
        if kind != PT_LOAD or memory_bytes == 0 == file_bytes:
            continue
        name = f"segment {index}"
        if file_bytes > memory_bytes:
            raise image.error(f"{name}: p_filesz {file_bytes:#x} is over "
                              f"its p_memsz {memory_bytes:#x}")
        if offset + file_bytes > image.size_bytes:
            raise image.error(f"truncated: {name} ends at byte {offset + file_bytes}, "
                              f"the file at {image.size_bytes}")
        extents.append((gpa, gpa + memory_bytes, index))
        # The rest of the segment, its bss, is zero already: RAM is fresh.
        segments.append(Segment(file_offset=offset, gpa=gpa, length=file_bytes))
    _check_extents(image, extents, ram_end)
    entry_kind = EntryKind.LINUX_64
    said = read_notes(image, notes)
    pvh_entries = [address for address in said.pvh_entries if _is_loaded(address, segments)]
    if len(pvh_entries) == 1:  # notes that contradict each other say nothing
        entry, entry_kind = pvh_entries[0], EntryKind.PVH
    if not _is_loaded(entry, segments):
        raise image.error(f"entry {entry:#x} (e_entry) is in none of its {len(segments)} loaded "
                          "segments (p_paddr to p_paddr + p_filesz), and no PVH note gives another")
    return Kernel(
        path=image.path,
        kind=KernelKind.ELF,
        start=min(extents)[0],
        end=align_up(max(end for _, end, _ in extents), PAGE_SIZE),
        entry=entry,
        entry_kind=entry_kind,
        segments=tuple(segments),
        setup_header=None,
        initrd_addr_max=INITRD_ADDR_MAX,
        cmdline_limit=CMDLINE_LIMIT,
        protocol=0,
        version="",
        is_linux=said.linux,
    )


def _is_loaded(address: int, segments: Sequence[Segment]) -> bool:
    return any(segment.gpa <= address < segment.gpa + segment.length for segment in segments)


def _read_header(image: ImageFile, head: bytes) -> tuple[int, int, int]:
    """Return ``(entry, file offset of the program headers, their number)``."""
    if len(head) < HEADER.size:
        raise image.error(f"truncated: an ELF header is {HEADER.size} bytes, "
                          f"the file {image.size_bytes}")
    (ident, kind, machine, version, entry, table_offset, _, _, _, entry_size, table_length,
     *_) = HEADER.unpack_from(head)
    for name, value, wanted, meaning in (
        ("EI_CLASS", ident[4], ELFCLASS64, "64-bit"),
        ("EI_DATA", ident[5], ELFDATA2LSB, "little-endian"),
        ("EI_VERSION", ident[6], EV_CURRENT, "current"),
        ("e_type", kind, ET_EXEC, "an executable"),
        ("e_machine", machine, EM_X86_64, "x86-64"),
        ("e_version", version, EV_CURRENT, "current"),
        ("e_phentsize", entry_size, PROGRAM_HEADER.size, "Elf64_Phdr"),
    ):
        if name == "e_type" and value in _NO_KERNELS:
            raise image.error(
                f"ELF header: e_type is {value}, {_NO_KERNELS[value]}; a vmlinux has {wanted}"
            )
        if value != wanted:
            raise image.error(f"ELF header: {name} is {value}, must be {wanted} ({meaning})")
    if table_length == 0:
        raise image.error("ELF header: e_phnum is 0: nothing to load")
    table_end = table_offset + table_length * PROGRAM_HEADER.size
    if table_end > image.size_bytes:
        raise image.error(f"truncated: {table_length} program headers (e_phoff, e_phnum) end at "
                          f"byte {table_end}, the file at {image.size_bytes}")
    return entry, table_offset, table_length


def _check_extents(
    image: ImageFile, extents: list[tuple[int, int, int]], ram_end: int
) -> None:
    """Refuse ``extents`` that are none, outside RAM or overlapping; each is ``(start, end,
    index)``."""
    if not extents:
        raise image.error("no PT_LOAD segment: nothing to load")
    # From the top down: the error then names memory that is enough for all of them.
    for start, end, index in sorted(extents, key=lambda extent: extent[1], reverse=True):
        require_ram(image, f"segment {index}", start, end, ram_end)
    for (_, end, first), (start, _, second) in itertools.pairwise(sorted(extents)):
        if start < end:
            raise image.error(f"segment {second} starts at {start:#x}, "
                              f"inside segment {first}, which ends at {end:#x}")
