"""Results as JUnit XML, the form that CI servers read; valid whatever a guest printed.

The shape is that of the schema people check against (windyroad's JUnit.xsd, as Jenkins and GitLab
read it): ``testsuites``, ``testsuite``, ``testcase`` with at most one of ``failure``, ``error`` and
``skipped``, then ``system-out`` and ``system-err``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime

from pyvmm.startup.types import Record

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that no XML 1.0 document may have, escaped or not (XML 1.0, 2.2)."""
_REFERENCES = str.maketrans({
    "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;",
    # Else a reader makes spaces of them in an attribute, and a line end of a carriage return.
    "\t": "&#9;", "\n": "&#10;", "\r": "&#13;",
})
_TEXT_REFERENCES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "\r": "&#13;"})


class Case(Record):
    """One test.

    ``failure`` and ``error`` are (type, message, text) of a test that failed, and of one that
    could not be run; both None if it passed.  ``skipped`` is the reason for not running it, ""
    otherwise.
    """

    name: str
    classname: str = "pyvmm"
    seconds: float = 0.0
    failure: tuple[str, str, str] | None = None
    error: tuple[str, str, str] | None = None
    skipped: str = ""
    system_out: str = ""
    system_err: str = ""


class Suite(Record):
    """Tests that belong together; ``began_s`` is a Unix time, ``properties`` are (name, value)."""

    name: str
    cases: Sequence[Case]
    began_s: float = 0.0
    host: str = "localhost"
    properties: Sequence[tuple[str, str]] = ()


def junit_xml(suites: Sequence[Suite]) -> str:
    """Return the XML document of ``suites``."""
    cases = [case for suite in suites for case in suite.cases]
    lines = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        f"<testsuites {_counts(cases)}>",
        *(line for number, suite in enumerate(suites) for line in _suite(suite, number)),
        "</testsuites>",
    ]
    return "\n".join(lines) + "\n"


def _counts(cases: Sequence[Case]) -> str:
    failures = sum(case.failure is not None for case in cases)
    errors = sum(case.error is not None for case in cases)
    seconds = sum(case.seconds for case in cases)
    return (
        f'tests="{len(cases)}" failures="{failures}" errors="{errors}" time="{seconds:.3f}"'
    )


def _suite(suite: Suite, number: int) -> list[str]:
    began = datetime.fromtimestamp(suite.began_s, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    skipped = sum(bool(case.skipped) for case in suite.cases)
    lines = [
        f'<testsuite name="{_value(suite.name)}" id="{number}" package="pyvmm" '
        f'hostname="{_value(suite.host)}" timestamp="{began}" {_counts(suite.cases)} '
        f'skipped="{skipped}">',
        "<properties>",
        *(
            f'<property name="{_value(name)}" value="{_value(value)}"/>'
            for name, value in suite.properties
        ),
        "</properties>",
    ]
    for case in suite.cases:
        lines += _case(case)
    return [*lines, "<system-out/>", "<system-err/>", "</testsuite>"]


def _case(case: Case) -> list[str]:
    lines = [
        f'<testcase name="{_value(case.name)}" classname="{_value(case.classname)}" '
        f'time="{case.seconds:.3f}">'
    ]
    for tag, problem in (("failure", case.failure), ("error", case.error)):
        if problem is not None:
            kind, message, text = problem
            lines.append(
                f'<{tag} type="{_value(kind)}" message="{_value(message)}">{_text(text)}</{tag}>'
            )
            break
    else:
        if case.skipped:
            lines.append(f'<skipped message="{_value(case.skipped)}"/>')
    for tag, text in (("system-out", case.system_out), ("system-err", case.system_err)):
        if text:
            lines.append(f"<{tag}>{_text(text)}</{tag}>")
    return [*lines, "</testcase>"]


def _value(text: str) -> str:
    """Return ``text`` for an attribute between double quotes."""
    return _spelled(text).translate(_REFERENCES)


def _text(text: str) -> str:
    """Return ``text`` for an element."""
    return _spelled(text).translate(_TEXT_REFERENCES)


def _spelled(text: str) -> str:
    """Spell out what XML cannot have: ``\\x1b``."""
    return _NOT_XML.sub(lambda found: repr(found[0])[1:-1], text)
