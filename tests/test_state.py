"""Fields: types and limits of saved fields; every fault is a StateError that names them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pyvmm.errors import StateError
from pyvmm.state import Fields


@pytest.mark.parametrize(
    ("value", "read", "problem"),
    [
        (True, lambda f: f.integer("x", 0, 1), "x is not an integer of 0 to 1"),
        (2, lambda f: f.integer("x", 0, 1), "x is not an integer of 0 to 1"),
        (-1, lambda f: f.integer("x", 0, 1), "x is not an integer of 0 to 1"),
        ("1", lambda f: f.optional_integer("x", 0, 1), "x is not an integer of 0 to 1"),
        (1, lambda f: f.boolean("x"), "x is not a boolean"),
        (bytearray(2), lambda f: f.octets("x", 2, 2), "x is not 2 bytes"),
        (b"abc", lambda f: f.octets("x", 0, 2), "x is not 0 to 2 bytes"),
        (b"abc", lambda f: f.optional_octets("x", 2), "x is not 2 bytes"),
        ("abc", lambda f: f.optional_text("x", 2), "x is not None or a text of at most 2"),
        (b"ab", lambda f: f.optional_text("x", 2), "x is not None or a text of at most 2"),
        ((), lambda f: f.pairs("x", 1, (1, 1)), "x is not a list of at most 1 pairs"),
        ([[0, 0]] * 2, lambda f: f.pairs("x", 1, (1, 1)), "x is not a list of at most 1 pairs"),
        ([[0]], lambda f: f.pairs("x", 1, (1, 1)), "is not a list of two integers"),
        ([[0, 256]], lambda f: f.pairs("x", 1, (1, 255)), "an element that is not 0 to 0xff"),
        ([[0, True]], lambda f: f.pairs("x", 1, (1, 255)), "an element that is not 0 to 0xff"),
        (0, lambda f: f.integer("y", 0, 1), "y is missing"),
        (0, lambda f: f.optional_integer("y", 0, 1), "y is missing"),
        (0, lambda f: f.optional_octets("y", 1), "y is missing"),
        (0, lambda f: f.end(), "has no field 'x'"),
    ],
)
def test_a_bad_field_is_named_with_its_limit(
    value: object, read: Callable[[Fields], object], problem: str
) -> None:
    with pytest.raises(StateError) as caught:
        read(Fields("chip", {"x": value}))
    assert str(caught.value).startswith("chip: ")
    assert problem in str(caught.value)


@pytest.mark.parametrize("data", [None, [], "x", {1: 2}, {b"x": 2}])
def test_a_state_that_is_no_dict_of_texts_is_refused(data: object) -> None:
    with pytest.raises(StateError, match="chip: the state is no dict with text keys"):
        Fields("chip", data)


def test_good_fields_are_given_as_they_are() -> None:
    data = {
        "a": 1, "b": None, "c": b"\0", "d": None, "e": True, "f": [[1, 2]], "g": "ab", "h": None
    }
    fields = Fields("chip", data)
    assert fields.integer("a", 0, 1) == 1
    assert fields.optional_integer("b", 0, 1) is None
    assert fields.octets("c", 1, 1) == b"\0"
    assert fields.optional_octets("d", 1) is None
    assert fields.boolean("e") is True
    assert fields.pairs("f", 1, (1, 2)) == [(1, 2)]
    assert fields.optional_text("g", 2) == "ab"
    assert fields.optional_text("h", 2) is None
    fields.end()
    assert len(data) == 8, "the caller's dict is left alone"


def test_the_name_of_an_unknown_field_is_not_repeated_at_length() -> None:
    with pytest.raises(StateError) as caught:
        Fields("chip", {"x" * 10_000: 1}).end()
    assert len(str(caught.value)) < 100
