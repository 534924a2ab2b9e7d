"""The kernel loader: bzImage and ELF files, notes, an initrd, what the guest is told of them."""

from __future__ import annotations

from collections.abc import Iterable

from fuzz.checks import check_one_line
from fuzz.files import MemoryFile
from fuzz.target import Target
from pyvmm.errors import ConfigError
from pyvmm.memory import GuestMemory
from pyvmm.x86.loader import Kernel, load_initrd, load_kernel, write_boot_info
from tests.support.kernels import MIB, ElfSegment, bzimage, elf, note, note_segment, pvh_note

_RAM_BYTES = 4 * MIB
_CMDLINE = "console=ttyS0 root=/dev/vda"


class KernelTarget(Target):
    """A file is refused in one line and changes no RAM, or is loaded where a kernel may be."""

    max_bytes = 16 << 10
    words = (b"\x7fELF", b"HdrS", b"Xen\0", b"\x55\xaa", b"Linux\0\0\0", b"GNU\0")

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
        ]

    def run(self, data: bytes) -> None:
        """Load ``data`` as a kernel, then as its own initrd."""
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
