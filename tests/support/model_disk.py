"""The disk of the property tests: what it is now, and what a power cut would leave."""

from __future__ import annotations

from collections.abc import Sequence


class ModelDisk:
    """A backend in memory: ``now`` is what reads see, ``stable`` what is safe."""

    block_size = 512
    extra_calls = 0
    merges = False
    read_only = False
    can_discard = True
    can_write_zeroes = True

    def __init__(self, content: bytes) -> None:
        self.now = bytearray(content)
        self.stable = bytearray(content)

    @property
    def size_bytes(self) -> int:
        return len(self.now)

    def readv(self, buffers: Sequence[memoryview], offset: int) -> None:
        for buffer in buffers:
            buffer[:] = self.now[offset : offset + len(buffer)]
            offset += len(buffer)

    def writev(self, buffers: Sequence[memoryview], offset: int, *, durable: bool = False) -> None:
        for buffer in buffers:
            self.now[offset : offset + len(buffer)] = buffer
            if durable:
                self.stable[offset : offset + len(buffer)] = buffer
            offset += len(buffer)

    def flush(self) -> None:
        self.stable[:] = self.now

    def discard(self, offset: int, length: int) -> None:
        self.now[offset : offset + length] = b"\xdd" * length

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self.now[offset : offset + length] = bytes(length)

    def refresh_size(self) -> int:
        return len(self.now)

    def hurry(self, until_s: float) -> None: ...

    def close(self) -> None:
        pass
