"""The files a kernel or initrd can come from, and where an initrd goes."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.memory import GuestMemory
from pyvmm.x86.loader import Kernel, load_initrd, load_kernel
from tests.support.kernels import CODE, MIB, bzimage, elf
from tests.support.loading import RAM_BYTES, MakeFile, blank

Load = Callable[[Path], object]
PreadV = Callable[[int, Sequence[memoryview], int], int]


@pytest.fixture
def kernel(memory: GuestMemory, image: MakeFile) -> Kernel:
    """A kernel in [2 MiB, 3 MiB)."""
    return load_kernel(memory, image(bzimage()))


@pytest.fixture(params=["kernel", "initrd"])
def load(request: pytest.FixtureRequest, memory: GuestMemory, kernel: Kernel) -> Load:
    """Both ways a file gets into RAM: what holds for one holds for the other."""
    if request.param == "kernel":
        return lambda path: load_kernel(memory, path)
    return lambda path: load_initrd(memory, path, kernel)


def refused(load: Load, path: Path, *problem: str) -> None:
    """``load`` refuses ``path`` in one line that has all of ``problem``; nothing stays open."""
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ConfigError) as caught:
        load(path)
    subject, _, rest = str(caught.value).partition(": ")
    assert subject == str(path)
    assert "\n" not in rest
    for part in problem:
        assert part in rest
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


@pytest.mark.parametrize("content", [b"x", b"#!/bin/sh\n", b"\x7fEL", bytes(4096)])
def test_what_is_no_kernel_is_said_to_be_none(
    memory: GuestMemory, image: MakeFile, content: bytes
) -> None:
    refused(lambda path: load_kernel(memory, path), image(content),
            "not a Linux kernel: neither an ELF magic at byte 0 nor 'HdrS' at byte 0x202")


def test_a_path_may_be_text(memory: GuestMemory, image: MakeFile) -> None:
    assert load_kernel(memory, str(image(elf()))).entry == 2 * MIB


def test_bad_input_92_empty_file(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    refused(load, path, "is empty (0 bytes")


def test_missing_file(load: Load, tmp_path: Path) -> None:
    refused(load, tmp_path / "missing", "cannot open: No such file or directory")


def test_name_that_no_file_can_have(load: Load) -> None:
    refused(load, Path("a\0b"), "cannot open: embedded null byte")


@pytest.fixture
def unreadable(tmp_path: Path) -> Iterator[Path]:
    """A file that this process may not read, which takes being somebody else than root."""
    path = tmp_path / "unreadable"
    path.touch(mode=0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield path
    if root:
        os.seteuid(0)


def test_unreadable_file(load: Load, unreadable: Path) -> None:
    refused(load, unreadable, "cannot open: Permission denied")


def test_bad_input_112_fifo_does_not_hang(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    refused(load, path, "is a FIFO, and must be a regular file")


def test_bad_input_112_directory(load: Load, tmp_path: Path) -> None:
    refused(load, tmp_path, "is a directory, and must be a regular file")


def test_bad_input_112_device(load: Load) -> None:
    refused(load, Path("/dev/zero"), "is a character device, and must be a regular file")


def test_bad_input_112_socket(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        refused(load, Path("socket"), "cannot open: No such device or address")


def test_bad_input_112_proc_file(load: Load) -> None:
    assert stat.S_ISREG(Path("/proc/version").stat().st_mode)
    refused(load, Path("/proc/version"), "is empty", "/proc")


def test_bad_input_112_file_whose_size_is_a_lie(load: Load) -> None:
    # A file in /sys has the size of a page, whatever a read returns.
    path = Path("/sys/kernel/uevent_seqnum")
    refused(load, path, "ends after", "but its size was 4096")


def test_bad_input_112_symlink_to_a_regular_file_is_fine(
    memory: GuestMemory, image: MakeFile, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(image(bzimage()))
    kernel = load_kernel(memory, link)
    assert memory.read(kernel.start, len(CODE)) == CODE
    assert load_initrd(memory, link, kernel)[1] == 1024 + len(CODE)


def test_short_reads_are_continued(
    memory: GuestMemory, image: MakeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv: PreadV = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:100]], offset)
    )
    kernel = load_kernel(memory, image(bzimage()))
    assert memory.read(kernel.start, len(CODE)) == CODE


@pytest.mark.parametrize("content", [bzimage(), elf()], ids=["bzImage", "ELF"])
def test_a_kernel_that_shrinks_while_it_is_read_is_refused(
    memory: GuestMemory, image: MakeFile, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    path = image(content)
    preadv: PreadV = os.preadv

    def shrink_after(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        count = preadv(fd, buffers, offset)
        os.truncate(path, 2000)
        return count

    monkeypatch.setattr(os, "preadv", shrink_after)
    refused(lambda path: load_kernel(memory, path), path, "ends after 2000 bytes while being read",
            f"its size was {len(content)}")


def test_a_read_error_names_the_file(
    load: Load, image: MakeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise OSError(5, os.strerror(5))

    path = image(bzimage())
    monkeypatch.setattr(os, "preadv", fail)
    refused(load, path, "cannot read at byte 0: Input/output error")


@pytest.mark.parametrize(
    ("size_bytes", "gpa"),
    [(1, RAM_BYTES - 4096), (4096, RAM_BYTES - 4096), (4097, RAM_BYTES - 8192),
     (5 * MIB, 3 * MIB)],
)
def test_initrd_goes_to_the_top_of_ram(
    memory: GuestMemory, kernel: Kernel, initrd_file: MakeFile, size_bytes: int, gpa: int
) -> None:
    content = (b"initrd" * (size_bytes // 6 + 1))[:size_bytes]
    assert load_initrd(memory, initrd_file(content), kernel) == (gpa, size_bytes)
    assert memory.read(gpa, size_bytes) == content
    assert memory.read(kernel.start, len(CODE)) == CODE


def test_bytes_of_ours_go_before_the_initrds(
    memory: GuestMemory, kernel: Kernel, initrd_file: MakeFile
) -> None:
    front = bytes(range(256)) * 16
    gpa, size_bytes = load_initrd(memory, initrd_file(b"initrd"), kernel, front=front)
    assert (gpa, size_bytes) == (RAM_BYTES - 8192, 4096 + 6)
    assert memory.read(gpa, size_bytes) == front + b"initrd"
    room = RAM_BYTES - kernel.end
    refused(lambda path: load_initrd(memory, path, kernel, front=bytes(room)), initrd_file(b"x"),
            f"{room + 1} bytes are too large for an initrd: the limit is {room}")


@pytest.mark.parametrize(
    ("initrd_addr_max", "gpa"),
    [(5 * MIB - 1, 5 * MIB - 8192), (5 * MIB - 2, 5 * MIB - 8192), (5 * MIB + 903, 5 * MIB - 4096)],
)
def test_initrd_ends_at_or_under_initrd_addr_max(
    memory: GuestMemory, image: MakeFile, initrd_file: MakeFile, initrd_addr_max: int, gpa: int
) -> None:
    kernel = load_kernel(memory, image(bzimage(initrd_addr_max=initrd_addr_max)))
    assert load_initrd(memory, initrd_file(b"x" * 5000), kernel) == (gpa, 5000)
    assert gpa + 5000 <= initrd_addr_max + 1


def test_initrd_stays_below_4_gib_when_there_is_ram_above(
    image: MakeFile, initrd_file: MakeFile
) -> None:
    low, high = 8 * MIB, 1 * MIB
    with GuestMemory([(0, low), (1 << 32, high)], shared=True) as memory:
        kernel = load_kernel(memory, image(bzimage()))
        assert load_initrd(memory, initrd_file(b"x"), kernel) == (low - 4096, 1)


def test_bad_input_110_initrd_of_0_bytes(
    memory: GuestMemory, kernel: Kernel, initrd_file: MakeFile
) -> None:
    refused(lambda path: load_initrd(memory, path, kernel), initrd_file(b""), "is empty (0 bytes")


def test_bad_input_110_initrd_over_ram(
    memory: GuestMemory, kernel: Kernel, initrd_file: MakeFile
) -> None:
    path = initrd_file(b"")
    os.truncate(path, 1 << 40)
    refused(lambda path: load_initrd(memory, path, kernel), path,
            f"{1 << 40} bytes are too large for an initrd: the limit is {5 * MIB}",
            "the end of RAM (--memory) at 0x800000")


def test_bad_input_110_initrd_overlapping_the_kernel(
    memory: GuestMemory, kernel: Kernel, initrd_file: MakeFile
) -> None:
    # The kernel's file is small: it is its init_size that the initrd would run into.
    path = initrd_file(b"x" * (5 * MIB + 1))
    refused(lambda path: load_initrd(memory, path, kernel), path,
            f"the limit is {5 * MIB}, between the kernel's end at 0x300000")
    assert blank(memory.read(3 * MIB, 5 * MIB))


@pytest.mark.parametrize(
    ("initrd_addr_max", "room"),
    [(0, 0), (3 * MIB - 1, 0), (3 * MIB + 4094, 0), (3 * MIB + 4095, 4096)],
)
def test_bad_input_110_initrd_over_initrd_addr_max(
    memory: GuestMemory, image: MakeFile, initrd_file: MakeFile, initrd_addr_max: int, room: int
) -> None:
    kernel = load_kernel(memory, image(bzimage(initrd_addr_max=initrd_addr_max)))
    path = initrd_file(b"x" * (room + 1))
    refused(lambda path: load_initrd(memory, path, kernel), path, f"the limit is {room},",
            f"the kernel's initrd_addr_max at {initrd_addr_max + 1:#x}")
