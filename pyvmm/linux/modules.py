"""Kernel modules in an unpacked package: their files, and the order in which they load."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pyvmm.linux.compression import decompress
from pyvmm.linux.work import PATIENT_CPU_S, Budget

MAX_MODULE_BYTES = 256 << 20
DIRECTORIES = ("usr/lib/modules", "lib/modules")
"""The places of a package's modules: newer distributions have no /lib of its own."""


def load_order(
    root: Path, wanted: Sequence[str], release: str = "*"
) -> Iterator[tuple[str, bytes]]:
    """Yield ``(name, contents)`` of the ``wanted`` modules under ``root``, dependencies first.

    They are those of the kernel ``release``, of any if it is not given.

    A module names its dependencies in its own ``depends=`` string, so depmod's tables (a minute of
    work on a whole package) are not needed.  A name without a file is built into the kernel.
    UnpackError if a module is damaged or too large, or all of them are too much work.
    """
    budget = Budget(cpu_s=PATIENT_CPU_S)
    files = {
        path.name.partition(".ko")[0].replace("-", "_"): path
        for folder in DIRECTORIES
        for path in root.glob(f"{folder}/{release}/kernel/**/*.ko*")
    }
    done: set[str] = set()
    contents: dict[str, bytes] = {}
    # A module comes to the top twice: before its dependencies, which are put on it, and after them.
    stack = [(name.replace("-", "_"), False) for name in reversed(wanted)]
    while stack:
        name, has_all = stack.pop()
        if has_all:
            done.add(name)
            yield name, contents.pop(name)
        elif name in files and name not in done and name not in contents:
            packed = files[name].read_bytes()
            contents[name] = decompress(packed, limit=MAX_MODULE_BYTES, budget=budget)
            stack.append((name, True))
            stack += [(needed, False) for needed in reversed(_needed(contents[name]))]


def _needed(module: bytes) -> list[str]:
    """Return the names in a module's ``depends=``."""
    depends = re.search(rb"\0depends=([^\0]*)\0", module)
    if depends is None:
        return []
    return depends[1].decode("ascii", "replace").replace("-", "_").split(",")
