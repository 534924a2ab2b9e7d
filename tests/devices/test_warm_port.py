"""The warm port: which bytes say that the guest is warm."""

from __future__ import annotations

import pytest

from pyvmm.devices.warm_port import WARM_NOW, WarmPort


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def port(told: list[str]) -> WarmPort:
    return WarmPort(lambda: told.append("warm"))


def test_1_says_warm_now(port: WarmPort, told: list[str]) -> None:
    port.write(0, 1, WARM_NOW)
    assert told == ["warm"]
    port.write(0, 1, WARM_NOW)
    assert told == ["warm", "warm"], "who asks twice is the caller's affair"


def test_all_other_bytes_are_reserved(port: WarmPort, told: list[str]) -> None:
    for value in range(256):
        if value != WARM_NOW:
            port.write(0, 1, value)
    assert told == []


def test_it_reads_as_an_unmapped_port(port: WarmPort) -> None:
    assert port.read(0, 1) == 0xFF
