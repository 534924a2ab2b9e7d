"""Imports of a jailed process, which can open no file: the code of what it may need is in memory.

A machine that others control can be saved and rewound.  The modules for that take 20 ms to import,
which only those few starts should pay that need them.  So the bundle of such a start has them too
(``startup/bundle.py``), and their code is read, not run, before the jail closes.
"""

from __future__ import annotations

import sys

from pyvmm.startup.bundle import Bundle
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pyvmm.startup.bundle import Entry


class LateModules(Bundle):
    """A finder, from now on, of modules of ``bundle``, which is left: ``names`` and their needs.

    It opens nothing.  Afterwards ``names``, and all that they import, can be imported.  If the
    bundle lacks one of them, or a source was changed, they are imported now; the end of the run
    then adds them to the bundle.  C extensions are not in a bundle: import them before.
    """

    def __init__(self, bundle: Bundle, names: Iterable[str]) -> None:
        missing = [name for name in names if name not in sys.modules]
        waiting = _needed(bundle.entries, missing)
        if not (
            all(name in waiting for name in missing)
            and all(map(bundle.is_current, waiting.values()))
        ):
            for name in missing:
                __import__(name)
        self.path = bundle.path
        self.missed = bundle.missed
        self.entries = {
            name: (*entry[:-1], bytes(entry[-1])) for name, entry in waiting.items()
            if name not in sys.modules and bundle.is_current(entry)
        }
        bundle.__exit__()
        sys.meta_path.insert(0, self)

    def is_current(self, _entry: Entry) -> bool:
        """True: all sources were looked at."""
        return True


def _needed(entries: Mapping[str, Entry], names: Iterable[str]) -> dict[str, Entry]:
    """Return the ``entries`` that are not loaded: of ``names``, of all that they need, and of the
    standard library, whose needs no entry tells."""
    found: dict[str, Entry] = {}
    waiting = [*names, *(name for name in entries if not name.startswith("pyvmm."))]
    while waiting:
        name = waiting.pop()
        if name in entries and name not in sys.modules and name not in found:
            found[name] = entry = entries[name]
            waiting += (*entry[4], name.rpartition(".")[0])
    return found
