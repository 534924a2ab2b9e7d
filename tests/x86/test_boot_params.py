"""The zero page: its layout against the kernel's header, its contents against boot.rst."""

from __future__ import annotations

import ctypes
import struct
import subprocess
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.memory import GuestMemory
from pyvmm.x86 import layout
from pyvmm.x86.boot_params import (
    BootE820Entry,
    BootParams,
    SetupHeader,
    e820_map,
    write_boot_params,
)
from pyvmm.x86.loader import Kernel, load_kernel
from tests.support.kernels import GIB, MIB, SETUP_FIELDS, bzimage, elf
from tests.support.loading import MakeFile, blank

RAM, RESERVED = 1, 2
BOOT_PARAMS = 0x7000
_STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "setup_header": SetupHeader,
    "boot_e820_entry": BootE820Entry,
    "boot_params": BootParams,
}


def test_structures_are_those_of_the_kernel_header(tmp_path: Path) -> None:
    """Every member's offset and size, as the C compiler sees <asm/bootparam.h>."""
    lines, ours = [], []
    for name, structure in _STRUCTURES.items():
        lines.append(f'printf("{name} %zu\\n", sizeof(struct {name}));')
        ours.append(f"{name} {ctypes.sizeof(structure)}")
        for member, *_ in structure._fields_:
            field = getattr(structure, member)
            lines.append(
                f'printf("{name}.{member} %zu %zu\\n", offsetof(struct {name}, {member}),'
                f" sizeof(((struct {name} *)0)->{member}));"
            )
            ours.append(f"{name}.{member} {field.offset} {field.size}")
    source = tmp_path / "probe.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <asm/bootparam.h>\n"
        "int main(void) {\n" + "\n".join(lines) + "\nreturn 0; }\n"
    )
    subprocess.run(["gcc", "-o", tmp_path / "probe", source], check=True)
    answer = subprocess.run([tmp_path / "probe"], check=True, capture_output=True, text=True)
    assert answer.stdout.splitlines() == ours


def header_field(memory: GuestMemory, name: str) -> int:
    """A setup header field in the zero page, found by boot.rst's offset."""
    offset, size = SETUP_FIELDS[name]
    return memory.read_int(BOOT_PARAMS + offset, size)


def e820(memory: GuestMemory) -> list[tuple[int, int, int]]:
    """The memory map that Linux would find."""
    count = memory.read_int(BOOT_PARAMS + 0x1E8, 1)
    return list(struct.iter_unpack("<QQI", memory.read(BOOT_PARAMS + 0x2D0, 20 * count)))


@pytest.fixture
def kernel(memory: GuestMemory, image: MakeFile) -> Kernel:
    """A bzImage with values of its own in fields we must leave alone or replace."""
    return load_kernel(memory, image(bzimage(
        root_flags=1, loadflags=0xC1, payload_offset=0x2CC, cmdline_size=20,
        setup_data=0xDEAD0000, ramdisk_image=0xBAD000, ramdisk_size=77, cmd_line_ptr=5,
    )))


@pytest.fixture
def elf_kernel(memory: GuestMemory, image: MakeFile) -> Kernel:
    return load_kernel(memory, image(elf()))


def test_a_bzimages_own_header_is_passed_on(memory: GuestMemory, kernel: Kernel) -> None:
    write_boot_params(memory, kernel, "quiet", None)
    for name, value in {
        "boot_flag": 0xAA55, "header": 0x53726448, "version": 0x020F, "root_flags": 1,
        "payload_offset": 0x2CC, "init_size": MIB, "pref_address": 2 * MIB, "xloadflags": 1,
    }.items():
        assert header_field(memory, name) == value, name


def test_the_loaders_fields_are_filled_in(memory: GuestMemory, kernel: Kernel) -> None:
    write_boot_params(memory, kernel, "quiet", None)
    for name, value in {
        "type_of_loader": 0xFF, "loadflags": 1, "vid_mode": 0xFFFF, "cmd_line_ptr": 0x20000,
        "ramdisk_image": 0, "ramdisk_size": 0, "setup_data": 0,
    }.items():
        assert header_field(memory, name) == value, name


def test_a_header_that_grew_since_is_passed_on_whole(memory: GuestMemory, image: MakeFile) -> None:
    content = bzimage(jump=0xEB | (0x290 - 0x202) << 8)
    content[0x26C:0x290] = b"\xa5" * 0x24
    write_boot_params(memory, load_kernel(memory, image(content)), "", None)
    assert memory.read(BOOT_PARAMS + 0x26C, 0x24) == b"\xa5" * 0x24


