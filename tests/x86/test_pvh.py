"""PVH: the note that gives the entry, and the start info that the kernel is given."""

from __future__ import annotations

import ctypes
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.errors import ConfigError
from pyvmm.memory import GuestMemory
from pyvmm.x86 import layout
from pyvmm.x86.loader import (
    EntryKind,
    Kernel,
    load_initrd,
    load_kernel,
    write_boot_info,
)
from pyvmm.x86.pvh import HvmMemmapTableEntry, HvmModlistEntry, HvmStartInfo, write_start_info
from tests.support.kernels import (
    CODE,
    MIB,
    ElfSegment,
    bzimage,
    elf,
    note,
    note_segment,
    pvh_note,
)
from tests.support.loading import RAM_BYTES, MakeFile, blank, check_any_kernel, refused

ENTRY = 2 * MIB + 0x500
START_INFO = 0x8000


def pvh_elf(*notes: bytes, **fields: int) -> bytearray:
    """A kernel of one segment, by default with a PVH entry at ENTRY."""
    return elf(ElfSegment(), note_segment(*(notes or (pvh_note(ENTRY),))), **fields)


@pytest.fixture
def kernel(memory: GuestMemory, image: MakeFile) -> Kernel:
    return load_kernel(memory, image(pvh_elf()))


# ---- the note ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 8])
def test_a_note_gives_the_entry(memory: GuestMemory, image: MakeFile, size: int) -> None:
    others = (note(b"GNU\0", 3, bytes(20)), note(b"Linux\0", 18, b"\1"), note(b"Xen\0", 5, b""))
    kernel = load_kernel(memory, image(pvh_elf(*others, pvh_note(ENTRY, size), bytes(8))))
    assert (kernel.entry_kind, kernel.entry) == (EntryKind.PVH, ENTRY)
    assert "ELF vmlinux, 32-bit PVH entry at 0x200500" in kernel.describe()


def test_without_the_note_it_is_the_64_bit_entry(memory: GuestMemory, image: MakeFile) -> None:
    content = pvh_elf(note(b"Xen\0", 17, bytes(8)), note(b"XEN\0", 18, bytes(8)))
    kernel = load_kernel(memory, image(content))
    assert (kernel.entry_kind, kernel.entry) == (EntryKind.LINUX_64, 2 * MIB)
    assert "64-bit Linux entry at 0x200000" in kernel.describe()


def test_with_pvh_e_entry_may_be_anything(memory: GuestMemory, image: MakeFile) -> None:
    assert load_kernel(memory, image(pvh_elf(e_entry=0xFFFFFFFF81000000))).entry == ENTRY


def test_several_note_segments_and_alignments(memory: GuestMemory, image: MakeFile) -> None:
    aligned = struct.pack("<III", 4, 5, 1) + b"GNU\0" + b"hello" + bytes(3) + pvh_note(ENTRY)
    content = elf(ElfSegment(), note_segment(note(b"x", 1, b"")), note_segment(aligned))
    # p_align is the last member of the third program header.
    struct.pack_into("<Q", content, 64 + 3 * 56 - 8, 8)
    assert load_kernel(memory, image(content)).entry == ENTRY


@pytest.mark.parametrize("length", range(1, 24))
def test_bad_input_93_note_truncated_at_each_byte(
    memory: GuestMemory, image: MakeFile, length: int
) -> None:
    cut = pvh_note(ENTRY)[:length]
    refused(memory, image(elf(ElfSegment(), note_segment(cut))), "note at byte 4272")


def test_bad_input_102_note_segment_past_the_end(memory: GuestMemory, image: MakeFile) -> None:
    for bent in ({"p_offset": 1 << 63}, {"p_filesz": 25}):
        content = elf(ElfSegment(), note_segment(pvh_note(ENTRY), **bent))
        refused(memory, image(content), "truncated: a note segment (PT_NOTE) ends at byte")


def test_bad_input_105_huge_notes(memory: GuestMemory, image: MakeFile) -> None:
    for namesz, descsz in ((0xFFFFFFFF, 8), (4, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF)):
        huge = struct.pack("<III", namesz, descsz, 18) + b"Xen\0" + bytes(8)
        refused(memory, image(pvh_elf(huge)), f"namesz {namesz:#x} and descsz {descsz:#x} run past")
    content = elf(ElfSegment(), note_segment(p_filesz=(1 << 20) + 1))
    refused(memory, image(content), "1048577 bytes long; the limit is 1048576")


@pytest.mark.parametrize("size", [0, 1, 3, 5, 9, 16])
def test_a_note_of_another_size(memory: GuestMemory, image: MakeFile, size: int) -> None:
    refused(memory, image(pvh_elf(note(b"Xen\0", 18, bytes(size)))),
            f"PVH note: descsz is {size}, must be 4 or 8")


def test_notes_that_contradict_each_other(memory: GuestMemory, image: MakeFile) -> None:
    refused(memory, image(pvh_elf(pvh_note(ENTRY), pvh_note(ENTRY + 4))),
            "two PVH notes, with entries 0x200500 and 0x200504")
    assert load_kernel(memory, image(pvh_elf(pvh_note(ENTRY), pvh_note(ENTRY, 4)))).entry == ENTRY


@pytest.mark.parametrize(
    "entry", [0, 2 * MIB - 1, 2 * MIB + len(CODE), 1 << 32, (1 << 32) + ENTRY, (1 << 64) - 1],
)
def test_bad_input_107_entry_outside_segments(
    memory: GuestMemory, image: MakeFile, entry: int
) -> None:
    refused(memory, image(pvh_elf(pvh_note(entry))),
            f"entry {entry:#x} (PVH note) is in none of its 1 loaded segments")


