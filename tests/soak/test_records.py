"""What is found of records: the check of the kills and faults is able to fail."""

from __future__ import annotations

import pytest

from soak.errors import TrialError
from soak.records import acknowledged, check_records, record


def disk(*numbers: int, sectors: int = 12) -> bytearray:
    data = bytearray(sectors * 512)
    for number in numbers:
        data[number * 512 : (number + 1) * 512] = record(number)
    return data


def test_acknowledgements_are_whole_lines() -> None:
    console = b"noise a00000009\na00000001\ne00000002\na0000001f\na00000020"
    assert acknowledged(console) == ([1, 31], [2])


def test_records_that_are_there_are_counted() -> None:
    assert check_records(disk(1, 2, 3), [1, 2], first=1) == 3
    assert check_records(disk(1, 2, 3), [3], first=3) == 1
    assert check_records(disk(), [], first=1) == 0


def test_a_lost_record_is_found() -> None:
    with pytest.raises(TrialError, match=r"^lost of 3 acknowledged records: 3$"):
        check_records(disk(1, 2), [1, 2, 3], first=1)


def test_a_gap_is_found() -> None:
    with pytest.raises(TrialError, match=r"^written up to 4, without: 2$"):
        check_records(disk(1, 3, 4), [1], first=1)
    assert check_records(disk(1, 3, 4), [1], first=1, failed=[2]) == 3


@pytest.mark.parametrize("spoil", [slice(512, 516), slice(1020, 1024)])
def test_a_torn_record_is_found(spoil: slice) -> None:
    data = disk(1, 2)
    data[spoil] = b"\0\0\0\0"
    with pytest.raises(TrialError, match=r"^sector 1 is not its record"):
        check_records(data, [], first=1)
    assert check_records(data, [], first=1, failed=[1]) == 1


def test_a_record_at_the_wrong_place_is_found() -> None:
    data = disk(1)
    data[2 * 512 : 3 * 512] = record(5)
    with pytest.raises(TrialError, match=r"^sector 2 is not its record"):
        check_records(data, [1], first=1)
