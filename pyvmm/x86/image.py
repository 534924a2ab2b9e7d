"""The parts that both kernel loaders share: the file they read and the plan they make from it.

``bzimage.parse`` and ``elf.parse`` only look.  They read headers through an ``ImageFile``, judge
every field, and return a ``Kernel``, whose segments map bytes of the file to guest addresses.
``loader`` then carries the plan out, so a file that is refused has changed nothing in RAM.
"""

from __future__ import annotations

import os
import stat
from types import TracebackType

from pyvmm.errors import ConfigError
from pyvmm.startup.types import Record, StrEnum
from pyvmm.x86 import layout

# O_NONBLOCK: opening a FIFO must not wait for a writer; it means nothing for regular files.
_OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_FILE_TYPES = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


ELF_MAGIC = b"\x7fELF"
SETUP_HEADER_MAX_END = 0x290
"""The offset at which a bzImage's header must have ended (boot.rst, "The Real-Mode Kernel
Header")."""


class KernelKind(StrEnum):
    """The kernel formats that pyvmm boots."""

    BZIMAGE = "bzImage"
    ELF = "ELF vmlinux"


class EntryKind(StrEnum):
    """The state in which a kernel expects to be entered, and the structure that it expects then."""

    LINUX_64 = "64-bit Linux entry"
    """64-bit mode, rsi = boot_params (Documentation/arch/x86/boot.rst, 64-bit boot protocol)."""
    PVH = "32-bit PVH entry"
    """32-bit protected mode, ebx = hvm_start_info (Xen's docs/misc/pvh.pandoc)."""


class Segment(Record):
    """``length`` bytes at ``file_offset`` of the kernel file, to be loaded at ``gpa``."""

    file_offset: int
    gpa: int
    length: int


class Kernel(Record):
    """A kernel that has passed every check, and its place in guest RAM.

    Addresses are guest physical.  ``start`` and ``end`` (exclusive, page-aligned) bound the RAM
    that the kernel needs before it reads its memory map, bss and decompression room included.
    Execution starts at ``entry``, in the state that ``entry_kind`` names.  ``setup_header`` is the
    bzImage's, from offset 0x1f1 of the file; an ELF kernel has none.  ``initrd_addr_max`` is the
    highest address of an initrd's last byte; ``cmdline_limit`` counts bytes without the NUL.
    ``protocol`` is the boot protocol, major in the high byte (0 for ELF); ``version`` is the
    kernel's own text, "" when it gives none.  ``is_linux`` is False if nothing shows that it is
    Linux and not another program that boots in this way.
    """

    path: str
    kind: KernelKind
    start: int
    end: int
    entry: int
    entry_kind: EntryKind
    segments: tuple[Segment, ...]
    setup_header: bytes | None
    initrd_addr_max: int
    cmdline_limit: int
    protocol: int
    version: str
    is_linux: bool = True

    def describe(self) -> str:
        """Return the file's kind, its entry and the RAM it needs, on one line."""
        words = [str(self.kind)]
        if self.protocol:
            words.append(f"boot protocol {dotted(self.protocol)}")
        if self.version:
            release = f"Linux {self.version.split(' ', 1)[0]}"
            words.append(release if self.is_linux else self.version)
        words.append(f"{self.entry_kind} at {self.entry:#x}")
        words.append(f"needs RAM from {self.start:#x} to {self.end:#x}")
        return ", ".join(words)


class ImageFile:
    """A kernel or initrd on the host, open for reading: a regular file that is not empty.

    Its size is taken once, when it is opened.  A read returns all bytes asked for, or raises
    ConfigError naming the file, also if the file has shrunk since.
    """

    __slots__ = ("_fd", "path", "size_bytes")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._fd = -1
        try:
            self._fd = os.open(self.path, _OPEN_FLAGS)
            status = os.fstat(self._fd)
        except OSError as error:
            self.close()
            raise self.error(f"cannot open: {error.strerror}") from error
        except ValueError as error:  # a NUL in the name
            raise self.error(f"cannot open: {error}") from error
        self.size_bytes = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            kind = _FILE_TYPES.get(stat.S_IFMT(status.st_mode), "a special file")
            raise self.error(f"is {kind}, and must be a regular file")
        if self.size_bytes == 0:
            self.close()
            raise self.error("is empty (0 bytes; a file in /proc counts as empty)")

    def error(self, problem: str) -> ConfigError:
        """Return the error that blames this file for ``problem``."""
        return ConfigError(self.path, problem)

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fill ``buffer`` with the file's bytes from ``offset``, however short the reads are."""
        done = 0
        with memoryview(buffer) as whole:
            while done < len(whole):
                with whole[done:] as rest:
                    count = self._read_some(rest, offset + done)
                if count == 0:
                    raise self.error(f"ends after {offset + done} bytes while being read, "
                                     f"but its size was {self.size_bytes}")
                done += count

    def _read_some(self, buffer: memoryview, offset: int) -> int:
        try:
            return os.preadv(self._fd, [buffer], offset)
        except OSError as error:
            raise self.error(f"cannot read at byte {offset}: {error.strerror}") from error

    def read_at(self, offset: int, length: int) -> bytes:
        """Return a copy of exactly ``length`` bytes at ``offset``."""
        data = bytearray(length)
        self.read_into(data, offset)
        return bytes(data)

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> ImageFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def dotted(protocol: int) -> str:
    """Return a boot protocol number as boot.rst writes it: 0x020f is "2.15"."""
    return f"{protocol >> 8}.{protocol & 0xFF:02}"


def align_up(value: int, alignment: int) -> int:
    """Return ``value`` rounded up to a multiple of ``alignment``, a power of two."""
    return (value + alignment - 1) & -alignment


def require_ram(image: ImageFile, what: str, start: int, end: int, ram_end: int) -> None:
    """Raise ConfigError unless [start, end) is RAM that a kernel may have.

    Such RAM goes from 1 MiB, above our boot structures and the BIOS hole, to ``ram_end``, the end
    of RAM below 4 GiB.
    """
    if start < layout.HIGH_RAM_START:
        raise image.error(f"{what} starts at {start:#x}; "
                          f"the lowest address for a kernel is {layout.HIGH_RAM_START:#x}")
    if end > layout.MMIO_GAP_START:
        raise image.error(f"{what} ends at {end:#x}; "
                          f"the highest end for a kernel is {layout.MMIO_GAP_START:#x}")
    if end > ram_end:
        needed = align_up(end, layout.MIB) // layout.MIB
        raise image.error(f"{what} needs RAM up to {end:#x}, but RAM ends at {ram_end:#x}: "
                          f"--memory must be at least {needed}M")
