"""Descriptors that come with messages (SCM_RIGHTS), at most one with each."""

from __future__ import annotations

import os
import socket
import struct

from pyvmm.attendant.messages import MAX_BYTES

_FD = struct.Struct("i")
_ROOM = socket.CMSG_SPACE(_FD.size)


def take_file(connection: socket.socket) -> tuple[bytes, int]:
    """Return the next datagram and the descriptor that came with it, -1 for none; OSError.

    b"" at the end.  The descriptor closes on exec, and is the caller's.
    """
    data, extras, _, _ = connection.recvmsg(MAX_BYTES, _ROOM, socket.MSG_CMSG_CLOEXEC)
    fds = [
        fd for level, kind, content in extras
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        for (fd,) in _FD.iter_unpack(content[: len(content) // _FD.size * _FD.size])
    ]
    for fd in fds[1:]:
        os.close(fd)
    return data, fds[0] if fds else -1


def hand_over(connection: socket.socket, data: bytes, fd: int) -> None:
    """Send a datagram with the descriptor ``fd``, and close that in any case; OSError."""
    try:
        connection.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _FD.pack(fd))])
    finally:
        os.close(fd)
