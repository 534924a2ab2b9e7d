"""``pyvmm kernel inspect``: payloads, their decompression, versions, IKCONFIG."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
from collections.abc import Iterable

from fuzz.checks import check_one_line
from fuzz.files import MemoryFile
from fuzz.target import Target
from pyvmm.errors import ConfigError
from pyvmm.linux.compression import Compression, detect
from pyvmm.linux.formats import MAGIC_BYTES
from pyvmm.linux.payload import HEAD_BYTES, locate
from pyvmm.x86.inspect import inspect, read_configuration
from tests.support.kernels import ElfSegment, bz_with, elf, with_ikconfig

_BY_PROGRAM = (Compression.ZSTD, Compression.LZO)


class InspectTarget(Target):
    """Inspecting ends with what the file says, or one line."""

    max_bytes = 16 << 10
    limit_s = 5.0
    words = (b"\x7fELF", b"HdrS", b"IKCFG_ST", b"IKCFG_ED", b"Linux version ", b"CONFIG_X=y\n",
             b"\x1f\x8b", b"\xfd7zXZ\0", b"\x02\x21\x4c\x18", b"BZh9", b"\x5d\0\0")

    def __init__(self) -> None:
        self._file = MemoryFile()

    def seeds(self) -> Iterable[bytes]:
        """Return bzImages with a payload of every kind that Python itself unpacks."""
        plain = bytes(elf(ElfSegment(data=b"Linux version 6.1.0-x (a@b) #1\n\0" + bytes(200))))
        size = len(plain).to_bytes(4, "little")
        lz4 = b"\x02\x21\x4c\x18" + _lz4_block(plain)
        packed = [
            gzip.compress(plain), lzma.compress(plain) + size, bz2.compress(plain) + size,
            lzma.compress(plain, lzma.FORMAT_ALONE) + size, lz4 + size,
        ]
        return [bytes(with_ikconfig("CONFIG_X=y\n")), plain,
                *(bytes(bz_with(payload)) for payload in packed)]

    def run(self, data: bytes) -> None:
        """Inspect ``data``."""
        if not data or _needs_program(data):
            return
        path = self._file.put(data)
        try:
            inspect(path)
        except ConfigError as error:
            check_one_line(error)
        read_configuration(path, unpack=True)
        read_configuration(path, unpack=False)

    def close(self) -> None:
        """See ``Target.close``."""
        self._file.close()


def _needs_program(data: bytes) -> bool:
    """True if unpacking ``data`` starts a program: that is slow, and not ours to fuzz."""
    if len(data) < HEAD_BYTES or data[0x202:0x206] != b"HdrS":
        return False
    offset, _ = locate(data)
    kind = detect(data[offset : offset + MAGIC_BYTES])
    return kind in _BY_PROGRAM and shutil.which("zstd") is not None


def _lz4_block(data: bytes) -> bytes:
    """One block of literals behind its length."""
    length = len(data) - 15
    more = b"\xff" * (length // 255) + bytes([length % 255])
    block = b"\xf0" + more + data
    return len(block).to_bytes(4, "little") + block


def make() -> Target:
    """Return the target."""
    return InspectTarget()
