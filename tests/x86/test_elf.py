"""ELF vmlinux: the header and each segment."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import ConfigError
from pyvmm.memory import GuestMemory
from pyvmm.x86.loader import EntryKind, KernelKind, load_kernel
from tests.support.kernels import (
    CODE,
    ELF_HEADER,
    GIB,
    KIB,
    MIB,
    ElfSegment,
    elf,
    note_segment,
    pvh_note,
)
from tests.support.loading import MakeFile, blank, check_any_kernel, refused


def test_each_segment_goes_to_its_physical_address(memory: GuestMemory, image: MakeFile) -> None:
    note = note_segment(b"a note".ljust(12, b"\0"), p_filesz=0)
    empty = ElfSegment(data=b"", p_paddr=0)
    bss = ElfSegment(data=b"", p_paddr=5 * MIB, p_memsz=10)
    path = image(elf(ElfSegment(data=b"text" * 100, p_paddr=4 * MIB), note, empty, bss,
                     ElfSegment(data=b"data" * 10, p_paddr=2 * MIB, p_memsz=MIB),
                     e_entry=4 * MIB + 0x20))
    kernel = load_kernel(memory, path)
    assert kernel.kind is KernelKind.ELF
    assert (kernel.start, kernel.end) == (2 * MIB, 5 * MIB + 4 * KIB)
    assert kernel.entry == 4 * MIB + 0x20
    assert kernel.entry_kind is EntryKind.LINUX_64
    assert kernel.setup_header is None
    assert kernel.cmdline_limit == 2047
    assert memory.read(4 * MIB, 400) == b"text" * 100
    assert memory.read(2 * MIB, 40) == b"data" * 10
    assert blank(memory.read(0, 2 * MIB))
    assert blank(memory.read(2 * MIB + 40, 2 * MIB - 40))
    assert blank(memory.read(4 * MIB + 400, 4 * MIB - 400))


@pytest.mark.parametrize("kind", [2, 3, 7])
def test_a_user_program_is_no_kernel(memory: GuestMemory, image: MakeFile, kind: int) -> None:
    path = image(elf(ElfSegment(), ElfSegment(p_type=kind, data=b"x")))
    refused(memory, path, "is a program for an operating system, not a kernel")


def test_segments_may_touch(memory: GuestMemory, image: MakeFile) -> None:
    path = image(elf(ElfSegment(p_paddr=2 * MIB + len(CODE)), ElfSegment(p_paddr=2 * MIB)))
    assert load_kernel(memory, path).start == 2 * MIB


def test_program_headers_may_end_the_file(memory: GuestMemory, image: MakeFile) -> None:
    content = elf(e_phoff=64 + 56 + len(CODE))
    content += content[64 : 64 + 56]
    assert load_kernel(memory, image(content)).entry == 2 * MIB
    assert memory.read(2 * MIB, len(CODE)) == CODE


@pytest.mark.parametrize("length", [4, 5, 16, 18, 20, 24, 32, 40, 48, 52, 54, 56, 58, 60, 62, 63])
def test_bad_input_93_elf_truncated_at_each_header_field(
    memory: GuestMemory, image: MakeFile, length: int
) -> None:
    refused(memory, image(elf()[:length]),
            f"truncated: an ELF header is 64 bytes, the file {length}")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"ei_class": 1}, "EI_CLASS is 1, must be 2 (64-bit)"),
        ({"ei_data": 2}, "EI_DATA is 2, must be 1 (little-endian)"),
        ({"ei_version": 0}, "EI_VERSION is 0, must be 1"),
        ({"e_type": 3}, "e_type is 3, a program or shared library; a vmlinux has 2"),
        ({"e_machine": 183}, "e_machine is 183, must be 62 (x86-64)"),
        ({"e_version": 2}, "e_version is 2, must be 1"),
        ({"e_phentsize": 32}, "e_phentsize is 32, must be 56"),
        ({"e_phentsize": 0}, "e_phentsize is 0, must be 56"),
    ],
)
def test_bad_input_101_wrong_elf(
    memory: GuestMemory, image: MakeFile, fields: dict[str, int], problem: str
) -> None:
    refused(memory, image(elf(**fields)), f"ELF header: {problem}")


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({"e_phoff": 64 + len(CODE) + 1}, 64 + len(CODE) + 57),
        ({"e_phoff": (1 << 64) - 8}, (1 << 64) + 48),
        ({"e_phnum": 0xFFFF}, 64 + 56 * 0xFFFF),
    ],
    ids=["phoff", "phoff wraps", "phnum"],
)
def test_bad_input_102_program_headers_past_the_end(
    memory: GuestMemory, image: MakeFile, fields: dict[str, int], end: int
) -> None:
    refused(memory, image(elf()[:64]), "truncated: 1 program headers", "the file at 64")
    refused(memory, image(elf(**fields)), "truncated", "e_phoff, e_phnum",
            f"end at byte {end}", f"the file at {64 + 56 + len(CODE)}")


def test_bad_input_102_nothing_to_load(memory: GuestMemory, image: MakeFile) -> None:
    refused(memory, image(elf(e_phnum=0)), "e_phnum is 0")
    refused(memory, image(elf(note_segment(b""))), "no PT_LOAD segment")


@pytest.mark.parametrize(
    "segment", [ElfSegment(p_offset=121), ElfSegment(p_offset=(1 << 64) - 1),
                ElfSegment(p_filesz=len(CODE) + 1)],
    ids=["offset", "offset wraps", "filesz"],
)
def test_bad_input_102_segment_past_the_end(
    memory: GuestMemory, image: MakeFile, segment: ElfSegment
) -> None:
    refused(memory, image(elf(segment)), "truncated: segment 0 ends at byte", "the file at 4216")


def test_bad_input_103_filesz_over_memsz(memory: GuestMemory, image: MakeFile) -> None:
    refused(memory, image(elf(ElfSegment(p_memsz=len(CODE) - 1))),
            "segment 0: p_filesz 0x1000 is over its p_memsz 0xfff")
    refused(memory, image(elf(ElfSegment(p_memsz=0))), "p_filesz 0x1000 is over its p_memsz 0x0")


@pytest.mark.parametrize(
    ("segment", "problem"),
    [
        (ElfSegment(p_memsz=6 * MIB + 1), "segment 0 needs RAM up to 0x800001, but RAM ends at "
                                          "0x800000: --memory must be at least 9M"),
        (ElfSegment(p_memsz=1 << 40), "the highest end for a kernel is 0xc0000000"),
        (ElfSegment(p_memsz=(1 << 64) - 1), "the highest end for a kernel is 0xc0000000"),
        (ElfSegment(p_paddr=(1 << 64) - 4096), "the highest end for a kernel is 0xc0000000"),
        (ElfSegment(p_paddr=4 << 30), "the highest end for a kernel is 0xc0000000"),
        (ElfSegment(p_paddr=8 * MIB), "--memory must be at least 9M"),
        (ElfSegment(p_paddr=MIB - 1), "segment 0 starts at 0xfffff; the lowest address for a "
                                      "kernel is 0x100000"),
        (ElfSegment(p_paddr=0), "segment 0 starts at 0x0; the lowest"),
    ],
    ids=["memsz", "huge memsz", "memsz wraps", "paddr wraps", "above 4 GiB", "paddr", "low", "0"],
)
def test_bad_input_105_segment_outside_ram(
    memory: GuestMemory, image: MakeFile, segment: ElfSegment, problem: str
) -> None:
    refused(memory, image(elf(segment)), problem)


def test_a_segment_may_end_where_ram_below_4_gib_does(image: MakeFile) -> None:
    # A memfd's pages are made when they are touched, and hardly any is.
    with GuestMemory([(0, 3 * GIB)], shared=True) as memory:
        room = 3 * GIB - 2 * MIB
        assert load_kernel(memory, image(elf(ElfSegment(p_memsz=room)))).end == 3 * GIB
        with pytest.raises(ConfigError, match="the highest end for a kernel is 0xc0000000"):
            load_kernel(memory, image(elf(ElfSegment(p_memsz=room + 1))))


def test_bad_input_105_overlapping_segments(memory: GuestMemory, image: MakeFile) -> None:
    path = image(elf(ElfSegment(p_paddr=2 * MIB + 0xFFF), ElfSegment()))
    refused(memory, path, "segment 0 starts at 0x200fff, inside segment 1, which ends at 0x201000")


def test_the_memory_asked_for_is_enough_for_every_segment(
    memory: GuestMemory, image: MakeFile
) -> None:
    path = image(elf(ElfSegment(p_paddr=9 * MIB), ElfSegment(p_paddr=20 * MIB)))
    refused(memory, path, "segment 1", "--memory must be at least 21M")


@pytest.mark.parametrize(
    "entry", [0, 2 * MIB - 1, 2 * MIB + len(CODE), 0xFFFFFFFF81000000],
    ids=["0", "before", "in the bss", "virtual"],
)
def test_bad_input_107_entry_outside_segments(
    memory: GuestMemory, image: MakeFile, entry: int
) -> None:
    refused(memory, image(elf(e_entry=entry)),
            f"entry {entry:#x} (e_entry) is in none of its 1 loaded segments")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file that every example overwrites."""
    return tmp_path_factory.mktemp("mutated") / "vmlinux"


