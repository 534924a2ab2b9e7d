from __future__ import annotations

import ctypes
import mmap
import os

import pytest

from pyvmm.driver import SharedMemory, TransportError
from tests.support.driver_rigs import open_fds


def test_is_whole_pages_of_zeroes_at_its_address() -> None:
    with SharedMemory(5000) as memory:
        assert memory.length == 8192
        assert bytes(memory.view) == bytes(8192)
        memory.view[4999] = 7
        assert ctypes.string_at(memory.address + 4999, 1) == b"\7"
        assert os.pread(memory.fd, 1, memory.offset + 4999) == b"\7"


@pytest.mark.parametrize("length", [4096, 5 << 20, (1 << 30) + 4096])
def test_fault_44_its_pages_can_be_huge(length: int) -> None:
    for pages in (1, 3, 7):
        with mmap.mmap(-1, pages * 4096), SharedMemory(length) as memory:
            assert memory.address % (2 << 20) == 0 == memory.offset
            assert len(memory.view) == memory.length == length
            memory.view[-1] = 7
            assert os.pread(memory.fd, 1, length - 1) == b"\7"


def test_nobody_can_change_its_size() -> None:
    with SharedMemory(4096) as memory:
        for length in (0, 8192):
            with pytest.raises(PermissionError):
                os.ftruncate(memory.fd, length)


@pytest.mark.parametrize("length", [0, -1, 1 << 62, 1 << 70])
def test_a_length_there_cannot_be(length: int) -> None:
    before = open_fds()
    with pytest.raises(TransportError, match=r"bytes"):
        SharedMemory(length)
    assert open_fds() == before


def test_closes_once_its_views_are_gone() -> None:
    before = open_fds()
    memory = SharedMemory(4096)
    view = memory.view[:10]
    with pytest.raises(BufferError, match=r"views of the 4096 bytes .* release them first"):
        memory.close()
    view.release()
    memory.close()
    memory.close()
    assert open_fds() == before


def test_closing_does_not_hide_what_went_wrong() -> None:
    def fail() -> None:
        with SharedMemory(4096) as memory:
            part = memory.view[:10]
            raise KeyError(len(part))

    before = open_fds()
    with pytest.raises(KeyError, match="10"):
        fail()
    assert open_fds() == before
