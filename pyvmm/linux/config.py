"""A kernel's configuration: from a file, or from the kernel if it was built with IKCONFIG.

What is read is not trusted: sizes are bounded, and lines that say nothing are skipped.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from pyvmm.linux.compression import UnpackError, decompress
from pyvmm.linux.options import KernelConfig

__all__ = ["MAX_CONFIG_BYTES", "KernelConfig", "beside", "parse", "read", "unpack"]

MAX_CONFIG_BYTES = 8 << 20
"""A distribution's is 300 KiB."""

_SETTING = re.compile(r"^CONFIG_(\w+)=(.*)$", re.MULTILINE)
_ANY_SETTING = re.compile(r"^(?:# )?CONFIG_\w+(?:=| is not set)", re.MULTILINE)


def parse(text: str, source: str) -> KernelConfig | None:
    """The configuration ``text``, None if it is none at all."""
    if _ANY_SETTING.search(text) is None:
        return None
    return KernelConfig(dict(_SETTING.findall(text)), source)


def read(path: Path) -> KernelConfig | None:
    """The configuration in ``path``, plain or compressed; None if there is none in it.

    OSError if it cannot be read, UnpackError if it is too large or damaged.
    """
    with path.open("rb") as file:
        data = file.read(MAX_CONFIG_BYTES + 1)  # a device has no end
    if len(data) > MAX_CONFIG_BYTES:
        raise UnpackError(f"is larger than the limit of {MAX_CONFIG_BYTES} bytes")
    data = decompress(data, limit=MAX_CONFIG_BYTES)
    return parse(data.decode("utf-8", "replace"), os.fspath(path))


def unpack(packed: bytes | bytearray, source: str) -> KernelConfig | None:
    """The configuration as a kernel has it inside (CONFIG_IKCONFIG=y), gzip-compressed; None if it
    is damaged, or none.  What is over MAX_CONFIG_BYTES is left out."""
    try:
        data = zlib.decompressobj(wbits=31).decompress(packed, MAX_CONFIG_BYTES)
    except zlib.error:
        return None
    return parse(data.decode("utf-8", "replace"), source)


def beside(kernel: Path, version: str) -> KernelConfig | None:
    """The configuration that lies where one would look for it; None if none does.

    That is ``config-VERSION`` in the kernel's directory, as distributions have it, with VERSION
    from the kernel's name or from the kernel itself; and ``.config`` of the source tree in which
    the kernel was built.  ``version`` is the kernel's own text, "" if unknown.
    """
    for path in _places(kernel, version):
        try:
            if path.is_file() and (found := read(path)) is not None:
                return found
        except (OSError, ValueError, UnpackError):
            continue
    return None


def _places(kernel: Path, version: str) -> Iterator[Path]:
    release = version.split(" ", 1)[0]
    for path in dict.fromkeys((kernel.absolute(), Path(os.path.realpath(kernel)))):
        _, dash, suffix = path.name.partition("-")
        if dash:
            yield path.parent / f"config-{suffix}"
        if release and "/" not in release:
            yield path.parent / f"config-{release}"
        if path.name == "vmlinux":
            yield path.parent / ".config"
        if path.parts[-4:-1] in (("arch", "x86", "boot"), ("arch", "x86_64", "boot")):
            yield path.parents[3] / ".config"
