"""JUnit XML: well-formed whatever a guest printed, and of the shape that servers read."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.testing.junit import Case, Suite, junit_xml

TESTCASE_PARTS = ["failure", "error", "skipped", "system-out", "system-err"]


def parsed(*suites: Suite) -> ElementTree.Element:
    return ElementTree.fromstring(junit_xml(suites).encode())


def test_a_suite_counts_its_cases() -> None:
    root = parsed(Suite(name="boot", began_s=0.0, properties=[("kernel", "bzImage")], cases=[
        Case(name="passes", seconds=1.25),
        Case(name="fails", failure=("panic", "Kernel panic", "lines"), system_out="out",
             system_err="err"),
        Case(name="breaks", error=("host-error", "no KVM", "")),
        Case(name="is left out", skipped="not wanted"),
    ]))
    assert root.tag == "testsuites"
    suite = root[0]
    assert {**suite.attrib, "time": ""} == {
        "name": "boot", "id": "0", "package": "pyvmm", "hostname": "localhost",
        "timestamp": "1970-01-01T00:00:00", "tests": "4", "failures": "1", "errors": "1",
        "skipped": "1", "time": "",
    }
    assert [part.tag for part in suite] == [
        "properties", *["testcase"] * 4, "system-out", "system-err"
    ], "the order that the schema wants"
    assert suite[0][0].attrib == {"name": "kernel", "value": "bzImage"}
    cases = suite.findall("testcase")
    assert cases[0].attrib == {"name": "passes", "classname": "pyvmm", "time": "1.250"}
    assert [part.tag for part in cases[1]] == ["failure", "system-out", "system-err"]
    failure = cases[1][0]
    assert (failure.attrib, failure.text) == ({"type": "panic", "message": "Kernel panic"}, "lines")
    assert [part.tag for case in cases[2:] for part in case] == ["error", "skipped"]


@pytest.mark.parametrize("text", [
    "\x00\x1b[2J\x07", "]]>", "<failure/>", "&amp;", "\ud800", "\ufffe", "a\r\nb\tc", '"\'',
    "\U0001f600",
])
def test_what_a_guest_prints_breaks_nothing(text: str) -> None:
    root = parsed(Suite(name=text, cases=[
        Case(name=text, classname=text, failure=(text, text, text), system_out=text,
             system_err=text)
    ], properties=[(text, text)]))
    shown = root[0].get("name")
    assert shown is not None
    case = root[0].find("testcase")
    assert case is not None
    assert case.findtext("system-out") == case.findtext("failure") == shown == case.get("name")


def test_control_characters_are_spelled_out_and_line_ends_kept() -> None:
    root = parsed(Suite(name="x", cases=[Case(name="a\nb", system_out="\x1b[0m\r\nnext")]))
    case = root[0].find("testcase")
    assert case is not None
    assert case.get("name") == "a\nb"
    assert case.findtext("system-out") == "\\x1b[0m\r\nnext"


@given(st.text(alphabet=st.characters(exclude_categories=())))
def test_any_text_gives_a_document_that_can_be_parsed(text: str) -> None:
    case = parsed(Suite(name="x", cases=[Case(name=text, system_out=text)]))[0].find("testcase")
    assert case is not None
    assert [part.tag for part in case] == (["system-out"] if text else [])
