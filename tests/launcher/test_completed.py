"""A command's end: text, failure and equality."""

from __future__ import annotations

import pytest

import pyvmm
from pyvmm import Completed


@pytest.mark.parametrize(("fields", "words"), [
    ({"status": 7}, "command sh -c 'a b' ended with status 7"),
    ({"signal": 11}, "command sh -c 'a b' was killed by signal 11"),
    ({"signal": 9, "timed_out": True}, "command sh -c 'a b' was killed at its time limit"),
    ({"status": 1, "stderr_bytes": b"a\nb\x1b[0m \xff\n"},
     "command sh -c 'a b' ended with status 1: a\\nb\\x1b[0m \ufffd"),
])
def test_a_failure_is_one_line(fields: dict[str, object], words: str) -> None:
    completed = Completed(argv=("sh", "-c", "a b"), **fields)  # type: ignore[arg-type]
    assert completed.failure == words
    assert not completed.is_success
    with pytest.raises(pyvmm.CommandError) as error:
        completed.check()
    assert str(error.value) == words


def test_a_failure_is_short_whatever_the_guest_prints() -> None:
    completed = Completed(argv=("x" * 100_000,), status=1, stderr_bytes=b"e" * 100_000)
    assert len(completed.failure) < 5000
    assert len(repr(completed)) < 101_000


def test_what_a_person_sees() -> None:
    assert repr(Completed(argv=("true",), status=0, stdout_bytes=b"x" * 100)) == (
        f"Completed(['true'], status=0, stdout={'x' * 60 + '...'!r}, stderr='')"
    )
    assert repr(Completed(argv=("a",), signal=9, timed_out=True)).startswith(
        "Completed(['a'], signal=9, timed_out=True"
    )
    assert Completed(argv=("a",), status=0).check().is_success
