"""Datagrams between a machine and its attendant: what is sent arrives, and nothing else passes."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.attendant.beginning import Beginning
from pyvmm.attendant.messages import (
    MAX_BEGIN_BYTES,
    MAX_BYTES,
    MAX_VALUES,
    Ask,
    encode,
)
from pyvmm.attendant.reading import MAX_TEXT, SHAPES, check, decode

NAMES = st.binary(max_size=40).map(lambda raw: raw.decode("utf-8", "surrogateescape"))
VALUES = st.lists(st.integers(-(1 << 63), (1 << 63) - 1) | st.text(max_size=40) | NAMES, max_size=9)


def is_text(values: list[int | str]) -> bool:
    """True if all texts can be encoded: hypothesis makes lone surrogates of other kinds too."""
    try:
        encode(0, *values)
    except UnicodeEncodeError:
        return False
    return True


@given(st.integers(0, 255), VALUES.filter(is_text))
def test_what_is_sent_arrives(kind: int, values: list[int | str]) -> None:
    assert decode(encode(kind, *values)) == (kind, tuple(values))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_value_error(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        kind, values = decode(data)
        assert decode(encode(kind, *values)) == (kind, values)


@given(VALUES.filter(is_text), st.data())
def test_no_message_passes_that_was_cut_or_made_longer(
    values: list[int | str], data: st.DataObject
) -> None:
    whole = encode(7, *values)
    end = data.draw(st.integers(0, len(whole) - 1))
    for wrong in (whole[:end], whole + b"n"):
        with pytest.raises(ValueError, match=r"cut off|longer than its|behind|bytes, the limit"):
            decode(wrong)


def test_a_message_has_a_limit_of_bytes_and_of_values() -> None:
    with pytest.raises(ValueError, match=f"{MAX_BYTES + 1} bytes, the limit is {MAX_BYTES}"):
        decode(bytes(MAX_BYTES + 1))
    with pytest.raises(ValueError, match=f"256 values, the limit is {MAX_VALUES}"):
        encode(1, *[0] * 256)


@pytest.mark.parametrize(("values", "shape"), [
    ((1,), ()), ((), (int,)), (("a",), (int,)), ((1,), (str,)), (("a", 1), (str, str)),
    (("x" * (MAX_TEXT + 1),), (str,)),
])
def test_values_have_the_types_of_their_request(
    values: tuple[int | str, ...], shape: tuple[type, ...]
) -> None:
    with pytest.raises(ValueError, match=r"not those|a text of over"):
        check(values, shape)


def test_each_request_has_its_shape() -> None:
    assert set(SHAPES) == set(Ask)
    assert check(("ram",), SHAPES[Ask.CREATE]) == ("ram",)


def full_beginning() -> Beginning:
    """A beginning of which no field has its default."""
    return Beginning(
        version="1.2", bundle="restore", kernel="/boot/k\udcff", initrd="", cmdline="quiet",
        append="a b", agent="inject", discovery="acpi", cpus=3, disks=("one", "-"),
        kernel_version="6.1", is_linux=False, modules=("os", "pyvmm.errors"),
        snapshot_path="warm", any_snapshot=True, most_scratch_files=4, socket_name="control",
        socket_device=1 << 40, socket_inode=77, terminal="1 2 3", uid=5, gid=6, is_silent=True,
    )


def test_a_beginning_arrives_as_it_was_sent() -> None:
    full, least = full_beginning(), Beginning(version="1", bundle="run", kernel="k")
    for name in Beginning._fields:
        assert name in ("version", "bundle", "kernel") or (
            getattr(full, name) != getattr(least, name)
        ), name
    for one in (full, least):
        assert Beginning.read(one.message()) == one


def test_a_beginning_that_is_too_long_is_refused_before_it_is_sent() -> None:
    full = full_beginning().replace(append="x" * MAX_BEGIN_BYTES)
    with pytest.raises(ValueError, match=f"the limit is {MAX_BEGIN_BYTES}"):
        full.message()


@pytest.mark.parametrize("data", [b"", encode(1), encode(0x42, "0.1"), bytes(MAX_BEGIN_BYTES + 1)])
def test_nothing_else_is_a_beginning(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"beginning|limit"):
        Beginning.read(data)
