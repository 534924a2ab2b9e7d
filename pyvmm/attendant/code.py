"""The compiled code of modules, for a jailed machine that imports one while its guest runs."""

from __future__ import annotations

import importlib
import marshal
import re
import sys
from importlib.machinery import PathFinder, SourceFileLoader

_NAME = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*", re.ASCII)
MAX_NAME = 80


def module_code(name: str) -> tuple[str, bool, bytes]:
    """Return the file of module ``name``, True if it is a package, and its marshalled code.

    ImportError for any but a source file of pyvmm or of the standard library.
    """
    if len(name) > MAX_NAME or not _NAME.fullmatch(name):
        raise ImportError(f"{name[:MAX_NAME]!a} is no module's name")
    top = name.partition(".")[0]
    if top != "pyvmm" and top not in sys.stdlib_module_names:
        raise ImportError(f"{name} is neither pyvmm's nor Python's")
    parent = name.rpartition(".")[0]
    path = getattr(importlib.import_module(parent), "__path__", ()) if parent else None
    spec = PathFinder.find_spec(name, path)
    if spec is None or not isinstance(spec.loader, SourceFileLoader) or spec.origin is None:
        raise ImportError(f"{name} is no source file")
    code = spec.loader.get_code(name)
    return spec.origin, spec.submodule_search_locations is not None, marshal.dumps(code)
