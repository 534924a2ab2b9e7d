"""The file ``state``: plain data there and back; anything else refused in one way."""

from __future__ import annotations

import struct
import time
import tracemalloc
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import SnapshotError
from pyvmm.snapshot.files import records
from pyvmm.snapshot.files.records import decode, encode
from tests.support.patience import patient

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 200), 1 << 200) | st.binary(max_size=40)
    | st.text(max_size=20) | st.sampled_from([0, -1, 1 << 63, (1 << 64) - 1, -(1 << 63), "\udc80"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner,
                                                                max_size=4),
    max_leaves=20,
)
STATES = st.dictionaries(st.sampled_from(["about", "machine", "x", "y"]), PLAIN)
EXAMPLE = {
    "about": {"id": bytes(16), "live": False, "none": None, "pyvmm": "0.1"},
    "machine": {"list": [1, -1, 1 << 64, [True, "text", b"bytes"]], "deep": {"a": {"b": {}}}},
    "base": None,
}


def types(value: object) -> object:
    """The types in ``value``, since True == 1."""
    if isinstance(value, list):
        return [types(item) for item in value]
    if isinstance(value, dict):
        return {key: types(item) for key, item in value.items()}
    return type(value)


@settings(deadline=None)
@given(STATES)
def test_plain_data_comes_back_with_its_types(state: dict[str, object]) -> None:
    found = decode(encode(state, name="f"), name="f")
    assert found == state
    assert types(found) == types(state)


@pytest.mark.parametrize("value", [1.5, (1,), bytearray(1), {1: 2}, {"a": {3}}, memoryview(b"")])
def test_what_is_no_plain_data_is_our_own_mistake(value: object) -> None:
    with pytest.raises(TypeError, match="record 'x'"):
        encode({"x": value}, name="f")


def test_every_flip_of_every_bit_is_detected() -> None:
    data = encode(EXAMPLE, name="f")
    for at in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            with pytest.raises(SnapshotError, match=r"^DIR/state: "):
                decode(bytes(damaged), name="DIR/state")


def test_every_cut_is_detected() -> None:
    data = encode(EXAMPLE, name="f")
    for length in range(len(data)):
        with pytest.raises(SnapshotError):
            decode(data[:length], name="f")
    with pytest.raises(SnapshotError, match="too long"):
        decode(data + b"\0", name="f")


def sealed(*payloads: bytes, name: bytes = b"x", version: int = 1, form: int = 1) -> bytes:
    """A file whose CRCs are right, with a record for each payload."""
    pieces = [
        struct.pack("<BBHI", len(name), 0, version, len(payload)) + name + payload
        for payload in payloads
    ]
    out = struct.pack("<8sHHI", records.MAGIC, form, len(pieces),
                      20 + sum(len(piece) + 4 for piece in pieces))
    crc = zlib.crc32(out)
    out += crc.to_bytes(4, "little")
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
        out += piece + crc.to_bytes(4, "little")
    return out


def u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def mapping(count: int) -> bytes:
    """A dict with ``count`` keys."""
    return b"d" + u32(count) + b"".join(u32(5) + b"%05d" % at + b"n" for at in range(count))


@pytest.mark.parametrize(("payload", "problem"), [
    (b"", "cut off"),
    (b"q", "no known type"),
    (b"nn", "1 bytes behind"),
    (b"i\0\0", "cut off"),
    (b"j\xff" + bytes(255), "integer of more than 32"),
    (b"s" + u32(1 << 31), "a length of"),
    (b"s" + u32(2) + b"\xff\xfe", "no UTF-8"),
    (b"b" + u32(5) + b"1234", "a length of 5"),
    (b"l" + u32(0xFFFFFFFF), "a length of"),
    (b"l" + u32(200_000) + b"n" * 200_000, "too many values"),
    (mapping(70_000), "too many"),
    (b"d" + u32(2) + (u32(1) + b"kn") * 2, "a key twice"),
    (b"d" + u32(1) + u32(9) + b"n", "a length of 9"),
    ((b"l" + u32(1)) * 25 + b"n", "more than 24 deep"),
    ((b"l" + u32(1)) * 100_000 + b"n", "more than 24 deep"),
    ((b"d" + u32(1) + u32(0)) * 100_000 + b"n", "more than 24 deep"),
])
def test_a_file_with_the_right_crcs_may_hold_anything(payload: bytes, problem: str) -> None:
    with pytest.raises(SnapshotError, match=f"^f: is damaged: record 'x' has .*{problem}"):
        decode(sealed(payload), name="f")


