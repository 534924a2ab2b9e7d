"""A person at the console of a guest of a few instructions: the keys that are ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.bare import LONG_MODE_ENTRY, assemble
from tests.support.kernels import ElfSegment, elf
from tests.support.terminal import Terminal

pytestmark = pytest.mark.bare


@pytest.fixture
def dots(tmp_path: Path) -> Iterator[Terminal]:
    """A guest that prints dots for ever."""
    kernel = tmp_path / "dots.elf"
    code = assemble("dots", LONG_MODE_ENTRY, tmp_path)
    kernel.write_bytes(elf(ElfSegment(data=code, p_memsz=4096)))
    terminal = Terminal("--timeout", "60", kernel=kernel)
    terminal.wait_for("...")
    yield terminal
    terminal.close()


def test_ctrl_a_p_pauses_and_resumes(dots: Terminal) -> None:
    for _ in range(2):
        dots.type("\x01p")
        dots.wait_for("paused; Ctrl-A p resumes")
        dots.hear(0.3)  # what was on its way
        assert dots.hear(0.3) == b""
        dots.type("\x01p")
        dots.wait_for("resumed")
        dots.wait_for("...")
    dots.type("\x01x")
    assert dots.status() == 0


def test_a_paused_guest_is_quit_too(dots: Terminal) -> None:
    dots.type("\x01p")
    dots.wait_for("paused")
    dots.type("\x01?")
    dots.wait_for("Ctrl-A p  pause")
    dots.type("\x01x")
    assert dots.status() == 0
