"""A kernel's configuration: from a file, or from the kernel if it was built with IKCONFIG.

The input is not trusted: sizes are bounded, and lines without a setting are skipped.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from pyvmm.linux.compression import Compression, UnpackError, decompress, detect, pieces
from pyvmm.linux.options import KernelConfig
from pyvmm.linux.work import Budget
from pyvmm.startup.types import configuration_paths

__all__ = ["MAX_CONFIG_BYTES", "KernelConfig", "beside", "parse", "read", "unpack"]

MAX_CONFIG_BYTES = 8 << 20
"""A distribution's is 300 KiB."""

_SETTING = re.compile(r"^CONFIG_(\w+)=(.*)$", re.MULTILINE)
_ANY_SETTING = re.compile(r"^(?:# )?CONFIG_\w+(?:=| is not set)", re.MULTILINE)


def parse(text: str, source: str) -> KernelConfig | None:
    """Return the configuration in ``text``, None if it has no setting."""
    if _ANY_SETTING.search(text) is None:
        return None
    return KernelConfig(dict(_SETTING.findall(text)), source)


def read(path: Path, budget: Budget | None = None) -> KernelConfig | None:
    """Return the configuration in ``path``, plain or compressed; None if there is none in it.

    OSError if it cannot be read, UnpackError if it is too large, too much work or damaged.
    """
    with path.open("rb") as file:
        data = file.read(MAX_CONFIG_BYTES + 1)  # a device has no end
    if len(data) > MAX_CONFIG_BYTES:
        raise UnpackError(f"is larger than the limit of {MAX_CONFIG_BYTES} bytes")
    data = decompress(data, limit=MAX_CONFIG_BYTES, budget=budget)
    return parse(data.decode("utf-8", "replace"), os.fspath(path))


def unpack(packed: bytes, source: str, budget: Budget | None = None) -> KernelConfig | None:
    """Return the gzipped configuration inside a kernel (CONFIG_IKCONFIG=y).

    None if it is damaged, too much work, or none.  Bytes beyond MAX_CONFIG_BYTES are left out.
    """
    if detect(packed) is not Compression.GZIP:
        return None
    data = b""
    try:
        for piece in pieces(packed, limit=2 * MAX_CONFIG_BYTES, budget=budget):
            data += piece
            if len(data) >= MAX_CONFIG_BYTES:
                break
    except UnpackError:
        return None
    return parse(data[:MAX_CONFIG_BYTES].decode("utf-8", "replace"), source)


def beside(kernel: Path, version: str, budget: Budget | None = None) -> KernelConfig | None:
    """Return the configuration beside the file ``kernel``; None if there is none.

    ``startup.types.configuration_paths`` lists the places; ``version`` is the kernel's own text, ""
    if unknown.
    """
    for path in map(Path, configuration_paths(kernel, version)):
        try:
            if path.is_file() and (found := read(path, budget)) is not None:
                return found
        except (OSError, ValueError, UnpackError):
            continue
    return None
