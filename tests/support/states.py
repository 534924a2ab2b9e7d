"""Saved states (docs/architecture.md, "State"): are they plain, and who takes junk for one?"""

from __future__ import annotations

import copy
from typing import Protocol

from hypothesis import strategies as st


class Part(Protocol):
    """Any part of a machine that has a state."""

    def save(self) -> dict[str, object]: ...
    def restore(self, data: object) -> None: ...


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.binary(max_size=200)
    | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=10) | st.integers(0, 3), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
"""Data that a file might hold in place of a state."""


def is_plain(data: object) -> bool:
    """True if ``data`` is made of integers, booleans, texts, bytes, None, lists and dicts only.

    The type counts, not the class it inherits from: an enumeration's member is not plain.
    """
    if type(data) is dict:
        return all(type(key) is str and is_plain(value) for key, value in data.items())
    if type(data) is list:
        return all(map(is_plain, data))
    return data is None or type(data) in (int, bool, str, bytes)


@st.composite
def spoilt(draw: st.DrawFn, state: dict[str, object]) -> object:
    """``state`` with one field removed, added or replaced by junk; or junk alone."""
    changed: dict[str, object] = copy.deepcopy(state)
    kind = draw(st.sampled_from(["junk", "remove", "add", "replace"]))
    if kind == "junk" or (not changed and kind != "add"):
        return draw(JUNK)
    if kind == "add":
        changed[draw(st.text(max_size=10))] = draw(JUNK)
        return changed
    name = draw(st.sampled_from(sorted(changed)))
    if kind == "remove":
        del changed[name]
    else:
        changed[name] = draw(JUNK)
    return changed
