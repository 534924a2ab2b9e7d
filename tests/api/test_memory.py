"""``MemoryHandle``: what a script may do with the guest's RAM."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyvmm.api.memory import MemoryHandle
from pyvmm.errors import GuestMemoryError, PyvmmError
from pyvmm.memory import GuestMemory

LOW, HIGH = 0x10000, 1 << 32


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory([(0, LOW), (HIGH, LOW)]) as made:
        yield made


def test_bytes_are_read_where_they_were_written(memory: GuestMemory) -> None:
    handle = MemoryHandle(memory)
    handle.write(HIGH + 2, b"abc")
    handle.write(0, bytearray(b"x"))
    handle.write(1, memoryview(b"yz"))
    assert handle.read(HIGH, 6) == b"\0\0abc\0"
    assert handle.read(0, 3) == b"xyz"
    assert handle.read(LOW - 1, 1) == b"\0"
    assert handle.read(LOW, 0) == b""


def test_a_view_is_the_ram_itself(memory: GuestMemory) -> None:
    handle = MemoryHandle(memory)
    with handle.view(0x100, 4) as view:
        view[0] = 7
        handle.write(0x101, b"\x08")
        assert bytes(view) == b"\x07\x08\0\0"
    assert handle.read(0x100, 2) == b"\x07\x08"


def test_a_memory_tells_its_size_and_places(memory: GuestMemory) -> None:
    handle = MemoryHandle(memory)
    assert handle.size_bytes == 2 * LOW
    assert handle.ranges == (range(LOW), range(HIGH, HIGH + LOW))


@pytest.mark.parametrize(("gpa", "length"), [
    (LOW - 1, 2), (LOW, 1), (-1, 1), (0, -1), (1 << 64, 1), (HIGH + LOW, 1), (-1, 0),
])
def test_what_is_not_all_ram_is_one_error(memory: GuestMemory, gpa: int, length: int) -> None:
    handle = MemoryHandle(memory)
    for access in (handle.read, handle.view):
        with pytest.raises(GuestMemoryError, match="is not RAM"):
            access(gpa, length)
    if length > 0:
        with pytest.raises(PyvmmError, match="is not RAM"):
            handle.write(gpa, bytes(length))


@pytest.mark.parametrize(("gpa", "length", "problem"), [
    ("0", 1, "the address is a str, not an int"),
    (0, 1.0, "the length is a float, not an int"),
    (True, 1, "the address is a bool, not an int"),
])
def test_what_is_no_address_is_a_type_error(
    memory: GuestMemory, gpa: int, length: int, problem: str
) -> None:
    with pytest.raises(TypeError, match=problem):
        MemoryHandle(memory).read(gpa, length)
    with pytest.raises(TypeError, match=r"memory\.write takes bytes, not str"):
        MemoryHandle(memory).write(0, "text")  # type: ignore[arg-type]


def test_after_close_every_use_is_one_error() -> None:
    memory = GuestMemory([(0, LOW)])
    handle = MemoryHandle(memory)
    view = handle.view(0, 4)
    memory.close()
    for use in (
        lambda: handle.read(0, 1), lambda: handle.view(0, 1), lambda: handle.write(0, b"x"),
        lambda: handle.size_bytes, lambda: handle.ranges,
    ):
        with pytest.raises(RuntimeError, match="the machine is closed, and its memory is gone"):
            use()
    view[0] = 1  # it has its RAM still
    view.release()
