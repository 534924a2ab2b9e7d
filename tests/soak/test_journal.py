"""A part's journal: whole lines only, kept at once, one writer."""

from __future__ import annotations

from pathlib import Path

import pytest

from soak.journal import BusyError, Journal, read_lines


def test_lines_are_there_again(tmp_path: Path) -> None:
    with Journal(tmp_path / "deep" / "a.jsonl") as journal:
        journal.add({"leg": "now", "size": 2})
        journal.add({"trial": 1, "s": 0.5})
        journal.add({"trial": 0, "s": 0.5, "failed": "so"})
        journal.add({"left": "a file"})
    with Journal(journal.path) as journal:
        assert [line["trial"] for line in journal.trials] == [1, 0]
        assert (journal.legs, journal.failures) == (1, 2)


@pytest.mark.parametrize("rest", [
    b'{"trial":1', b'{"trial":1}', b"\0\0\0\0\n", b"[1]\n", b'{"trial": 1}\n', b"\xff\n",
    b'{"tri\n{"trial":1}\n',
])
def test_what_a_kill_has_cut_is_dropped(tmp_path: Path, rest: bytes) -> None:
    """And it is not in the way of what comes next."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"trial":0}\n' + rest)
    with Journal(path) as journal:
        assert journal.trials == [{"trial": 0}]
        journal.add({"trial": 2})
    assert list(read_lines(path)) == [{"trial": 0}, {"trial": 2}]


def test_a_part_has_one_writer(tmp_path: Path) -> None:
    with (
        Journal(tmp_path / "a.jsonl"),
        pytest.raises(BusyError, match="another soak runs this part"),
    ):
        Journal(tmp_path / "a.jsonl")
    Journal(tmp_path / "a.jsonl").close()


def test_no_journal_has_no_lines(tmp_path: Path) -> None:
    assert list(read_lines(tmp_path / "none")) == []