def test_nothing_but_the_header_comes_from_the_file(memory: GuestMemory, image: MakeFile) -> None:
    content = bzimage()
    content[:0x1F1] = b"\xff" * 0x1F1
    content[0x26C:0x400] = b"\xff" * (0x400 - 0x26C)
    write_boot_params(memory, load_kernel(memory, image(content)), "", None)
    page = memory.read(BOOT_PARAMS, 4096)
    assert page[0x1E8] == len(e820(memory))
    # zero-page.rst: a sentinel that is not zero makes Linux distrust the page.
    assert blank(page[:0x1E8] + page[0x1E9:0x1F1] + page[0x26C:0x2D0] + page[0xCD0:])


def test_an_elf_kernel_gets_a_minimal_header(memory: GuestMemory, elf_kernel: Kernel) -> None:
    write_boot_params(memory, elf_kernel, "console=ttyS0", (4 * MIB, 123))
    for name, value in {
        "boot_flag": 0xAA55, "header": 0x53726448, "version": 0x020C, "type_of_loader": 0xFF,
        "loadflags": 1, "cmd_line_ptr": 0x20000, "cmdline_size": 2047, "kernel_alignment": 16 * MIB,
        "ramdisk_image": 4 * MIB, "ramdisk_size": 123,
    }.items():
        assert header_field(memory, name) == value, name
    assert memory.read(0x20000, 14) == b"console=ttyS0\0"


def test_initrd_is_passed_in_both_halves(memory: GuestMemory, kernel: Kernel) -> None:
    write_boot_params(memory, kernel, "", (0x5_6789_A000, 0x1_0000_0002))
    assert header_field(memory, "ramdisk_image") == 0x6789_A000
    assert header_field(memory, "ramdisk_size") == 2
    assert memory.read_int(BOOT_PARAMS + 0xC0, 4) == 5
    assert memory.read_int(BOOT_PARAMS + 0xC4, 4) == 1


def test_e820_of_a_small_machine(memory: GuestMemory, kernel: Kernel) -> None:
    write_boot_params(memory, kernel, "", None)
    assert e820(memory) == [
        (0, 0x9FC00, RAM),
        (0x9FC00, 0x60400, RESERVED),
        (0x100000, 7 * MIB, RAM),
        (0xFFFBC000, 0x4000, RESERVED),
    ]


@pytest.mark.parametrize("memory_bytes", [16 * MIB, 3 * GIB, 3 * GIB + 4096, 5 * GIB, 512 * GIB])
def test_e820_has_all_ram_once_and_in_order(memory_bytes: int) -> None:
    ranges = layout.ram_ranges(memory_bytes)
    entries = e820_map(ranges)
    ends = [address + size for address, size, _ in entries]
    assert all(size > 0 for _, size, _ in entries)
    assert all(end <= start for end, (start, _, _) in zip(ends, entries[1:], strict=False))
    hole = 0x100000 - 0x9FC00
    assert sum(size for _, size, kind in entries if kind == RAM) == memory_bytes - hole
    above = [(a, s) for a, s, _ in entries if a >= 4 * GIB]
    assert above == ranges[1:]


@pytest.mark.parametrize("cmdline", ["", "x", "x" * 20])
def test_bad_input_109_cmdline_up_to_the_limit_is_taken(
    memory: GuestMemory, kernel: Kernel, cmdline: str
) -> None:
    memory.write(0x20000, b"\xff" * 32)
    write_boot_params(memory, kernel, cmdline, None)
    assert memory.read(0x20000, len(cmdline) + 1) == cmdline.encode() + b"\0"


def refused(memory: GuestMemory, kernel: Kernel, cmdline: str, *problem: str) -> None:
    """The command line is refused in one line that has all of ``problem``; nothing is written."""
    with pytest.raises(ConfigError) as caught:
        write_boot_params(memory, kernel, cmdline, None)
    message = str(caught.value)
    assert message.startswith("the command line: ")
    assert message.isprintable()
    for part in problem:
        assert part in message
    assert blank(memory.read(0, 2 * MIB))


def test_bad_input_109_cmdline_over_the_limit(memory: GuestMemory, kernel: Kernel) -> None:
    refused(memory, kernel, "x" * 21, "21 bytes", f"the limit of kernel {kernel.path} is 20")


def test_bad_input_109_cmdline_over_the_limit_of_an_elf_kernel(
    memory: GuestMemory, elf_kernel: Kernel
) -> None:
    refused(memory, elf_kernel, "x" * 2048, "2048 bytes", "is 2047")


@pytest.mark.parametrize(
    ("cmdline", "problem"),
    [
        ("a\0b", r"has '\x00' at position 1"),
        ("root=\u00e9", r"has '\xe9' at position 5"),
        ("\udcff", r"has '\udcff' at position 0"),
        ("\U0001f427" * 30, r"has '\U0001f427' at position 0"),
    ],
    ids=["NUL", "Latin-1", "undecodable byte", "emoji"],
)
def test_bad_input_109_cmdline_that_is_not_ascii(
    memory: GuestMemory, kernel: Kernel, cmdline: str, problem: str
) -> None:
    refused(memory, kernel, cmdline, problem, "only ASCII without NUL")
