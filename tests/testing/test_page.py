"""docs/verdicts.md: every verdict, class and field is there, with its exit status."""

from __future__ import annotations

import re
from pathlib import Path

import pyvmm
from pyvmm.testing.boot_result import BootResult
from pyvmm.testing.fail_on import CLASSES
from pyvmm.testing.own_verdicts import OWN_VERDICTS
from pyvmm.testing.verdicts import VERDICTS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "verdicts.md").read_text()
ROWS = re.findall(r"^\| `([a-z-]+)` \| ([^|]*) \| ([^|]*)\|", PAGE, re.MULTILINE)


def test_every_verdict_is_on_the_page_with_its_exit_status_and_class() -> None:
    statuses = {name: status.strip() for name, status, _ in ROWS}
    classes = {name: word.strip(" `") for name, _, word in ROWS}
    assert {kind.name for kind in VERDICTS} | set(OWN_VERDICTS) <= statuses.keys()
    for kind in VERDICTS:
        assert statuses[kind.name] == str(kind.exit_status)
        assert classes[kind.name] == kind.__name__
        assert getattr(pyvmm, kind.__name__) is kind


def test_every_class_of_lines_is_on_the_page() -> None:
    assert {f"| `{name}` | `" for name in CLASSES} <= {
        match[0] for match in re.finditer(r"^\| `[a-z]+` \| `", PAGE, re.MULTILINE)
    }


def test_every_field_of_the_json_is_on_the_page() -> None:
    page = PAGE.replace("`stderr_...`", "`stderr_bytes`, `stderr_tail`")
    assert [name for name in BootResult._fields if f"`{name}`" not in page] == []
