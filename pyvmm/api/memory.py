"""The guest's RAM for a script: checked reads, writes and views."""

from __future__ import annotations

from pyvmm.errors import GuestMemoryError
from pyvmm.memory import GuestMemory


class MemoryHandle:
    """``machine.memory``.  All methods may be called from any thread, also while the guest runs.

    Addresses are guest physical ones, lengths are bytes.  GuestMemoryError (a PyvmmError) for
    anything that is not all in one piece of RAM, TypeError for what is no address.  RuntimeError
    once the machine is closed.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory

    @property
    def size_bytes(self) -> int:
        """The size of all RAM."""
        return self._open().size_bytes

    @property
    def ranges(self) -> tuple[range, ...]:
        """The addresses that are RAM, ascending: ``0x1000 in machine.memory.ranges[0]``."""
        return tuple(range(region.gpa, region.end) for region in self._open().regions)

    def read(self, gpa: int, length: int) -> bytes:
        """Return a copy of ``length`` bytes at ``gpa``."""
        return bytes(self.view(gpa, length))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Store ``data`` at ``gpa``."""
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"memory.write takes bytes, not {type(data).__name__}")
        content = bytes(data) if isinstance(data, memoryview) else data
        self.view(gpa, len(content))[:] = content

    def view(self, gpa: int, length: int) -> memoryview:
        """Return the RAM itself, writable: the guest sees every change at once, and changes it.

        A view that is still there when the machine is closed keeps all of its RAM.
        """
        memory = self._open()
        for name, value in (("address", gpa), ("length", length)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"memory: the {name} is a {type(value).__name__}, not an int")
        if gpa < 0:
            raise GuestMemoryError(gpa, length)
        return memory.view(gpa, length)

    def _open(self) -> GuestMemory:
        if self._memory.is_closed:
            raise RuntimeError("memory: the machine is closed, and its memory is gone")
        return self._memory
