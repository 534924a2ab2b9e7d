"""A file with bad sectors, that remembers which writes were durable."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

from pyvmm.storage.backend import buffers_slice
from pyvmm.storage.raw import RawBackend


class ScratchedDisk(RawBackend):
    """A transfer that reaches one of the sectors ``bad`` stops there and fails with EIO.

    ``writes`` has, by sector, whether the last write was durable; ``calls`` counts transfers.
    """

    def __init__(self, path: Path, bad: frozenset[int] = frozenset()) -> None:
        super().__init__(str(path), report=print)
        self.bad = bad
        self.writes: dict[int, bool] = {}
        self.calls = 0

    def readv(self, buffers: Sequence[memoryview], offset: int) -> None:
        self.calls += 1
        good = self._good(buffers, offset)
        super().readv(buffers_slice(buffers, 0, good), offset)
        self._fail_unless(good == sum(map(len, buffers)))

    def writev(self, buffers: Sequence[memoryview], offset: int, *, durable: bool = False) -> None:
        self.calls += 1
        good = self._good(buffers, offset)
        super().writev(buffers_slice(buffers, 0, good), offset, durable=durable)
        for sector in range(offset // 512, (offset + good) // 512):
            self.writes[sector] = durable
        self._fail_unless(good == sum(map(len, buffers)))

    def _good(self, buffers: Sequence[memoryview], offset: int) -> int:
        """The bytes in front of the first bad sector."""
        first, end = offset // 512, (offset + sum(map(len, buffers))) // 512
        return (min([s for s in self.bad if first <= s < end], default=end) - first) * 512

    @staticmethod
    def _fail_unless(whole: bool) -> None:
        if not whole:
            raise OSError(errno.EIO, "a bad sector")
