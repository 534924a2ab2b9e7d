"""The RAM of a machine in another process."""

from __future__ import annotations

import base64

from pyvmm.launcher.session import Session

CHUNK_BYTES = 256 << 10
"""So much is asked for at once; an answer is a line of at most 1 MiB."""


class VmMemory:
    """``Vm.memory``: the guest's RAM, at any time before ``close``."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def read(self, gpa: int, length: int) -> bytes:
        """Return ``length`` bytes at guest physical address ``gpa``; PyvmmError if not RAM."""
        for name, value in (("gpa", gpa), ("length", length)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"memory.read: {name} is a {type(value).__name__}, not an int")
            if value < 0:
                raise ValueError(f"memory.read: {name} is {value}; the least is 0")
        data = bytearray()
        for start in range(0, max(length, 1), CHUNK_BYTES):
            size = min(CHUNK_BYTES, length - start)
            answer = self._session.call("memory.read", {"gpa": gpa + start, "length": size})
            data += base64.b64decode(answer["data"])
        return bytes(data)
