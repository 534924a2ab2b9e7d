"""The first half of the NBD protocol: from a new connection to an export.

It is the "fixed newstyle negotiation" of the protocol's doc/proto.md.  All numbers are
big-endian.  The server is not trusted: lengths are bounded, and nonsense is an OSError.
"""

from __future__ import annotations

import errno
import socket
import struct
import time
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from pyvmm.peers.unix_socket import connect_unix
from pyvmm.storage.backend import SECTOR_SIZE
from pyvmm.storage.nbd_uri import NbdAddress

_GREETING = struct.Struct(">8s8sH")  # NBDMAGIC, IHAVEOPT, handshake flags
_OPTION = struct.Struct(">8sII")  # IHAVEOPT, option, length of its data
_OPTION_REPLY = struct.Struct(">QIII")  # magic, option, reply type, length of its data
_OPTION_REPLY_MAGIC = 0x0003_E889_0455_65A9
_FIXED_NEWSTYLE = 1
_NO_ZEROES = 2

_EXPORT = struct.Struct(">QH")  # size in bytes, transmission flags
_BLOCK_SIZES = struct.Struct(">III")  # minimum, preferred, maximum payload
_EXPORT_NAME_PADDING = 124
_MAX_REPLY_BYTES = 1 << 16
_MAX_REPLIES = 100
MAX_PAYLOAD = 32 << 20
"""Bytes that a server takes at once if it does not say how many."""
_MAX_MINIMUM_BLOCK = 4096
"""Bytes; Linux guests know no larger logical block."""
_LEAST_SHARE_S = 0.25
"""An address's least share of the time to connect; RFC 8305 (5) gives each as much."""


class Option(IntEnum):
    """Option types."""

    EXPORT_NAME = 1
    GO = 7


class Reply(IntEnum):
    """Option reply types; errors have the highest bit set."""

    ACK = 1
    INFO = 3
    ERR_UNSUP = (1 << 31) + 1
    ERR_POLICY = (1 << 31) + 2
    ERR_TLS_REQD = (1 << 31) + 5
    ERR_UNKNOWN = (1 << 31) + 6


class Info(IntEnum):
    """Information types."""

    EXPORT = 0
    BLOCK_SIZE = 3


