"""The kernels of a session, and how the tests of each are named."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

PLAIN_NAMES = ("bzImage", "vmlinux", "vmlinuz", "Image")
"""Names that every kernel has when it was just built: the release tells more."""
MAX_RELEASE = 64


def ids_of(kernels: Sequence[str]) -> list[str]:
    """Return a short name without slashes for each path, no two of them equal.

    It is the file's name, with the release where the name has none.  Files of one name get as many
    of their directories as it takes.
    """
    names = [_name(Path(kernel)) for kernel in kernels]
    found = []
    for kernel, name in zip(kernels, names, strict=True):
        rivals = [
            Path(other)
            for other, same in zip(kernels, names, strict=True)
            if same == name and other != kernel
        ]
        found.append("-".join([*_difference(Path(kernel), rivals), name]))
    return [
        name if found.count(name) == 1 else f"{name}-{index}" for index, name in enumerate(found)
    ]


def kernel_and_initrd(path: str) -> tuple[str, str | None]:
    """Return the kernel file that ``path`` names, and the initramfs that goes with it, if any.

    ``path`` may be a directory, as for ``pyvmm run --kernel``; ConfigError if it has no kernel.
    """
    from pyvmm.linux.kernel_directory import kernel_in

    return kernel_in(path) if Path(path).is_dir() else (path, None)


def _difference(path: Path, rivals: Sequence[Path]) -> list[str]:
    """Return the last directories of ``path``, as many as no rival has."""
    own = path.parent.parts
    for count in range(len(own) + 1):
        tail = own[len(own) - count :]
        if all(rival.parent.parts[-count or len(rival.parts) :] != tail for rival in rivals):
            return [_clean(part) for part in tail if part != "/"]
    return []


def _name(path: Path) -> str:
    name = path.name or "kernel"
    release = _release(path) if name in PLAIN_NAMES else ""
    return _clean(f"{name}-{release}" if release else name)


def _clean(text: str) -> str:
    return re.sub(r"[^\w.+=~-]", "_", text, flags=re.ASCII)


def _release(path: Path) -> str:
    """Return the release that a kernel file tells in its header, as ``6.1.176``; "" if none."""
    from pyvmm.errors import PyvmmError
    from pyvmm.x86 import layout
    from pyvmm.x86.image import ImageFile
    from pyvmm.x86.loader import parse_kernel

    with contextlib.suppress(PyvmmError, OSError), ImageFile(path) as image:
        words = parse_kernel(image, layout.MMIO_GAP_START).version.split()
        return words[0][:MAX_RELEASE] if words else ""
    return ""
