"""A Unix socket to listen on, under a name that other processes find.

The socket appears under its name only when it accepts connections, and only for its owner: it is
bound elsewhere in the same directory, then renamed.  A socket left over from a process that was
killed is replaced.  A socket on which somebody answers is not, nor a file of another kind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import stat
from pathlib import Path

from pyvmm.errors import ConfigError
from pyvmm.vhost_user.hints import lab_hint

_MAX_PATH_BYTES = 107  # sun_path of unix(7), with its NUL
_BACKLOG = 16


class Listener:
    """Listens on ``path``; ConfigError naming it if that fails."""

    def __init__(self, path: str) -> None:
        if not 0 < len(os.fsencode(path)) <= _MAX_PATH_BYTES or "\0" in path:
            raise ConfigError(
                f"socket {path!r}", f"is not a path of 1 to {_MAX_PATH_BYTES} bytes"
            )
        self.path = path
        self._directory = -1
        self._identity: tuple[int, int] | None = None
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._check_free()
            self._publish()
        except OSError as error:
            self.close()
            raise ConfigError(path, f"cannot be a socket: {error.strerror}{lab_hint()}") from error
        except ConfigError:
            self.close()
            raise

    def fileno(self) -> int:
        """The socket; non-blocking."""
        return self.socket.fileno()

    def _check_free(self) -> None:
        """Raise ConfigError if the path is a socket in use or another kind of file."""
        try:
            mode = Path(self.path).lstat().st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise ConfigError(self.path, "is there, and is no socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
            caller.setblocking(False)
            answer = caller.connect_ex(self.path)
        if answer not in (errno.ECONNREFUSED, errno.ENOENT):
            raise ConfigError(self.path, "is in use: somebody listens on it")

    def _publish(self) -> None:
        path = Path(self.path)
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        self._directory = os.open(path.parent, flags)
        temporary = f".pyvmm-{secrets.token_hex(6)}"
        # The socket's mode becomes the mode of the file that bind makes.  The way through the
        # directory's descriptor leaves room for a name of any length.
        os.fchmod(self.socket.fileno(), 0o600)
        self.socket.bind(f"/proc/self/fd/{self._directory}/{temporary}")
        try:
            self.socket.listen(_BACKLOG)
            self.socket.setblocking(False)
            os.rename(
                temporary, path.name, src_dir_fd=self._directory, dst_dir_fd=self._directory
            )
        except OSError:
            os.unlink(temporary, dir_fd=self._directory)
            raise
        self._identity = self._look()

    def _look(self) -> tuple[int, int]:
        status = os.stat(Path(self.path).name, dir_fd=self._directory, follow_symlinks=False)
        return status.st_dev, status.st_ino

    def close(self) -> None:
        """Stop listening and remove the name, unless somebody else has it now; idempotent."""
        if self._directory >= 0:
            with contextlib.suppress(OSError):
                if self._identity is not None and self._look() == self._identity:
                    os.unlink(Path(self.path).name, dir_fd=self._directory)
            os.close(self._directory)
            self._directory = -1
        self.socket.close()