class Transmission(IntFlag):
    """Transmission flags: what the export can do."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """The disk that both sides agreed on; sizes in bytes."""

    size_bytes: int
    flags: Transmission
    block_size: int = SECTOR_SIZE
    max_payload: int = MAX_PAYLOAD


def connect(address: NbdAddress, until_s: float) -> socket.socket:
    """Return a socket connected to the server, before ``until_s`` (time.monotonic); OSError.

    A host's addresses share the time: one that does not answer must leave some to the next.  The
    look-up of its name is not limited, because the resolver has its own time.
    """
    if address.socket_path:
        return connect_unix(address.socket_path, until_s)
    # The last place's error without its traceback, which would keep this frame in a cycle.
    problem: tuple[object, ...] = ()
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    for index, (family, kind, protocol, _, place) in enumerate(found):
        now_s = time.monotonic()
        if problem and now_s >= until_s:
            break
        share_s = max((until_s - now_s) / (len(found) - index), _LEAST_SHARE_S)
        connection = socket.socket(family, kind, protocol)
        try:
            _limit_time(connection, min(now_s + share_s, until_s))
            connection.connect(place)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except TimeoutError:
            connection.close()
            problem = errno.ETIMEDOUT, f"no answer from {place[0]}"
        except OSError as error:
            connection.close()
            problem = error.args
        else:
            return connection
    raise OSError(*(problem or (errno.EHOSTUNREACH, "its host has no address")))


def _limit_time(connection: socket.socket, until_s: float) -> None:
    """Give the next call on ``connection`` the time that is left; TimeoutError if none is."""
    left_s = until_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    connection.settimeout(left_s)


def negotiate(connection: socket.socket, export: str, until_s: float) -> Export:
    """Greet the server and choose ``export``; OSError whose strerror names the cause.

    All of it has one deadline: a server that sends byte by byte is a TimeoutError at ``until_s``.
    """
    server = _Server(connection, until_s)
    magic, option_magic, flags = _GREETING.unpack(server.receive(_GREETING.size))
    if magic != b"NBDMAGIC":
        raise _refused("what answers is no NBD server")
    if option_magic != b"IHAVEOPT" or not flags & _FIXED_NEWSTYLE:
        raise _refused("the server speaks only NBD's old negotiation")
    server.send(struct.pack(">I", flags & (_FIXED_NEWSTYLE | _NO_ZEROES)))
    name = export.encode()
    request = struct.pack(f">I{len(name)}sHH", len(name), name, 1, Info.BLOCK_SIZE)
    _send_option(server, Option.GO, request)
    answer = _go(server, export)
    if answer is None:
        _send_option(server, Option.EXPORT_NAME, name)
        size_bytes, export_flags = _EXPORT.unpack(server.receive(_EXPORT.size))
        if not flags & _NO_ZEROES:
            server.receive(_EXPORT_NAME_PADDING)
        answer = Export(size_bytes=size_bytes, flags=Transmission(export_flags))
    return answer


class _Server:
    """The other end of ``connection``, with one deadline ``until_s`` (time.monotonic) for all."""

    def __init__(self, connection: socket.socket, until_s: float) -> None:
        self._connection = connection
        self._until_s = until_s

    def send(self, data: bytes) -> None:
        """Send all of ``data``; OSError."""
        _limit_time(self._connection, self._until_s)
        self._connection.sendall(data)

    def receive(self, length: int) -> bytes:
        """Return exactly ``length`` bytes; OSError if the connection ends before."""
        data = bytearray()
        while len(data) < length:
            _limit_time(self._connection, self._until_s)
            piece = self._connection.recv(length - len(data))
            if not piece:
                raise OSError(errno.ECONNRESET, "the server closed the connection")
            data += piece
        return bytes(data)


def _go(server: _Server, export: str) -> Export | None:
    """Return the answer to NBD_OPT_GO; None if the server does not know that option."""
    size_bytes, flags = None, Transmission(0)
    block_size, max_payload = SECTOR_SIZE, MAX_PAYLOAD
    for _ in range(_MAX_REPLIES):
        kind, data = _receive_reply(server)
        if kind == Reply.ACK and size_bytes is not None:
            return Export(
                size_bytes=size_bytes, flags=flags, block_size=block_size, max_payload=max_payload
            )
        if kind == Reply.INFO and len(data) >= 2:
            info = int.from_bytes(data[:2], "big")
            if info == Info.EXPORT and len(data) == 2 + _EXPORT.size:
                size_bytes, export_flags = _EXPORT.unpack_from(data, 2)
                flags = Transmission(export_flags)
            elif info == Info.BLOCK_SIZE and len(data) == 2 + _BLOCK_SIZES.size:
                block_size, max_payload = _block_sizes(*_BLOCK_SIZES.unpack_from(data, 2))
        elif kind == Reply.ERR_UNSUP:
            return None
        elif kind >= 1 << 31:
            raise _refused(_refusal(kind, export, data))
        else:
            break
    raise _refused("the server's negotiation makes no sense")


def _block_sizes(minimum: int, _preferred: int, maximum: int) -> tuple[int, int]:
    """Return the block size and payload limit to keep, from the server's wishes."""
    if not minimum or minimum & (minimum - 1) or minimum > _MAX_MINIMUM_BLOCK:
        raise _refused(
            f"the server wants blocks of {minimum} bytes, the limit is {_MAX_MINIMUM_BLOCK}"
        )
    block_size = max(minimum, SECTOR_SIZE)
    max_payload = min(maximum, MAX_PAYLOAD) // block_size * block_size
    if not max_payload:
        raise _refused(f"the server takes no more than {maximum} bytes at once")
    return block_size, max_payload


def _refusal(kind: int, export: str, data: bytes) -> str:
    if kind == Reply.ERR_UNKNOWN:
        problem = f"the server has no export {export!r}"
    elif kind == Reply.ERR_TLS_REQD:
        problem = "the server wants TLS, which pyvmm does not speak"
    elif kind == Reply.ERR_POLICY:
        problem = "the server does not allow it"
    else:
        problem = f"the server refuses with error {kind - (1 << 31)}"
    said = data[:200].decode("utf-8", "replace").strip()
    safe = "".join(c if c.isprintable() else "?" for c in said)
    return f"{problem} ({safe})" if safe else problem


def _send_option(server: _Server, option: Option, data: bytes) -> None:
    server.send(_OPTION.pack(b"IHAVEOPT", option, len(data)) + data)


def _receive_reply(server: _Server) -> tuple[int, bytes]:
    """Return type and data of a reply to NBD_OPT_GO."""
    header = server.receive(_OPTION_REPLY.size)
    magic, option, kind, length = _OPTION_REPLY.unpack(header)
    if magic != _OPTION_REPLY_MAGIC or option != Option.GO or length > _MAX_REPLY_BYTES:
        raise _refused("the server's negotiation makes no sense")
    return kind, server.receive(length)


def _refused(problem: str) -> OSError:
    return OSError(errno.EPROTO, problem)