@settings(max_examples=300, deadline=None, suppress_health_check=[
    HealthCheck.function_scoped_fixture,  # one file that every example overwrites
])
@given(data=st.lists(
    st.binary(max_size=20)
    | st.builds(pvh_note, st.integers(2 * MIB, 2 * MIB + 5000), st.sampled_from([4, 8]))
    | st.builds(note, st.sampled_from([b"Xen\0", b"", b"GNU\0"]), st.integers(16, 19),
                st.binary(max_size=12)),
    max_size=4,
))
def test_no_notes_escape_as_anything_but_a_config_error(image: MakeFile, data: list[bytes]) -> None:
    check_any_kernel(image(pvh_elf(*data, b"")))


# ---- the start info ------------------------------------------------------------------------------


def test_structures_have_the_sizes_of_the_abi() -> None:
    sizes = [ctypes.sizeof(kind) for kind in (HvmStartInfo, HvmModlistEntry, HvmMemmapTableEntry)]
    assert sizes == [56, 32, 24]


def start_info(memory: GuestMemory) -> dict[str, int]:
    """The fields as start_info.h lays them out."""
    names = ("magic", "version", "flags", "nr_modules", "modlist", "cmdline", "rsdp", "memmap",
             "memmap_entries", "reserved")
    return dict(zip(names, struct.unpack("<4I4Q2I", memory.read(START_INFO, 56)), strict=True))


def test_start_info_points_to_command_line_memory_map_and_acpi(
    memory: GuestMemory, kernel: Kernel
) -> None:
    write_boot_info(memory, kernel, "console=ttyS0", None, rsdp=0xE0000)
    info = start_info(memory)
    assert (info["magic"], info["version"], info["flags"]) == (0x336EC578, 1, 0)
    assert (info["rsdp"], info["nr_modules"], info["modlist"]) == (0xE0000, 0, 0)
    assert memory.read(info["cmdline"], 14) == b"console=ttyS0\0"
    table = memory.read(info["memmap"], 24 * info["memmap_entries"])
    assert list(struct.iter_unpack("<QQII", table)) == [
        (0, 0x9FC00, 1, 0),
        (0x9FC00, 0x60400, 2, 0),
        (0x100000, 7 * MIB, 1, 0),
        (0xFFFBC000, 0x4000, 2, 0),
    ]
    assert blank(memory.read(layout.BOOT_PARAMS, 0x1000))


def test_the_initrd_is_the_first_module(
    memory: GuestMemory, kernel: Kernel, initrd_file: MakeFile
) -> None:
    initrd = load_initrd(memory, initrd_file(b"initrd"), kernel)
    write_boot_info(memory, kernel, "", initrd)
    info = start_info(memory)
    assert (info["nr_modules"], info["rsdp"]) == (1, 0)
    module = struct.unpack("<4Q", memory.read(info["modlist"], 32))
    assert module == (RAM_BYTES - 4096, 6, 0, 0)
    assert info["memmap"] >= info["modlist"] + 32


def test_all_of_it_has_room(image: MakeFile) -> None:
    with GuestMemory(layout.ram_ranges(5 << 30), shared=True) as memory:
        kernel = load_kernel(memory, image(pvh_elf()))
        write_boot_info(memory, kernel, "", (4 * MIB, 1))
        info = start_info(memory)
        end = info["memmap"] + 24 * info["memmap_entries"]
        assert end <= START_INFO + layout.START_INFO_MAX == layout.PAGE_TABLES
        assert struct.unpack("<QQII", memory.read(end - 24, 24)) == (4 << 30, 2 << 30, 1, 0)


def test_bad_input_109_command_lines_are_judged_as_for_any_kernel(
    memory: GuestMemory, kernel: Kernel
) -> None:
    write_start_info(memory, kernel, "x" * 2047, None)
    assert memory.read(layout.CMDLINE, 2048) == b"x" * 2047 + b"\0"
    for bad, problem in (("x" * 2048, "the limit of kernel .* is 2047"), ("a\0b", "position 1"),
                         ("\u00e9", "position 0")):
        with pytest.raises(ConfigError, match=problem):
            write_start_info(memory, kernel, bad, None)


def test_bad_input_110_initrd_beside_a_pvh_kernel(
    memory: GuestMemory, kernel: Kernel, initrd_file: MakeFile
) -> None:
    room = RAM_BYTES - kernel.end
    assert load_initrd(memory, initrd_file(bytes(room)), kernel) == (kernel.end, room)
    with pytest.raises(ConfigError, match=f"the limit is {room}"):
        load_initrd(memory, initrd_file(bytes(room + 1)), kernel)
    with pytest.raises(ConfigError, match="is empty"):
        load_initrd(memory, initrd_file(b""), kernel)


@pytest.mark.parametrize("content", [bzimage(), elf()], ids=["bzImage", "ELF"])
def test_other_entries_get_boot_params_with_the_rsdp(
    memory: GuestMemory, image: MakeFile, content: bytes
) -> None:
    kernel = load_kernel(memory, image(content))
    assert kernel.entry_kind is EntryKind.LINUX_64
    write_boot_info(memory, kernel, "", None, rsdp=0xE0000)
    assert memory.read_int(layout.BOOT_PARAMS + 0x70, 8) == 0xE0000
    assert blank(memory.read(START_INFO, layout.START_INFO_MAX))
