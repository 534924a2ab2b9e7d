"""vhost-user messages and the socket they travel on (QEMU's docs/interop/vhost-user.rst).

A message is a header of three 32-bit words (request, flags, size of the payload), a payload and
up to 8 file descriptors as ancillary data, all in the machine's byte order.  Names are the
document's without VHOST_USER_.  ``Channel`` frames; what a message means is its users' matter.

The peer is not trusted.  Whatever it does wrong is one ``VhostUserError`` that names the socket
and the message, and every file descriptor it had sent along is closed.
"""

from __future__ import annotations

import array
import enum
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from pyvmm.errors import PeerClosedError, VhostUserError

MAX_FDS = 8
"""File descriptors of one message: "at most 8 descriptors in each message"."""
MAX_PAYLOAD = 4096
"""Bytes of one payload we take.  The largest in use is under 600: a table of 8 regions, or a
configuration space of 256 bytes."""
MAX_TABLE_REGIONS = 8
"""Regions of one SET_MEM_TABLE: each brings a file descriptor."""
MAX_CONFIG_BYTES = 256
"""Bytes of configuration space one GET_CONFIG or SET_CONFIG can be about."""
PROTOCOL_FEATURES = 1 << 30
"""VHOST_USER_F_PROTOCOL_FEATURES, among the virtio feature bits: there are protocol features."""

VERSION = 1
"""In bits 0 and 1 of a message's flags."""
VERSION_MASK = 3
REPLY = 1 << 2
NEED_REPLY = 1 << 3
"""With REPLY_ACK: the sender wants a u64 that is 0 for success."""

VRING_INDEX_MASK = 0xFF
VRING_NO_FD = 1 << 8
"""In the u64 of SET_VRING_KICK, _CALL and _ERR: no file descriptor comes along."""


class Request(enum.IntEnum):
    """ "Front-end message types": what a front end asks of a back end."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


class BackendRequest(enum.IntEnum):
    """ "Back-end message types": what a back end says of itself, over SET_BACKEND_REQ_FD."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5


class ProtocolFeature(enum.IntFlag):
    """ "Protocol features"."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16


HEADER = struct.Struct("=III")
"""Request, flags, bytes of payload."""
U64 = struct.Struct("=Q")
VRING_STATE = struct.Struct("=II")
"""Ring index, number."""
VRING_ADDR = struct.Struct("=IIQQQQ")
"""Ring index, flags, then user addresses: descriptor table, used ring, available ring; log.  A
packed ring's device area stands in the place of used, its driver area in that of available."""
MEM_TABLE = struct.Struct("=II")
"""SET_MEM_TABLE begins with: number of regions, padding; the regions follow."""
MEM_REGION = struct.Struct("=QQQQ")
SINGLE_MEM_REGION = struct.Struct("=8xQQQQ")
"""ADD_MEM_REG and REM_MEM_REG: 64 bits of padding, then a region."""
CONFIG = struct.Struct("=III")
"""GET_CONFIG and SET_CONFIG begin with: offset, size, flags; ``size`` bytes follow."""


class MemoryRegion(NamedTuple):
    """``size`` bytes of memory, from ``mmap_offset`` of a file descriptor on.

    They are at ``gpa`` for what descriptors say, and at ``user_address``, the front end's own
    address of them, for what SET_VRING_ADDR says.
    """

    gpa: int
    size: int
    user_address: int
    mmap_offset: int


class Message:
    """One message as it arrived.

    ``request`` may be a number nobody knows; ``name`` is for people.  ``fds`` belong to the
    message until ``take_fds``; whoever handles it calls ``close_fds`` at the end in any case.
    """

    __slots__ = ("fds", "flags", "name", "payload", "request")

    def __init__(
        self, request: int, flags: int, payload: bytes, fds: tuple[int, ...], name: str
    ) -> None:
        self.request = request
        self.flags = flags
        self.payload = payload
        self.fds = fds
        self.name = name

    @property
    def is_reply(self) -> bool:
        """Whether it answers a request."""
        return bool(self.flags & REPLY)

    @property
    def need_reply(self) -> bool:
        """Whether its sender asks for an acknowledgement; means something with REPLY_ACK only."""
        return bool(self.flags & NEED_REPLY)

    def take_fds(self) -> tuple[int, ...]:
        """The file descriptors, which are the caller's from now on."""
        fds, self.fds = self.fds, ()
        return fds

    def close_fds(self) -> None:
        """Close every file descriptor nobody took; idempotent."""
        _close_all(self.take_fds())


