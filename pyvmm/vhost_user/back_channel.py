"""The socket over which a back end speaks first, as a front end gives it (SET_BACKEND_REQ_FD)."""

from __future__ import annotations

import os
import socket

from pyvmm.vhost_user.channel import Channel
from pyvmm.vhost_user.protocol import BackendRequest
from pyvmm.vhost_user.vring import RefusedError


def back_channel(fd: int, peer: str) -> Channel:
    """A channel over a duplicate of ``fd``, which stays the caller's; nothing comes back on it.

    RefusedError unless it is one end of a socketpair that nothing was sent to.  With any other
    the front end could keep a connection up that has lost its last user, and with it the disk:
    one of its own to this export or another's, or a socket on which such a one is under way.
    """
    sock = _socket(fd)
    try:
        if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            raise RefusedError("the file descriptor is no Unix stream socket")
        # Either end of a connection to a listening socket has that one's name.
        if sock.getsockname() or sock.getpeername():
            raise RefusedError("the file descriptor is no end of a socketpair")
        sock.shutdown(socket.SHUT_RD)
        if sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
            raise RefusedError("on the socket something was said before it was given")
    except BaseException:
        sock.close()
        raise
    return Channel(sock, peer=peer, requests=BackendRequest)


def _socket(fd: int) -> socket.socket:
    copy = os.dup(fd)
    try:
        return socket.socket(fileno=copy)
    except OSError as error:
        os.close(copy)
        raise RefusedError(f"the file descriptor is no socket: {error}") from error
