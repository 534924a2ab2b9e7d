"""A small machine's RAM, and files to load into it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.memory import GuestMemory
from tests.support.loading import RAM_BYTES, MakeFile


@pytest.fixture
def ram() -> bytearray:
    """8 MiB of zeros: what ``memory`` is made of."""
    return bytearray(RAM_BYTES)


@pytest.fixture
def memory(ram: bytearray) -> GuestMemory:
    """Guest RAM from address 0."""
    return GuestMemory.over(ram)


@pytest.fixture
def image(tmp_path: Path) -> MakeFile:
    """Writes its argument to ``vmlinuz`` and returns the path."""

    def make(content: bytes | bytearray) -> Path:
        path = tmp_path / "vmlinuz"
        path.write_bytes(content)
        return path

    return make


@pytest.fixture
def initrd_file(tmp_path: Path) -> MakeFile:
    """Writes its argument to ``initrd`` and returns the path."""

    def make(content: bytes | bytearray) -> Path:
        path = tmp_path / "initrd"
        path.write_bytes(content)
        return path

    return make
