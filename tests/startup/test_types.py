"""Record: frozen, slotted, keyword-only, as DESIGN wants configuration to be."""

from __future__ import annotations

import inspect
import pydoc
from typing import Any, ClassVar

import pytest

from pyvmm.kvm.exits import ExitReason
from pyvmm.run.outcome import Kind
from pyvmm.startup.types import Record
from pyvmm.virtio.spec import DeviceType, Feature, Register


class Point(Record):
    x: int
    y: int = 0
    unit: ClassVar[str] = "m"

    def __post_init__(self) -> None:
        if self.x < 0:
            raise ValueError("x")


class Pair(Record, kw_only=False):
    first: int
    second: int = 2


def test_fields_come_by_keyword_and_have_defaults() -> None:
    assert (Point(x=1).x, Point(x=1).y, Point(x=1, y=3).y, Point.unit) == (1, 0, 3, "m")
    with pytest.raises(TypeError, match=r"without a name: write x=\.\.\."):
        Point(1)  # type: ignore[call-arg]
    assert Pair(1) == Pair(1, 2) == Pair(first=1, second=2)


def test_help_shows_the_fields() -> None:
    assert str(inspect.signature(Point)) == "(*, x: 'int', y: 'int' = 0)"
    assert str(inspect.signature(Pair)) == "(first: 'int', second: 'int' = 2)"
    assert "(*, x: 'int', y: 'int' = 0)" in pydoc.render_doc(Point)
    assert not hasattr(Point(x=1), "__signature__")


@pytest.mark.parametrize(("fields", "said"), [
    ({}, "Point: missing: x"),
    ({"y": 1}, "Point: missing: x"),
    ({"x": 1, "z": 1}, "Point: unknown: z; there are x, y"),
    ({"z": 1}, "Point: unknown: z; there are x, y"),
])
def test_missing_and_unknown_fields_are_refused(fields: dict[str, int], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        Point(**fields)


@pytest.mark.parametrize(("by_position", "by_name"), [((1, 2, 3), {}), ((1,), {"first": 1})])
def test_too_many_fields_are_refused(
    by_position: tuple[int, ...], by_name: dict[str, int]
) -> None:
    with pytest.raises(TypeError):
        Pair(*by_position, **by_name)


def test_a_record_does_not_change() -> None:
    point = Point(x=1)
    with pytest.raises(AttributeError):
        point.x = 2  # type: ignore[misc]
    with pytest.raises(AttributeError):
        del point.x
    with pytest.raises(AttributeError):
        point.z = 2
    assert not hasattr(point, "__dict__")


def test_equality_and_hash_are_those_of_the_fields() -> None:
    assert Point(x=1) == Point(x=1, y=0)
    assert hash(Point(x=1)) == hash(Point(x=1, y=0))
    assert Point(x=1) != Point(x=2)
    assert Point(x=1, y=2) != Pair(1, 2)
    assert repr(Point(x=1)) == "Point(x=1, y=0)"


def test_replace_checks_as_construction_does() -> None:
    assert Point(x=1).replace(y=5) == Point(x=1, y=5)
    with pytest.raises(ValueError, match="x"):
        Point(x=1).replace(x=-1)
    with pytest.raises(TypeError):
        Point(x=1).replace(z=1)


@pytest.mark.parametrize("kind", [Kind, ExitReason, Register, DeviceType])
def test_fault_41_a_member_made_from_its_value_is_the_member(kind: Any) -> None:
    """By ``is``, with which the code compares, also for texts and numbers made anew."""
    for member in kind:
        value = eval(repr(member))  # equal, and another object wherever Python makes one
        if isinstance(value, str):
            value = "".join(list(value))
        assert kind(value) is member
    with pytest.raises(ValueError, match="is not a valid"):
        kind("none of them")


def test_fault_41_bits_that_are_no_member_are_themselves() -> None:
    assert Feature(int(Feature.RING_PACKED)) is Feature.RING_PACKED
    assert Feature(3 << 62) == 3 << 62
