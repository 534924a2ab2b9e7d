"""PVH: the note that gives the entry, and the start info that the kernel is given."""

from __future__ import annotations

import ctypes
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.errors import ConfigError
from pyvmm.memory import GuestMemory
from pyvmm.x86 import layout
from pyvmm.x86.elf_notes import MAX_NOTE_BYTES
from pyvmm.x86.inspect import inspect
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


def entered_without_pvh(memory: GuestMemory, path: Path) -> None:
    """The kernel at ``path`` is loaded, and its notes give no entry."""
    kernel = load_kernel(memory, path)
    assert (kernel.entry_kind, kernel.entry) == (EntryKind.LINUX_64, 2 * MIB)


@pytest.mark.parametrize("length", range(1, 24))
def test_bad_input_93_note_truncated_at_each_byte(
    memory: GuestMemory, image: MakeFile, length: int
) -> None:
    entered_without_pvh(memory, image(elf(ElfSegment(), note_segment(pvh_note(ENTRY)[:length]))))


def test_bad_input_102_note_segment_past_the_end(memory: GuestMemory, image: MakeFile) -> None:
    content = elf(ElfSegment(), note_segment(pvh_note(ENTRY), p_offset=1 << 63))
    entered_without_pvh(memory, image(content))
    content = elf(ElfSegment(), note_segment(pvh_note(ENTRY), p_filesz=25))
    assert load_kernel(memory, image(content)).entry == ENTRY, "all of the note is there"


def test_bad_input_105_huge_notes(memory: GuestMemory, image: MakeFile) -> None:
    for namesz, descsz in ((0xFFFFFFFF, 8), (4, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF)):
        huge = struct.pack("<III", namesz, descsz, 18) + b"Xen\0" + bytes(8)
        entered_without_pvh(memory, image(pvh_elf(huge)))
    segments = [ElfSegment(), *[note_segment(pvh_note(ENTRY) + bytes(MAX_NOTE_BYTES))] * 3]
    assert load_kernel(memory, image(elf(*segments))).entry == ENTRY
    late = note_segment(bytes(MAX_NOTE_BYTES), pvh_note(ENTRY))
    entered_without_pvh(memory, image(elf(ElfSegment(), late)))


@pytest.mark.parametrize("size", [0, 1, 3, 5, 9, 16])
def test_a_note_of_another_size(memory: GuestMemory, image: MakeFile, size: int) -> None:
    strange = note(b"Xen\0", 18, bytes(size))
    entered_without_pvh(memory, image(pvh_elf(strange)))
    assert load_kernel(memory, image(pvh_elf(strange, pvh_note(ENTRY)))).entry == ENTRY


def test_notes_that_contradict_each_other(memory: GuestMemory, image: MakeFile) -> None:
    entered_without_pvh(memory, image(pvh_elf(pvh_note(ENTRY), pvh_note(ENTRY + 4))))
    assert load_kernel(memory, image(pvh_elf(pvh_note(ENTRY), pvh_note(ENTRY, 4)))).entry == ENTRY


@pytest.mark.parametrize(
    "entry", [0, 2 * MIB - 1, 2 * MIB + len(CODE), 1 << 32, (1 << 32) + ENTRY, (1 << 64) - 1],
)
def test_bad_input_107_entry_outside_segments(
    memory: GuestMemory, image: MakeFile, entry: int
) -> None:
    refused(memory, image(pvh_elf(pvh_note(entry), e_entry=0xFFFFFFFF81000000)),
            "entry 0xffffffff81000000 (e_entry) is in none of its 1 loaded segments")
    entered_without_pvh(memory, image(pvh_elf(pvh_note(entry))))
    assert load_kernel(memory, image(pvh_elf(pvh_note(entry), pvh_note(ENTRY)))).entry == ENTRY


