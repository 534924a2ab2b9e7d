"""Opening raw disks, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.storage.raw import RawBackend


@contextmanager
def opened(path: Path, *, read_only: bool = False) -> Iterator[RawBackend]:
    """A backend over ``path`` that reports to nobody."""
    backend = RawBackend(str(path), read_only=read_only, report=lambda line: None)
    try:
        yield backend
    finally:
        backend.close()


def refusal(path: Path | str, *, read_only: bool = False) -> str:
    """The ConfigError that opening ``path`` gives."""
    with pytest.raises(ConfigError) as caught:
        RawBackend(str(path), read_only=read_only, report=lambda line: None)
    assert caught.value.subject == str(path)
    assert "\n" not in str(caught.value)
    return caught.value.problem


def room(*lengths: int) -> list[memoryview]:
    return [memoryview(bytearray(length)) for length in lengths]
