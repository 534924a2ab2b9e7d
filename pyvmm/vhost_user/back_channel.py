"""The socket over which a back end speaks first, given by the front end (SET_BACKEND_REQ_FD)."""

from __future__ import annotations

import os
import socket

from pyvmm.vhost_user.channel import Channel
from pyvmm.vhost_user.protocol import BackendRequest
from pyvmm.vhost_user.vring import RefusedError


def back_channel(fd: int, peer: str) -> Channel:
    """Return a channel over a duplicate of ``fd``, which stays the caller's; it only sends.

    RefusedError unless ``fd`` is one end of a socketpair to which nothing was sent.  Any other
    socket could be a connection to this export or another's, or carry one.  The front end could
    then keep a connection up after its last user has gone, and with it the disk.
    """
    sock = _socket(fd)
    try:
        if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            raise RefusedError("the file descriptor is no Unix stream socket")
        # Either end of a connection to a listening socket has the listening socket's name.
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
