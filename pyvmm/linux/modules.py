"""Kernel modules in an unpacked package: which files, and in which order they load."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pyvmm.linux.compression import decompress

MAX_MODULE_BYTES = 256 << 20


def load_order(root: Path, wanted: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """``(name, contents)`` of the ``wanted`` modules under ``root``, dependencies first.

    A module names what it needs in its own ``depends=`` string, so depmod's tables (a minute of
    work on a whole package) are not needed.  A name without a file is built into the kernel.
    """
    files = {
        path.name.partition(".ko")[0].replace("-", "_"): path
        for path in root.glob("lib/modules/*/kernel/**/*.ko*")
    }
    done: set[str] = set()

    def visit(name: str) -> Iterator[tuple[str, bytes]]:
        name = name.replace("-", "_")
        if name in done or name not in files:
            return
        done.add(name)
        data = decompress(files[name].read_bytes(), limit=MAX_MODULE_BYTES)
        depends = re.search(rb"\0depends=([^\0]*)\0", data)
        for needed in depends[1].decode("ascii").split(",") if depends else ():
            yield from visit(needed)
        yield name, data

    for name in wanted:
        yield from visit(name)