def _rarely(values: st.SearchStrategy[int]) -> st.SearchStrategy[int | None]:
    """Mostly None, that is: what makes the file valid.  All wild at once would get nowhere."""
    return st.integers(min_value=0, max_value=4).flatmap(
        lambda chance: values if chance == 0 else st.none()
    )


_u64 = (
    st.sampled_from([0, 1, 56, 64, 120, 4096, MIB, 2 * MIB, 7 * MIB, 8 * MIB, 1 << 63])
    | st.integers(min_value=0, max_value=(1 << 64) - 1)
    | st.integers(min_value=0, max_value=9 * MIB)
)
_segment = st.builds(
    ElfSegment,
    data=st.sampled_from([CODE, b"x", b"", pvh_note(2 * MIB)]),
    p_type=st.sampled_from([1, 1, 1, 4]),
    p_paddr=st.integers(min_value=1, max_value=7).map(MIB.__mul__) | _u64,
    p_filesz=_rarely(_u64),
    p_memsz=_rarely(_u64),
    p_offset=_rarely(_u64),
)


@settings(max_examples=300, deadline=None)
@given(
    segments=st.lists(_segment, max_size=3),
    fields=st.fixed_dictionaries({
        "e_entry": _rarely(_u64),
        "e_phoff": _rarely(_u64),
        "e_phnum": _rarely(st.integers(min_value=0, max_value=0xFFFF)),
    }),
    noise=st.dictionaries(
        st.integers(min_value=4, max_value=ELF_HEADER.size + 55),
        st.integers(min_value=0, max_value=255),
        max_size=1,
    ),
    length=_rarely(st.integers(min_value=1, max_value=400)),
)
def test_no_elf_escapes_as_anything_but_a_config_error(
    scratch: Path,
    segments: list[ElfSegment],
    fields: dict[str, int | None],
    noise: dict[int, int],
    length: int | None,
) -> None:
    bent = {name: value for name, value in fields.items() if value is not None}
    content = elf(*segments, **bent)
    for offset, byte in noise.items():
        content[offset] = byte
    scratch.write_bytes(content[:length])
    check_any_kernel(scratch)
