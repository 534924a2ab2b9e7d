"""The AML emitter against the encodings in ACPI 6.5, chapter 20, and against iasl's output."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.x86.acpi import aml, resources
from tests.support.iasl import HEADER_BYTES, compile_source, disassemble

LONGEST_PACKAGE = (1 << 28) - 1
LONG_BUFFER = bytes(index % 251 for index in range(4200))

SOURCE = """
DefinitionBlock ("", "SSDT", 2, "PYVMM ", "EMITTER ", 1)
{
    Name (\\INTS, Package () {
        Zero, One, 2, 0xFF, 0x100, 0xFFFF, 0x10000, 0xFFFFFFFF, 0x100000000, Ones })
    Name (TEXT, "LNRO0005")
    Name (RAW, Buffer () { 1, 2, 3 })
    Name (LONG, Buffer () { %s })
    Device (\\DEV0)
    {
        Name (_HID, EisaId ("PNP0501"))
        Device (SUB) { Name (_HID, EisaId ("ABC12EF")) Name (^UPUP, Zero) }
        Name (_CRS, ResourceTemplate () {
            IO (Decode16, 0x3F8, 0x3F8, 1, 8)
            Memory32Fixed (ReadWrite, 0xD0001000, 0x1000)
            Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) { 5 }
            Interrupt (ResourceConsumer, Level, ActiveLow, Shared) { 23 }
        })
    }
    Scope (\\DEV0.SUB)
    {
        Method (_STA, 0, NotSerialized) { Return (0x0F) }
        Method (SER, 2, Serialized) { Name (LOCA, Zero) Return (Zero) }
        Method (LVL, 7, Serialized, 3) { Return (\\TEXT) }
        Method (EVT, 1, Serialized) { If (Arg0 == 15) { Notify (\\DEV0.SUB, 0x80) } }
    }
    Name (\\DEV0.SUB.DEEP, Zero)
}
"""


def everything() -> bytes:
    """The terms of SOURCE, by the emitter."""
    return b"".join((
        aml.name("\\INTS", aml.package(*map(aml.integer, (
            0, 1, 2, 0xFF, 0x100, 0xFFFF, 0x1_0000, 0xFFFF_FFFF, 1 << 32, (1 << 64) - 1,
        )))),
        aml.name("TEXT", aml.string("LNRO0005")),
        aml.name("RAW", aml.buffer(bytes([1, 2, 3]))),
        aml.name("LONG", aml.buffer(LONG_BUFFER)),
        aml.device(
            "\\DEV0",
            aml.name("_HID", aml.eisa_id("PNP0501")),
            aml.device(
                "SUB",
                aml.name("_HID", aml.eisa_id("ABC12EF")),
                aml.name("^UPUP", aml.integer(0)),
            ),
            aml.name("_CRS", resources.template(
                resources.io_ports(0x3F8, 8),
                resources.memory32_fixed(0xD000_1000, 0x1000),
                resources.interrupt(5),
                resources.interrupt(23, edge=False, active_low=True, shared=True),
            )),
        ),
        aml.scope(
            "\\DEV0.SUB",
            aml.method("_STA", aml.return_(aml.integer(0x0F)), sync_level=None),
            aml.method(
                "SER", aml.name("LOCA", aml.integer(0)), aml.return_(aml.integer(0)), arguments=2
            ),
            aml.method("LVL", aml.return_(aml.path("\\TEXT")), arguments=7, sync_level=3),
            aml.method(
                "EVT",
                aml.if_equal(
                    aml.FIRST_ARGUMENT, aml.integer(15), aml.notify("\\DEV0.SUB", 0x80)
                ),
                arguments=1,
            ),
        ),
        aml.name("\\DEV0.SUB.DEEP", aml.integer(0)),
    ))


def test_every_term_is_what_iasl_compiles(tmp_path: Path) -> None:
    numbers = ", ".join(map(str, LONG_BUFFER))
    compiled = compile_source(SOURCE % numbers, tmp_path, remarks=False)
    assert everything() == compiled[HEADER_BYTES:]


def test_longest_length_encoding_is_understood_by_iasl(tmp_path: Path) -> None:
    """Four bytes of PkgLength, from 1 MiB on, are more than is sensible to write as source."""
    block = aml.name("HUGE", aml.buffer(bytes(1 << 20))) + aml.name("LAST", aml.integer(7))
    table = bytearray(struct.pack(
        "<4sIBB6s8sI4sI", b"SSDT", HEADER_BYTES + len(block), 2, 0, b"PYVMM ", b"EMITTER ", 1,
        b"PYVM", 1,
    )) + block
    table[9] = -sum(table) & 0xFF
    source = disassemble(bytes(table), tmp_path)
    assert "Name (HUGE, Buffer (0x00100000)" in source
    assert "Name (LAST, 0x07)" in source


@pytest.mark.parametrize(
    ("content_bytes", "encoded"),
    [
        (0, "01"),
        (62, "3f"),
        (63, "41 04"),
        (0xFFF - 2, "4f ff"),
        (0xFFF - 1, "81 00 01"),
        (0xFFFFF - 3, "8f ff ff"),
        (0xFFFFF - 2, "c1 00 00 01"),
        (LONGEST_PACKAGE - 4, "cf ff ff ff"),
    ],
)
def test_package_length_at_its_limits(content_bytes: int, encoded: str) -> None:
    assert aml.package_length(content_bytes) == bytes.fromhex(encoded)


@given(st.integers(0, LONGEST_PACKAGE - 4))
def test_package_length_counts_itself_and_is_short(content_bytes: int) -> None:
    """20.2.4: as ACPICA reads it, the top two bits say how many bytes follow."""
    encoded = aml.package_length(content_bytes)
    following = encoded[0] >> 6
    assert len(encoded) == 1 + following
    if following:
        assert encoded[0] & 0x30 == 0
        length = int.from_bytes(encoded[1:], "little") << 4 | encoded[0] & 0xF
        assert length >= (1 << 6 if following == 1 else 1 << (4 + 8 * (following - 1)))
    else:
        length = encoded[0]
    assert length == content_bytes + len(encoded)


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("\\", b"\\\0"),
        ("^", b"^\0"),
        ("A", b"A___"),
        ("_SB", b"_SB_"),
        ("\\_SB", b"\\_SB_"),
        ("^^COM1", b"^^COM1"),
        ("\\_SB.V00F", b"\\\x2e_SB_V00F"),
        ("^A.B.C", b"^\x2f\x03A___B___C___"),
        (".".join(["SEG0"] * 255), b"\x2f\xff" + b"SEG0" * 255),
    ],
)
def test_paths(text: str, encoded: bytes) -> None:
    assert aml.path(text) == encoded


@pytest.mark.parametrize(
    "text",
    ["", "lower", "LONGER", "0DIG", "A.", ".A", "A..B", "\\\\A", "\\^A", "^\\A", "A B", "ABC\n",
     "\u00c4", ".".join(["SEG0"] * 256)],
)
def test_what_is_no_path(text: str) -> None:
    with pytest.raises(ValueError, match="is not an ACPI path"):
        aml.path(text)


def test_eisa_id_is_the_specification_s() -> None:
    """19.6.37: EISAID("PNP0C09") is 0x090CD041."""
    assert aml.eisa_id("PNP0C09") == b"\x0c" + (0x090CD041).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: aml.package_length(LONGEST_PACKAGE - 3), "too long"),
        (lambda: aml.integer(-1), "-1 is not an AML integer"),
        (lambda: aml.integer(1 << 64), "is not an AML integer of 64 bits"),
        (lambda: aml.string("a\0b"), "only ASCII without NUL"),
        (lambda: aml.string("\u00e9"), "only ASCII without NUL"),
        (lambda: aml.eisa_id("PNP05"), "is not an EISA ID"),
        (lambda: aml.eisa_id("pnp0501"), "is not an EISA ID"),
        (lambda: aml.eisa_id("PNP0501\n"), "is not an EISA ID"),
        (lambda: aml.package(*[aml.integer(0)] * 256), "at most 255 elements, not 256"),
        (lambda: aml.method("M", arguments=8), "0 to 7 arguments, not 8"),
        (lambda: aml.method("M", sync_level=16), "is 0 to 15, not 16"),
    ],
)
def test_bad_arguments_are_refused(wrong: Callable[[], bytes], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        wrong()
