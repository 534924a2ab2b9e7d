"""The files of ``--pyvmm-logs``: every test's own, whatever its name is."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.errors import HostError
from pyvmm.pytest_plugin.logs import Logs, parts_of, write_mark


@pytest.mark.parametrize(("nodeid", "parts"), [
    ("tests/test_a.py::test_b", ["tests", "test_a.py", "test_b"]),
    ("test_a.py::TestB::test_c[6.1-x]", ["test_a.py", "TestB", "test_c[6.1-x]"]),
    ("./test_a.py::test_b", ["test_a.py", "test_b"]),
])
def test_a_plain_name_is_the_path(nodeid: str, parts: list[str]) -> None:
    assert parts_of(nodeid) == parts


@pytest.mark.parametrize("nodeid", [
    "test_a.py::test_b[/etc/passwd]", "test_a.py::test_b[../../x]", "test_a.py::test_b[a::b]",
    "test_a.py::test_b[\x1b]", "test_a.py::test_b[" + "x" * 500 + "]", "../test_a.py::test_b",
])
def test_a_name_never_leads_elsewhere(nodeid: str) -> None:
    parts = parts_of(nodeid)
    assert len(parts) == nodeid.partition("[")[0].count("/") + 2
    for part in parts:
        assert "/" not in part
        assert ".." not in part
        assert part.isprintable()
        assert len(part) < 200


def test_names_that_look_alike_have_files_of_their_own() -> None:
    alike = ["a/b", "a_b", "a::b", "a b", "a\tb", "a\x00b", "x" * 300, "x" * 301]
    assert len({tuple(parts_of(f"t.py::test[{one}]")) for one in alike}) == len(alike)


def test_a_second_guest_of_a_test_has_a_second_file(tmp_path: Path) -> None:
    logs = Logs(tmp_path)
    found = [logs.of_test("t.py::test_a") for _ in range(3)]
    assert found == [tmp_path / "t.py" / f"test_a{number}.log" for number in ("", ".2", ".3")]
    assert [path.read_bytes() for path in found if path] == [b""] * 3


def test_shared_guests_of_workers_have_files_of_their_own(tmp_path: Path) -> None:
    assert Logs(tmp_path, "gw1").of_shared("t.py", "6.1") == tmp_path / "t.py/shared-gw1[6.1].log"
    assert Logs(tmp_path).of_shared("", "") == tmp_path / "session.log"


def test_a_mark_is_one_line_behind_what_is_there(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"console")
    write_mark(log, "test_a[\x1b\n] begins")
    assert log.read_bytes() == b"console\n==== pyvmm: test_a[\\x1b\\n] begins ====\n"
    write_mark(None, "nowhere")


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    tmp_path.joinpath("file").touch()
    with pytest.raises(HostError, match=r"^--pyvmm-logs .*/file/t\.py/test_a\.log: "):
        Logs(tmp_path / "file").of_test("t.py::test_a")


def test_a_full_disk_is_named() -> None:
    with pytest.raises(HostError, match=r"^--pyvmm-logs /dev/full: No space left"):
        write_mark(Path("/dev/full"), "test_a begins")