class Channel:
    """Messages over ``sock``, a connected Unix stream socket, which it owns.

    ``peer`` is how errors call it, ``requests`` what gives the numbers of messages their names.
    Once something has gone wrong the channel is out of step: every later call raises the same.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        peer: str = "vhost-user socket",
        requests: type[enum.IntEnum] = Request,
    ) -> None:
        self._socket = sock
        self._socket.setblocking(False)
        self.peer = peer
        self._requests = requests
        self._failure: VhostUserError | None = None
        # The message that is arriving.
        self._header: tuple[int, int, int] | None = None
        self._data = bytearray()
        self._fds: list[int] = []

    def fileno(self) -> int:
        """The socket, to wait on; -1 once closed."""
        return self._socket.fileno()

    @property
    def is_mid_message(self) -> bool:
        """Whether a part of a message has arrived, and the rest has not."""
        return self._header is not None or bool(self._data)

    def name_of(self, request: int) -> str:
        """The name of ``request``, or its number if it has none."""
        try:
            return self._requests(request).name
        except ValueError:
            return f"request {request}"

    def error(self, problem: str) -> VhostUserError:
        """An error that names this peer; it changes nothing."""
        return VhostUserError(self.peer, problem)

    def fail(self, problem: str, kind: type[VhostUserError] = VhostUserError) -> VhostUserError:
        """An error that names this peer, and is the channel's from now on."""
        self._drop_fds()
        self._failure = kind(self.peer, problem)
        return self._failure

    def unpack(self, message: Message, layout: struct.Struct) -> tuple[Any, ...]:
        """The payload of ``message`` as ``layout``; VhostUserError unless it has that size."""
        if len(message.payload) != layout.size:
            raise self.error(
                f"{message.name}: payload of {len(message.payload)} bytes, not {layout.size}"
            )
        return layout.unpack(message.payload)

    # Sending

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        flags: int = 0,
        timeout_s: float = 0.0,
    ) -> None:
        """Send one message whole; ``flags`` are REPLY and NEED_REPLY.

        ``fds`` stay the caller's.  A peer that does not read has ``timeout_s`` to make room,
        then it is a VhostUserError; PeerClosedError if it has hung up.
        """
        self._check()
        deadline_s = time.monotonic() + timeout_s
        name = self.name_of(request)
        data = memoryview(HEADER.pack(request, flags | VERSION, len(payload)) + payload)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while data:
            try:
                sent = self._socket.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                if not self._wait(select.POLLOUT, deadline_s):
                    raise self.fail(f"{name}: the peer does not read what it is sent") from None
            except (BrokenPipeError, ConnectionResetError):
                raise self.fail(f"the peer has hung up, before {name}", PeerClosedError) from None
            except OSError as error:
                raise self.fail(f"{name} cannot be sent: {error}") from error
            else:
                data, ancillary = data[sent:], []

    # Receiving

    def receive(self, timeout_s: float, *, what: str = "") -> Message:
        """The next message, which has ``timeout_s`` to arrive whole.

        VhostUserError, in which ``what`` says what was due, if it does not come or is malformed;
        PeerClosedError if the peer has hung up.
        """
        deadline_s = time.monotonic() + timeout_s
        while (message := self.poll(what=what)) is None:
            if not self._wait(select.POLLIN, deadline_s):
                part = " whole" if self.is_mid_message else ""
                due = what or "a message"
                raise self.fail(f"{due} did not come{part} within {timeout_s:g} s")
        return message

    def poll(self, *, what: str = "") -> Message | None:
        """The next message if all of it is here; never waits, and keeps what has come so far.

        Errors are those of ``receive``.
        """
        self._check()
        if self._header is None:
            if not self._fill(HEADER.size, what):
                return None
            request, flags, size = self._header = HEADER.unpack(self._data)
            self._data = bytearray()
            if flags & VERSION_MASK != VERSION:
                raise self.fail(
                    f"{self.name_of(request)}: protocol version {flags & VERSION_MASK},"
                    f" not {VERSION}"
                )
            if size > MAX_PAYLOAD:
                raise self.fail(
                    f"{self.name_of(request)}: payload of {size} bytes, the limit is {MAX_PAYLOAD}"
                )
        request, flags, size = self._header
        if not self._fill(size, what):
            return None
        message = Message(
            request, flags, bytes(self._data), tuple(self._fds), self.name_of(request)
        )
        self._header, self._data, self._fds = None, bytearray(), []
        return message

    def _fill(self, size: int, what: str) -> bool:
        """Whether ``size`` bytes of the arriving message are here, after a look at the socket.

        Never reads beyond them, because what comes next may bring file descriptors of its own.
        """
        while (missing := size - len(self._data)) > 0:
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(
                    missing, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return False
            except ConnectionResetError:
                data, ancillary, flags = b"", [], 0
            except OSError as error:
                raise self.fail(f"{what or 'a message'} cannot be received: {error}") from error
            for level, kind, raw in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds = array.array("i")
                    fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
                    self._fds += fds
            if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_FDS:
                raise self.fail(
                    f"{what or 'a message'}: more file descriptors than {MAX_FDS}, or than this"
                    " process can open"
                )
            if not data:
                due = f", {what} was due" if what else ""
                part = " in the middle of a message" if self.is_mid_message else ""
                raise self.fail(f"the peer has hung up{part}{due}", PeerClosedError)
            self._data += data
        return True

    def _wait(self, event: int, deadline_s: float) -> bool:
        """Sleep until ``event`` or the deadline; False if that has passed."""
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            return False
        poller = select.poll()
        poller.register(self._socket, event)
        poller.poll(left_s * 1000)
        return True

    # Ends

    def _check(self) -> None:
        """Raise what went wrong before, once more."""
        if self._failure is not None:
            raise type(self._failure)(self._failure.peer, self._failure.problem)

    def _drop_fds(self) -> None:
        fds, self._fds = self._fds, []
        _close_all(fds)

    def close(self) -> None:
        """Hang up; idempotent.  Calls after it are errors."""
        if self._failure is None:
            self._failure = self.error("the connection is closed")
        self._drop_fds()
        self._socket.close()


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
