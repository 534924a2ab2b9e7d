"""A file in memory with a path, for readers that want one."""

from __future__ import annotations

import os


class MemoryFile:
    """A regular file that ``put`` fills; ``path`` opens it."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("fuzz", os.MFD_CLOEXEC)
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"

    def put(self, data: bytes) -> str:
        """Make ``data`` the file's contents; return its path."""
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, data, 0)
        return self.path

    def close(self) -> None:
        """Close it; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
