"""Connections to Unix sockets of other processes, within a deadline."""

from __future__ import annotations

import errno
import os
import socket
import time

MAX_PATH_BYTES = 107
"""The longest path of a Unix socket: sun_path of unix(7) has 108 bytes, with its NUL."""
_PAUSE_S = 0.01


def path_problem(path: str) -> str | None:
    """Return what is wrong with ``path`` as the path of a Unix socket, or None."""
    if not path:
        return "its path is empty"
    if "\0" in path:
        return "its path has a NUL character"
    length = len(os.fsencode(path))
    if length > MAX_PATH_BYTES:
        return f"its path has {length} bytes, the limit is {MAX_PATH_BYTES}"
    return None


def connect_unix(path: str, until_s: float) -> socket.socket:
    """Return a stream socket, non-blocking, connected to whoever listens on ``path``.

    A listener whose backlog is full is asked again until ``until_s`` (time.monotonic), then it is
    a TimeoutError.  OSError, with a strerror for people, if there is no connection.
    """
    problem = path_problem(path)
    if problem:
        raise OSError(errno.ENAMETOOLONG if len(path) > MAX_PATH_BYTES else errno.EINVAL, problem)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        while True:
            try:
                connection.connect(path)
                return connection
            except BlockingIOError:
                if time.monotonic() >= until_s:
                    raise TimeoutError(
                        errno.ETIMEDOUT,
                        "whoever listens does not accept connections (its backlog is full)",
                    ) from None
            time.sleep(_PAUSE_S)  # no event says that there is room
    except BaseException:
        connection.close()
        raise
