"""The parts of the soak, a module each, in the order in which they run."""

from __future__ import annotations

import importlib

from soak.part import Part

NAMES = (
    "cuts", "bare_kills", "faults", "starts", "machines", "bare_crowd", "rings",
    "kills", "fio", "crowd", "smp", "snapshots", "clones",
)


def load(name: str) -> Part:
    """Return the part ``name``: one of NAMES, or a module with a dot in its name, for tests."""
    part = importlib.import_module(name if "." in name else f"soak.parts.{name}").PART
    assert isinstance(part, Part)
    return part
