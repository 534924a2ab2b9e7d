"""Look through a kernel, while it is unpacked, for its version and its configuration.

The kernel is not kept for that: a file may claim to unpack to half a gigabyte.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from pyvmm.linux import config
from pyvmm.linux.compression import Compression, UnpackError, detect, pieces
from pyvmm.linux.payload import MAX_KERNEL_BYTES
from pyvmm.linux.work import Budget

IN_KERNEL = "in the kernel (IKCONFIG)"
"""The source of a configuration that is inside the kernel."""
MAX_PACKED_BYTES = 128 << 20
MAX_SLOW_BYTES = 32 << 20
"""The same limit for formats that unpack at some megabytes a second, at worst."""

_FAST = (Compression.GZIP, Compression.ZSTD)
_BANNER = re.compile(rb"Linux version ([\x20-\x7e]{1,256})")
_START, _END = b"IKCFG_ST", b"IKCFG_ED"  # kernel/configs.c, around CONFIG_IKCONFIG's data
_KEPT_BYTES = 512
"""Bytes kept of the last piece: more than a banner and a marker, which may lie across two
pieces."""
_SIZE_BYTES = 4
_STEP_BYTES = 4096
"""Looking through so many bytes is a step."""


class Scan:
    """A kernel's own words, once ``feed`` has had all of it or enough (``is_done``).

    ``budget`` pays for that and for unpacking the configuration inside.

    ``version`` is the text after "Linux version" in it, "" until it is found.  ``size_bytes``
    counts the bytes that were fed.  ``is_elf`` is True if it began as an ELF file does.
    """

    def __init__(self, budget: Budget | None = None) -> None:
        self.version = ""
        self._budget = budget or Budget()
        self.size_bytes = 0
        self._head = b""
        self._kept = b""
        self._config: bytearray | None = None
        self._has_whole_config = False
        self._looks_for_config = True

    def feed(self, piece: bytes) -> None:
        """Take the next bytes of the kernel; WorkError if the budget is spent."""
        self._budget.spend(1 + len(piece) // _STEP_BYTES)
        self.size_bytes += len(piece)
        if len(self._head) < _SIZE_BYTES:
            self._head += piece[:_SIZE_BYTES]
        window = self._kept + piece
        if not self.version and (found := _BANNER.search(window)) and found.end() < len(window):
            self.version = found[1].decode("ascii")
        if self._looks_for_config:
            self._look_for_config(window, piece)
        self._kept = window[-_KEPT_BYTES:]

    def _look_for_config(self, window: bytes, piece: bytes) -> None:
        if self._config is None:
            at = window.find(_START)
            if at < 0:
                return
            self._config = bytearray(window[at + len(_START) :])
            searched = 0
        else:
            searched = max(0, len(self._config) - len(_END))
            self._config += piece
        end = self._config.find(_END, searched)
        if end >= 0:
            del self._config[end:]
            self._has_whole_config = True
        if end >= 0 or len(self._config) > config.MAX_CONFIG_BYTES:
            self._looks_for_config = False

    @property
    def is_done(self) -> bool:
        """True if there is nothing more to find."""
        return bool(self.version) and not self._looks_for_config

    @property
    def is_elf(self) -> bool:
        """True if the first bytes are those of an ELF file."""
        return self._head[:_SIZE_BYTES] == b"\x7fELF"

    @property
    def config(self) -> config.KernelConfig | None:
        """The configuration inside (CONFIG_IKCONFIG=y); None without."""
        if self._config is None or not self._has_whole_config:
            return None
        return config.unpack(bytes(self._config), IN_KERNEL, self._budget)


def scan(parts: Iterable[bytes], *, whole: bool = True, budget: Budget | None = None) -> Scan:
    """Look through a kernel in ``parts``; without ``whole``, stop once all is found.

    WorkError if it takes more than ``budget``.
    """
    found = Scan(budget)
    for part in parts:
        found.feed(part)
        if found.is_done and not whole:
            break
    found.feed(b"\0")  # ends a banner at the very end of the kernel
    found.size_bytes -= 1
    return found


def check_packed(kind: Compression, length: int) -> None:
    """Raise UnpackError if ``unpack_and_scan`` cannot take a payload of ``length`` such bytes."""
    if kind is Compression.NONE or length < _SIZE_BYTES:
        raise UnpackError("its payload is compressed by no method known here")
    limit = MAX_PACKED_BYTES if kind in _FAST else MAX_SLOW_BYTES
    if length > limit:
        raise UnpackError(f"its payload is {length} bytes of {kind.value}; "
                          f"up to {limit} are looked into")


def unpack_and_scan(
    payload: bytes, *, whole: bool = True, budget: Budget | None = None
) -> Scan:
    """Look through the kernel that is packed in ``payload``, of a bzImage (``payload.locate``).

    UnpackError if there is none, or, with ``whole``, if it is cut off.  HostError if this host has
    no program that could unpack it, WorkError if looking through it takes more than ``budget``.
    """
    budget = budget or Budget()
    check_packed(detect(payload), len(payload))
    size_bytes = int.from_bytes(payload[-_SIZE_BYTES:], "little")
    if size_bytes > MAX_KERNEL_BYTES:
        raise UnpackError(f"its payload unpacks to {size_bytes} bytes; "
                          f"the limit is {MAX_KERNEL_BYTES}")
    parts = _elf_only(pieces(payload, limit=size_bytes, budget=budget))
    found = scan(parts, whole=whole, budget=budget)
    if not found.is_elf:
        raise UnpackError("its payload holds no ELF image")
    if found.size_bytes != size_bytes and not (found.is_done and not whole):
        raise UnpackError(f"its payload is cut off: {found.size_bytes} bytes "
                          f"instead of {size_bytes}")
    return found


def _elf_only(parts: Iterator[bytes]) -> Iterator[bytes]:
    """Yield ``parts``; if they are no ELF file, only as many as show it."""
    head = b""
    for part in parts:
        yield part
        if len(head) < _SIZE_BYTES:
            head += part[:_SIZE_BYTES]
            if len(head) >= _SIZE_BYTES and not head.startswith(b"\x7fELF"):
                return
