"""bzImage: what the 64-bit boot protocol asks of the header, field by field."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import ConfigError
from pyvmm.memory import GuestMemory
from pyvmm.x86.loader import KernelKind, load_kernel
from tests.support.kernels import (
    CODE,
    MIB,
    SETUP_FIELDS,
    SETUP_HEADER,
    SETUP_HEADER_END,
    bzimage,
)
from tests.support.loading import RAM_BYTES, MakeFile, blank, check_any_kernel, refused


def test_a_valid_bzimage_is_loaded_at_its_preferred_address(
    memory: GuestMemory, image: MakeFile
) -> None:
    path = image(bzimage(tail=b"a signature"))
    kernel = load_kernel(memory, path)
    assert kernel.kind is KernelKind.BZIMAGE
    assert kernel.path == str(path)
    assert (kernel.start, kernel.end) == (2 * MIB, 3 * MIB)
    assert kernel.entry == 2 * MIB + 0x200
    assert kernel.protocol == 0x020F
    assert kernel.version == "6.1.0-synthetic"
    assert kernel.cmdline_limit == 2047
    assert kernel.initrd_addr_max == 0x7FFFFFFF
    assert memory.read(2 * MIB, len(CODE)) == CODE
    # Neither the setup code before it nor the signature after it is the kernel's.
    assert blank(memory.read(0, 2 * MIB))
    assert blank(memory.read(2 * MIB + len(CODE), RAM_BYTES - 2 * MIB - len(CODE)))


def test_the_setup_header_is_kept_as_the_file_has_it(memory: GuestMemory, image: MakeFile) -> None:
    content = bzimage(payload_offset=0x1234)
    kernel = load_kernel(memory, image(content))
    assert kernel.setup_header == bytes(content[SETUP_HEADER:SETUP_HEADER_END])


def test_a_header_that_grew_since_is_kept_whole(memory: GuestMemory, image: MakeFile) -> None:
    content = bzimage(jump=0xEB | (0x290 - 0x202) << 8)
    kernel = load_kernel(memory, image(content))
    assert kernel.setup_header == bytes(content[SETUP_HEADER:0x290])


def test_the_need_for_ram_is_rounded_up_to_pages(memory: GuestMemory, image: MakeFile) -> None:
    assert load_kernel(memory, image(bzimage(init_size=MIB + 1))).end == 3 * MIB + 4096


def test_a_kernel_that_is_not_relocatable_may_be_unaligned(
    memory: GuestMemory, image: MakeFile
) -> None:
    path = image(bzimage(relocatable_kernel=0, kernel_alignment=0, pref_address=MIB + 0x1000))
    assert load_kernel(memory, path).start == MIB + 0x1000


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"kernel_alignment": 2 * MIB, "pref_address": 3 * MIB}, "kernel_alignment 0x200000"),
        ({"kernel_alignment": 0x1000, "pref_address": 2 * MIB + 1}, "kernel_alignment 0x1000"),
        ({"kernel_alignment": 0x1000, "pref_address": 2 * MIB + 0x800}, "kernel_alignment 0x1000"),
        ({"kernel_alignment": 0, "pref_address": 2 * MIB + 1}, "a page, 0x1000"),
        ({"kernel_alignment": 1, "pref_address": 2 * MIB + 0x10}, "a page, 0x1000"),
    ],
)
@pytest.mark.parametrize("relocatable", [0, 1])
def test_fault_10_a_preferred_address_that_is_not_aligned(
    memory: GuestMemory, image: MakeFile, fields: dict[str, int], problem: str, relocatable: int
) -> None:
    if relocatable and not fields["kernel_alignment"]:
        problem = "kernel_alignment is 0x0, must be a power of two"
    refused(memory, image(bzimage(fields, relocatable_kernel=relocatable)), problem)
    refused(memory, image(bzimage(relocatable_kernel=relocatable, kernel_alignment=0x3000,
                                  pref_address=3 * MIB)), "must be a power of two")


def test_a_kernel_may_need_no_more_than_its_code(memory: GuestMemory, image: MakeFile) -> None:
    kernel = load_kernel(memory, image(bzimage(init_size=len(CODE))))
    assert kernel.end == kernel.start + len(CODE)


def test_a_kernel_may_start_at_1_mib(memory: GuestMemory, image: MakeFile) -> None:
    assert load_kernel(memory, image(bzimage(kernel_alignment=MIB, pref_address=MIB))).start == MIB


def test_a_kernel_may_need_all_of_ram_but_no_byte_more(
    memory: GuestMemory, image: MakeFile
) -> None:
    assert load_kernel(memory, image(bzimage(init_size=RAM_BYTES - 2 * MIB))).end == RAM_BYTES
    over = image(bzimage(init_size=RAM_BYTES - 2 * MIB + 1))
    with pytest.raises(ConfigError, match="--memory must be at least 9M"):
        load_kernel(memory, over)


@pytest.mark.parametrize(
    ("text", "offset", "version"),
    [
        (b"6.1\x1b[2J\xff", 0x100, "6.1?[2J?"),
        (b"6.1", 0, ""),
        (b"6.1", 0x200, ""),
        (b"6.1", 0xFFFF, ""),
        (b"v" * 0xFF + b"end", 0x100, "v" * 0xFF + "e"),
    ],
    ids=["escapes", "none", "at the end of the setup", "outside", "long"],
)
def test_version_text_is_bounded_and_printable(
    memory: GuestMemory, image: MakeFile, text: bytes, offset: int, version: str
) -> None:
    path = image(bzimage(version_text=text, kernel_version=offset))
    assert load_kernel(memory, path).version == version


def test_cmdline_limit_is_what_fits_our_layout_too(memory: GuestMemory, image: MakeFile) -> None:
    path = image(bzimage(cmdline_size=0xFFFFFFFF))
    assert load_kernel(memory, path).cmdline_limit == 0xFFFF


@pytest.mark.parametrize("name", SETUP_FIELDS)
def test_bad_input_93_truncated_at_each_header_field(
    memory: GuestMemory, image: MakeFile, name: str
) -> None:
    offset, size = SETUP_FIELDS[name]
    # Before all of HdrS is there, nothing tells that this was a kernel.
    problem = "truncated" if offset >= 0x206 else "not a Linux kernel: neither"
    refused(memory, image(bzimage()[:offset]), problem)
    refused(memory, image(bzimage()[: offset + size - 1]), problem)


def test_bad_input_93_truncated_after_the_header(memory: GuestMemory, image: MakeFile) -> None:
    refused(memory, image(bzimage()[:SETUP_HEADER_END]), "truncated", "ends at 620")
    refused(memory, image(bzimage()[:1024]), "truncated", "bytes 1024 to 5120", "ends at 1024")
    refused(memory, image(bzimage()[:-16]), "truncated", "ends at 5104")


@pytest.mark.parametrize("missing", [1, 8, 15])
def test_fault_26_a_file_may_end_within_its_last_paragraph(
    memory: GuestMemory, image: MakeFile, missing: int
) -> None:
    """syssize counts 16 bytes: memtest86+ of Debian ends 8 bytes before syssize * 16."""
    kernel = load_kernel(memory, image(bzimage()[:-missing]))
    length = len(CODE) - missing
    assert memory.read(kernel.start, len(CODE)) == CODE[:length] + bytes(missing)
    (segment,) = kernel.segments
    assert segment.length == length


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"header": 0x53726449}, "not a Linux kernel: neither an ELF magic at byte 0 nor 'HdrS'"),
        ({"boot_flag": 0x55AA}, "boot_flag is 0x55aa, must be 0xaa55"),
        ({"version": 0x020B}, "boot protocol is 2.11, must be 2.12 or later"),
        ({"version": 0}, "boot protocol is 0.00, must be 2.12 or later"),
        ({"jump": 0x6AEA}, "byte 0x200 of the setup header is 0xea, must be a short jump (0xeb)"),
        ({"jump": 0x8FEB}, "setup header ends at byte 0x291, past its limit of 0x290"),
        ({"jump": 0x61EB}, "setup header is 114 bytes, must be at least 115 (to init_size)"),
        ({"loadflags": 0xFE}, "loadflags 0xfe lack LOADED_HIGH (0x1)"),
    ],
)
def test_bad_input_94_bad_magic_or_protocol(
    memory: GuestMemory, image: MakeFile, fields: dict[str, int], problem: str
) -> None:
    refused(memory, image(bzimage(fields)), problem)


def test_protocol_2_12_is_enough(memory: GuestMemory, image: MakeFile) -> None:
    path = image(bzimage(version=0x020C, jump=0xEB | (0x264 - 0x202) << 8))
    assert load_kernel(memory, path).protocol == 0x020C


def test_bad_input_95_setup_sects_0_means_4(memory: GuestMemory, image: MakeFile) -> None:
    code = bytes(3 * 512) + CODE
    kernel = load_kernel(memory, image(bzimage(code=code, setup_sects=0, syssize=len(CODE) // 16)))
    assert memory.read(kernel.start, len(CODE)) == CODE


def test_bad_input_95_setup_sects_255_beyond_the_file(memory: GuestMemory, image: MakeFile) -> None:
    refused(memory, image(bzimage(setup_sects=255)), "truncated", "setup_sects (255)",
            "bytes 131072 to 135168", "ends at 5120")


@pytest.mark.parametrize("syssize", [len(CODE) // 16 + 1, 0xFFFFFFFF])
def test_bad_input_97_syssize_over_the_file(
    memory: GuestMemory, image: MakeFile, syssize: int
) -> None:
    refused(memory, image(bzimage(syssize=syssize, init_size=0xFFFFFFFF)),
            "truncated", f"bytes 1024 to {1024 + syssize * 16}", "ends at 5120")


@pytest.mark.parametrize("syssize", [0, 0x20])
def test_bad_input_97_syssize_before_the_entry(
    memory: GuestMemory, image: MakeFile, syssize: int
) -> None:
    refused(memory, image(bzimage(syssize=syssize)), f"syssize gives {syssize * 16} bytes",
            "must be more than 512")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"init_size": 0xFFFFFFFF}, "ends at 0x100200000; the highest end for a kernel is 0xc0000"),
        ({"init_size": 7 * MIB}, "needs RAM up to 0x900000, but RAM ends at 0x800000: "
                                 "--memory must be at least 9M"),
        ({"init_size": len(CODE) - 1}, "init_size is 4095 bytes, must be at least the 4096"),
        ({"init_size": 0}, "init_size is 0 bytes"),
        ({"pref_address": 0}, "starts at 0x0; the lowest address for a kernel is 0x100000"),
        ({"pref_address": 0xFF000, "relocatable_kernel": 0, "kernel_alignment": 0},
         "starts at 0xff000; the lowest"),
        ({"pref_address": 8 * MIB}, "--memory must be at least 9M"),
        ({"pref_address": 4 << 30}, "the highest end for a kernel is 0xc0000000"),
        ({"pref_address": (1 << 64) - 2 * MIB}, "the highest end for a kernel is 0xc0000000"),
        ({"pref_address": 3 * MIB}, "is not a multiple of kernel_alignment 0x200000"),
        ({"kernel_alignment": 0}, "kernel_alignment is 0x0, must be a power of two"),
        ({"kernel_alignment": 3 * MIB}, "kernel_alignment is 0x300000, must be a power of two"),
    ],
)
def test_bad_input_98_outside_ram(
    memory: GuestMemory, image: MakeFile, fields: dict[str, int], problem: str
) -> None:
    refused(memory, image(bzimage(fields)), problem)


def test_bad_input_98_kernel_larger_than_ram(memory: GuestMemory, image: MakeFile) -> None:
    path = image(bzimage(code=bytes(RAM_BYTES), init_size=2 * RAM_BYTES))
    refused(memory, path, "needs RAM up to", "--memory must be at least 18M")


@pytest.mark.parametrize("xloadflags", [0, 0xFFFE])
def test_bad_input_100_no_64_bit_entry(
    memory: GuestMemory, image: MakeFile, xloadflags: int
) -> None:
    refused(memory, image(bzimage(xloadflags=xloadflags)), "no 64-bit entry", "XLF_KERNEL_64")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file that every example overwrites."""
    return tmp_path_factory.mktemp("mutated") / "bzImage"


_interesting = st.sampled_from([0, 1, 0x10, 0x200, MIB, 2 * MIB, 7 * MIB, 8 * MIB, (1 << 64) - 1])


@settings(max_examples=300, deadline=None)
@given(
    fields=st.dictionaries(
        st.sampled_from(sorted(SETUP_FIELDS)),
        _interesting | st.integers(min_value=0, max_value=(1 << 64) - 1),
        max_size=4,
    ),
    noise=st.dictionaries(
        st.integers(min_value=0, max_value=0x2FF), st.integers(min_value=0, max_value=255),
        max_size=4,
    ),
    length=st.none() | st.integers(min_value=1, max_value=1024 + len(CODE)),
)
def test_no_header_escapes_as_anything_but_a_config_error(
    scratch: Path, fields: dict[str, int], noise: dict[int, int], length: int | None
) -> None:
    content = bzimage(
        {name: value & ((1 << 8 * SETUP_FIELDS[name][1]) - 1) for name, value in fields.items()}
    )
    for offset, byte in noise.items():
        content[offset] = byte
    scratch.write_bytes(content[:length])
    check_any_kernel(scratch)
