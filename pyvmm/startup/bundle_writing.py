"""The writing of a bundle (``startup/bundle.py``), which few starts need."""

from __future__ import annotations

import marshal
import os
import sys

from pyvmm.startup.bundle import (
    HEAD,
    OURS,
    STANDARD,
    Bundle,
    read_entries,
    source_of,
    unlink,
)
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pyvmm.startup.bundle import Entry


def update(bundle: Bundle, names: Iterable[str]) -> None:
    """Write the file of ``bundle`` anew, with the modules ``names`` too.

    Do nothing if that is not worth it, or not allowed.

    The write is atomic, and errors are ignored: a missing bundle only costs time.
    """
    added = set(names)
    if not bundle.is_worth_writing(added):
        return
    entries = read_entries(bundle.path)  # anew: the mapping of the first time may be gone
    for name in added:
        if entry := _entry(name):
            entries[name] = entry
    data = _encode(entries)
    temporary = f"{bundle.path}.{os.urandom(8).hex()}"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = os.open(temporary, flags, 0o644)  # no umask lets other users write it
        try:
            written = os.write(fd, data)
        finally:
            os.close(fd)
        if written == len(data):
            os.replace(temporary, bundle.path)
        else:
            unlink(temporary)
    except OSError:
        unlink(temporary)


def _encode(entries: dict[str, Entry]) -> bytes:
    index = []
    for name, (file, is_package, mtime_ns, size, needs, code) in entries.items():
        index.append((name, file, is_package, mtime_ns, size, needs, len(code)))
    head = marshal.dumps((OURS, STANDARD, index))
    codes = b"".join(entry[-1] for entry in entries.values())
    return HEAD.pack(len(head)) + head + codes


def _entry(name: str) -> Entry | None:
    """Return the entry of loaded module ``name``; None if its code is not available."""
    spec = sys.modules[name].__spec__
    file = source_of(name)
    try:
        before = os.stat(file)
        code = spec.loader.get_code(name)  # type: ignore[union-attr]
        needs = tuple(_needs(file)) if name.startswith("pyvmm.") else ()
    except Exception:  # a source that is being edited may be anything; the run has ended well
        return None
    is_package = spec is not None and spec.submodule_search_locations is not None
    return file, is_package, before.st_mtime_ns, before.st_size, needs, marshal.dumps(code)


def _needs(file: str) -> Iterator[str]:
    """Yield our loaded modules that the ``import`` statements at the left edge of ``file`` name.

    Statements in functions, and under ``if TYPE_CHECKING:`` or ``try:``, do not count.
    """
    with open(file, encoding="utf-8") as source:  # noqa: PTH123 - pathlib takes 8 ms
        lines = source.read().split("\n")
    for line in lines:
        words = line.replace(",", " ").split()
        if line.startswith(("from pyvmm.", "from pyvmm ")) and words[2:3] == ["import"]:
            submodules = [f"{words[1]}.{word}" for word in words[3:]]
            yield from (name for name in (words[1], *submodules) if name in sys.modules)