def aligned_note(name: bytes, kind: int, description: bytes, alignment: int) -> bytes:
    """An ELF note whose descriptor and end are aligned to ``alignment`` bytes, from its start."""
    def padded(data: bytes) -> bytes:
        return data.ljust(-(-len(data) // alignment) * alignment, b"\0")

    head = struct.pack("<III", len(name), len(description), kind)
    return padded(padded(head + name) + description)


@settings(max_examples=300, deadline=None, suppress_health_check=[
    HealthCheck.function_scoped_fixture,  # one file that every example overwrites
])
@given(
    before=st.lists(st.tuples(st.sampled_from([b"GNU\0", b"Linux\0", b"FDO\0", b"x\0"]),
                              st.integers(0, 0x101), st.binary(max_size=30)), max_size=4),
    alignment=st.sampled_from([4, 8]), padding=st.sampled_from([0, 4, 8, 12]),
    p_align=st.sampled_from([0, 1, 4, 8, 4096, 1 << 63]),
)
def test_fault_20_a_pvh_note_is_found_behind_notes_of_either_alignment(
    image: MakeFile, before: list[tuple[bytes, int, bytes]], alignment: int, padding: int,
    p_align: int,
) -> None:
    others = b"".join(aligned_note(*one, alignment) for one in before)
    content = elf(ElfSegment(), note_segment(others, bytes(padding), pvh_note(ENTRY, 4)))
    struct.pack_into("<Q", content, 64 + 2 * 56 - 8, p_align)
    assert load_kernel(GuestMemory.over(bytearray(RAM_BYTES)), image(content)).entry == ENTRY


def test_fault_20_the_property_of_the_assembler_beside_linuxs_notes(
    memory: GuestMemory, image: MakeFile
) -> None:
    """As binutils' default on Fedora, Arch and openSUSE leaves it: PT_NOTE is aligned to 8."""
    features = struct.pack("<IIII", 0xC0010001, 4, 1, 0)  # X86_FEATURE_2_USED, padded to 8
    prop = struct.pack("<III", 4, len(features), 5) + b"GNU\0" + features
    linux = note(b"Linux\0", 0x101, b"\1\0\0\0") + note(b"Linux\0", 0x100, b"\0")
    for order in ((prop, linux, pvh_note(ENTRY)), (linux, bytes(4), prop, pvh_note(ENTRY, 4)),
                  (linux, pvh_note(ENTRY, 4), prop)):
        content = elf(ElfSegment(), note_segment(*order))
        struct.pack_into("<Q", content, 64 + 2 * 56 - 8, 8)
        kernel = load_kernel(memory, image(content))
        assert kernel.entry == ENTRY
        assert kernel.is_linux


@settings(max_examples=300, deadline=None, suppress_health_check=[
    HealthCheck.function_scoped_fixture,
])
@given(data=st.binary(max_size=300), p_align=st.sampled_from([0, 4, 8, 3, 1 << 63]))
def test_fault_20_random_notes_never_refuse_a_kernel(
    image: MakeFile, data: bytes, p_align: int
) -> None:
    content = elf(ElfSegment(), note_segment(data))
    struct.pack_into("<Q", content, 64 + 2 * 56 - 8, p_align)
    assert load_kernel(GuestMemory.over(bytearray(RAM_BYTES)), image(content)).entry >= 2 * MIB


_SCRIPT = """
PHDRS { text PT_LOAD FLAGS(7); note PT_NOTE FLAGS(4); }
SECTIONS {
  . = 0x200000;
  .text : { *(.text*) } :text
  .notes : { KEEP(*(.note.*)) } :text :note
  .data : { *(.data*) } :text
  /DISCARD/ : { *(.comment) *(.eh_frame) }
}
"""
_SOURCE = """
int answer(int x) { return x + 1; }
__asm__(".pushsection .text\\n.globl pvh_start\\npvh_start: hlt\\n.popsection\\n"
        ".pushsection .note.Xen, \\"a\\", @note\\n.balign 4\\n.long 4, 4, 18\\n.asciz \\"Xen\\"\\n"
        ".long pvh_start\\n.balign 4\\n.popsection\\n"
        ".pushsection .note.Linux, \\"a\\", @note\\n.balign 4\\n.long 6, 4, 257\\n"
        ".asciz \\"Linux\\"\\n.balign 4\\n.long 0\\n.balign 4\\n.popsection\\n");
"""


def test_fault_20_a_kernel_of_an_assembler_that_notes_properties(
    memory: GuestMemory, tmp_path: Path
) -> None:
    """Really compiled and linked, by a script that gathers notes as vmlinux.lds does."""
    (tmp_path / "k.c").write_text(_SOURCE)
    (tmp_path / "k.lds").write_text(_SCRIPT)
    path = tmp_path / "vmlinux"
    subprocess.run(
        ["gcc", "-Wa,-mx86-used-note=yes", "-O2", "-ffreestanding", "-nostdlib", "-static",
         "-no-pie", "-fno-pie", "-Wl,--build-id=sha1", "-Wl,-T,k.lds", "-Wl,-e,answer", "-o", path,
         "k.c"],
        cwd=tmp_path, check=True, capture_output=True,
    )
    headers = subprocess.run(
        ["readelf", "-lW", path], check=True, capture_output=True, text=True
    ).stdout
    (line,) = [line for line in headers.splitlines() if line.split()[:1] == ["NOTE"]]
    assert line.split()[-1] == "0x8", "this assembler notes no properties"
    symbols = subprocess.run(["nm", path], check=True, capture_output=True, text=True).stdout
    (entry,) = [int(line.split()[0], 16) for line in symbols.splitlines()
                if line.endswith(" pvh_start")]
    kernel = load_kernel(memory, path)
    assert (kernel.entry_kind, kernel.entry) == (EntryKind.PVH, entry)
    assert kernel.is_linux
    assert inspect(path).kernel == kernel


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
