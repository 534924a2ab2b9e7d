"""States with states within: every value in one, and ways to spoil it."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from hypothesis import strategies as st

from tests.support.states import is_plain

PathOfKeys = tuple[str | int, ...]

junk = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.text(max_size=8)
    | st.binary(max_size=8) | st.floats() | st.sampled_from([0, 1, 0xFFFF, 1 << 16, 1 << 32]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["status", "device", "queues", "ring", "used", "x"]) | st.integers(0, 3),
        inner, max_size=3,
    ),
    max_leaves=6,
)  # fmt: skip
"""What may be anywhere in a file that is no state."""


def assert_plain(data: object) -> None:
    """AssertionError unless ``data`` is what the contract of ``save`` allows."""
    assert is_plain(data)
    assert ast.literal_eval(repr(data)) == data


def walk(data: object, path: PathOfKeys = ()) -> Iterator[tuple[PathOfKeys, object]]:
    """Every value within ``data``, and the keys that lead to it."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(
        data, list
    ) else ()
    for key, value in items:
        yield (*path, key), value
        yield from walk(value, (*path, key))


def replaced(data: object, path: PathOfKeys, value: object) -> object:
    """A copy of ``data`` in which ``value`` is at ``path``."""
    if not path:
        return value
    first, *rest = path
    if isinstance(data, dict):
        return {**data, first: replaced(data.get(first), tuple(rest), value)}
    assert isinstance(data, list)
    assert isinstance(first, int)
    return [replaced(one, tuple(rest), value) if i == first else one for i, one in enumerate(data)]


def without(data: object, path: PathOfKeys) -> object:
    """A copy of ``data`` that lacks what is at ``path``."""
    *front, last = path
    holder = data
    for key in front:
        holder = holder[key]  # type: ignore[index]
    if isinstance(holder, dict):
        smaller: object = {key: value for key, value in holder.items() if key != last}
    else:
        assert isinstance(holder, list)
        smaller = [value for i, value in enumerate(holder) if i != last]
    return replaced(data, tuple(front), smaller)