def test_the_budget_is_that_of_all_records() -> None:
    half = b"l" + u32(70_000) + b"n" * 70_000
    assert len(decode(sealed(half), name="f")["x"]) == 70_000  # type: ignore[arg-type]
    many = [b"l" + u32(30_000) + b"n" * 30_000] * 5
    data = b"".join(many)
    with pytest.raises(SnapshotError, match="too many values"):
        decode(sealed(b"l" + u32(5) + data), name="f")


def test_hostile_files_cost_little_memory_and_time() -> None:
    big = sealed(b"l" + u32(131_072) + b"n" * 131_072)
    nested = sealed(b"l" + u32(65_000) + (b"l" + u32(0)) * 65_000)
    octets = sealed(b"b" + u32(15 << 20) + bytes(15 << 20))
    for data in big, nested, sealed(mapping(65_000)), octets:
        tracemalloc.start()
        begin = time.process_time()
        decode(data, name="f")
        spent = time.process_time() - begin
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < (32 << 20) + len(data)
        assert spent < patient(5)


@pytest.mark.parametrize(("data", "problem"), [
    (sealed(b"n", form=2), "made by a later pyvmm: its format is 2, this pyvmm knows 1"),
    (sealed(b"n", form=0), "made by another pyvmm"),
    (sealed(b"n", version=2), "later pyvmm: record 'x' has version 2, this pyvmm knows 1"),
    (sealed(b"n", name=b"y"), "later pyvmm: record 'y' has version 1, this pyvmm knows no such"),
    (sealed(b"n", b"n"), "record 1 has a bad head"),
    (sealed(b"n", name=b""), "record 0 has a bad head"),
    (sealed(b"n", name=b"a b"), "record 0 has a bad head"),
    (sealed(b"n", name=b"\xff"), "record 0 has a bad head"),
    (sealed(b"n", name=b"x" * 33), "record 0 has a bad head"),
    (sealed(*[b"n"] * 65), "65 records, the limit is 64"),
    (b"", "is no state of a snapshot"),
    (b"#!/bin/sh\n", "is no state of a snapshot"),
])
def test_heads_and_versions(data: bytes, problem: str) -> None:
    with pytest.raises(SnapshotError, match=problem):
        decode(data, name="f", versions={"x": 1})


def test_records_of_two_files_cannot_be_mixed() -> None:
    one = encode({"a": 1, "b": 1}, name="f")
    two = encode({"a": 2, "b": 2}, name="f")
    half = (len(one) - 20) // 2
    with pytest.raises(SnapshotError, match="CRC of record 1 is wrong"):
        decode(one[: 20 + half] + two[20 + half :], name="f")


def test_versions_are_written() -> None:
    data = encode({"a": 1}, name="f", versions={"a": 3})
    assert decode(data, name="f", versions={"a": 3}) == {"a": 1}
    with pytest.raises(SnapshotError, match="version 3, this pyvmm knows 2"):
        decode(data, name="f", versions={"a": 2})


def test_too_much_is_refused_when_it_is_written() -> None:
    deep: object = None
    for _ in range(30):
        deep = [deep]
    for value, problem in (
        (deep, "24 deep"), ([0] * 140_000, "too many values"), (bytes(17 << 20), "bytes"),
        (1 << 400, "integer of more than 32"),
    ):
        with pytest.raises(SnapshotError, match=f"^f: record 'x' would have .*{problem}"):
            encode({"x": value}, name="f")
    with pytest.raises(SnapshotError, match=r"would have .* bytes"):
        encode({"x": bytes(9 << 20), "y": bytes(9 << 20)}, name="f")
    with pytest.raises(SnapshotError, match="65 records"):
        encode({f"r{at}": 1 for at in range(65)}, name="f")
