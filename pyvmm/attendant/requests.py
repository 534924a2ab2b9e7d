"""Requests as an attendant takes them from a socket, and errors as answers."""

from __future__ import annotations

import errno
from socket import socket

from pyvmm.attendant.messages import MAX_BYTES, encode
from pyvmm.attendant.reading import SHAPES, Answer, check, decode
from pyvmm.errors import SnapshotError
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from pyvmm.attendant.messages import Value

_MAX_ERROR_TEXT = 2000  # of a subject and of a problem, each: four bytes a character still fit


def take_request(connection: socket) -> tuple[int, tuple[Value, ...]] | None:
    """Return the next request, None at the end; ValueError for a datagram that is none.

    An empty datagram counts as the end.  Descriptors that come with one are closed by the kernel.
    """
    try:
        data = connection.recv(MAX_BYTES + 1)
    except ConnectionError:
        return None
    if not data:
        return None
    kind, values = decode(data)
    if kind not in SHAPES:
        raise ValueError(f"{kind} is no request")
    return kind, check(values, SHAPES[kind])


def answer_error(connection: socket, error: Exception) -> None:
    """Answer with ``error``; OSError if nobody takes it."""
    if isinstance(error, SnapshotError):
        texts = (error.subject[:_MAX_ERROR_TEXT], error.problem[:_MAX_ERROR_TEXT])
        connection.send(encode(Answer.REFUSED, *texts))
    else:
        number = error.errno if isinstance(error, OSError) else errno.EBADMSG
        connection.send(encode(Answer.FAILED, number or errno.EIO))
