"""The name of a socket in the file system, for whoever removes it at the end."""

from __future__ import annotations

import contextlib
import os


class SocketName:
    """``name`` in the directory ``directory_fd``, which this owns.

    ``device`` and ``inode`` are the socket's (st_dev and st_ino): a file of another process under
    the same name stays.
    """

    def __init__(self, directory_fd: int, name: str, device: int, inode: int) -> None:
        self.directory_fd = directory_fd
        """The descriptor of the directory; -1 once the name is removed or given away."""
        self.name = name
        self.device = device
        self.inode = inode

    @classmethod
    def of(cls, directory_fd: int, name: str) -> SocketName:
        """Return the name ``name`` of the socket that is there now; OSError."""
        status = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
        return cls(directory_fd, name, status.st_dev, status.st_ino)

    def remove(self) -> None:
        """Remove the name, unless another process has it now; idempotent, no error."""
        if self.directory_fd < 0:
            return
        with contextlib.suppress(OSError):
            status = os.stat(self.name, dir_fd=self.directory_fd, follow_symlinks=False)
            if (status.st_dev, status.st_ino) == (self.device, self.inode):
                os.unlink(self.name, dir_fd=self.directory_fd)
        self.close()

    def close(self) -> None:
        """Close the directory, and leave the name; idempotent."""
        fd, self.directory_fd = self.directory_fd, -1
        if fd >= 0:
            os.close(fd)
