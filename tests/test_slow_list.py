"""tests/slow.txt: what a measurement makes of it."""

from __future__ import annotations

from pathlib import Path

from tests.support.slow import SLOW_S, function_of, read_list, write_list

OWN = "tests/test_slow_list.py::test_a_measurement_lists_what_is_slow"
OTHER = "tests/test_slow_list.py::test_cases_are_of_one_function"


def test_a_measurement_lists_what_is_slow(tmp_path: Path) -> None:
    path = tmp_path / "slow.txt"
    assert read_list(path) == frozenset()
    write_list({OWN: SLOW_S, OTHER: SLOW_S / 2}, path)
    assert read_list(path) == {OWN}
    write_list({OTHER: 2 * SLOW_S}, path)
    assert read_list(path) == {OWN, OTHER}, "what was not measured now stays"
    write_list({OWN: 0.0}, path)
    assert read_list(path) == {OTHER}


def test_what_is_gone_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "slow.txt"
    write_list({"tests/no_such_file.py::test_x": 9.0, f"{OWN}_by_another_name": 9.0}, path)
    write_list({}, path)
    assert read_list(path) == frozenset()


def test_cases_are_of_one_function() -> None:
    assert function_of("tests/a.py::test_b[c::d[0]]") == "tests/a.py::test_b"
