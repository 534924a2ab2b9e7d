"""The front end: hands virtqueues of ours to a back end that listens on a Unix socket.

The back end is not trusted.  Every reply has a deadline and is checked.  If the back end breaks
the protocol or hangs up, that is one ``VhostUserError``, and every later call raises it again.
Only a new connection helps.  A ``RequestRefusedError`` changes nothing.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from types import TracebackType
from typing import Any

from pyvmm.errors import PeerClosedError, RequestRefusedError, VhostUserError
from pyvmm.peers.unix_socket import connect_unix
from pyvmm.vhost_user.channel import Channel, Message
from pyvmm.vhost_user.hints import why_no_connection
from pyvmm.vhost_user.protocol import (
    CONFIG,
    MAX_CONFIG_BYTES,
    MAX_TABLE_REGIONS,
    MEM_REGION,
    MEM_TABLE,
    NEED_REPLY,
    PROTOCOL_FEATURES,
    SINGLE_MEM_REGION,
    U64,
    VRING_ADDR,
    VRING_INDEX_MASK,
    VRING_STATE,
    MemoryRegion,
    ProtocolFeature,
    Request,
)

TIMEOUT_S = 5.0
"""Seconds that a back end may take for an answer."""
STOP_TIMEOUT_S = 30.0
"""Seconds that it may take to stop a queue: it finishes the requests that it has begun."""
HANDSHAKE_TIMEOUT_S = 30.0
"""Seconds for the whole handshake: each single answer might come just in time."""
_NO_ANSWER = "is that a vhost-user back end?"
_HUNG_UP_AT_ONCE = "most back ends serve one front end at a time: this may be in use"

_WANTED = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.CONFIG
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)


class Frontend:
    """A session with the back end behind ``channel``, which it owns; begins with the handshake.

    VhostUserError if that fails.  May be used from several threads: one exchange at a time.  Every
    command has taken effect when its method returns: the back end acknowledged it (REPLY_ACK) or
    has answered a later request.

    ``features`` are the virtio feature bits on offer, ``max_queues`` and ``max_mem_regions`` the
    most that the back end takes of each.  The handshake has HANDSHAKE_TIMEOUT_S, and ends at
    ``latest_s`` (time.monotonic).  That also limits every later wait, until ``limit_waits``.
    """

    def __init__(
        self,
        channel: Channel,
        *,
        timeout_s: float = TIMEOUT_S,
        stop_timeout_s: float = STOP_TIMEOUT_S,
        latest_s: float = float("inf"),
    ) -> None:
        self._channel = channel
        self._timeout_s = timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._lock = threading.Lock()
        # With the file descriptor, if SET_MEM_TABLE needs it again; ADD_MEM_REG needs it only once.
        self._regions: dict[MemoryRegion, int | None] = {}
        try:
            channel.limit_waits(_handshake_end(latest_s))
            self._shake_hands()
            channel.limit_waits(latest_s)
        except BaseException:
            channel.close()
            raise

    @classmethod
    def connect(
        cls,
        path: str,
        *,
        timeout_s: float = TIMEOUT_S,
        stop_timeout_s: float = STOP_TIMEOUT_S,
        latest_s: float = float("inf"),
    ) -> Frontend:
        """Return a session with the back end that listens on the Unix socket ``path``.

        VhostUserError if there is none or the handshake fails.
        """
        if not path:
            raise VhostUserError("vhost-user socket", "its path is empty")
        until_s = min(time.monotonic() + timeout_s, _handshake_end(latest_s))
        try:
            connection = connect_unix(path, until_s)
        except OSError as error:
            reason = why_no_connection(path, error)
            raise VhostUserError(path, f"cannot connect to the vhost-user socket: {reason}") \
                from error
        channel = Channel(connection, peer=path, who="the back end")
        return cls(
            channel, timeout_s=timeout_s, stop_timeout_s=stop_timeout_s,
            latest_s=latest_s,
        )

    def limit_waits(self, latest_s: float) -> None:
        """Let no wait for the back end last beyond ``latest_s`` (time.monotonic).

        A wait that is under way in another thread ends then, too.  From any thread.
        """
        self._channel.limit_waits(latest_s)

    def _shake_hands(self) -> None:
        self.protocol_features = ProtocolFeature(0)
        self.max_queues = 1
        self.max_mem_regions = MAX_TABLE_REGIONS
        try:
            self._channel.send(Request.SET_OWNER, timeout_s=self._timeout_s)
            features = self._get(Request.GET_FEATURES)
        except PeerClosedError as error:
            raise PeerClosedError(error.peer, f"{error.problem} ({_HUNG_UP_AT_ONCE})") from None
        except VhostUserError as error:
            raise VhostUserError(error.peer, f"{error.problem} ({_NO_ANSWER})") from None
        self.features = features & ~PROTOCOL_FEATURES
        # Acknowledging the bit means that rings start disabled, until SET_VRING_ENABLE.
        self._session_features = features & PROTOCOL_FEATURES
        if not self._session_features:
            return
        offered = self._get(Request.GET_PROTOCOL_FEATURES)
        chosen = ProtocolFeature(offered & _WANTED)
        self._channel.send(
            Request.SET_PROTOCOL_FEATURES, U64.pack(chosen), timeout_s=self._timeout_s
        )
        self.protocol_features = chosen
        if chosen & ProtocolFeature.MQ:
            # SET_VRING_KICK has 8 bits for the index of a queue.
            queues = self._get(Request.GET_QUEUE_NUM, least=1)
            self.max_queues = min(queues, VRING_INDEX_MASK + 1)
        if chosen & ProtocolFeature.CONFIGURE_MEM_SLOTS:
            self.max_mem_regions = self._get(Request.GET_MAX_MEM_SLOTS, least=1)

    @property
    def peer(self) -> str:
        """The back end's socket, for messages."""
        return self._channel.peer

    # The device

    def get_config(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes of the device's configuration space from ``offset`` (GET_CONFIG).

        The request is always for the space's beginning, because back ends on libvhost-user ignore
        the offset.  RequestRefusedError if the back end has no such bytes.
        """
        end = offset + length
        if offset < 0 or length < 0 or end > MAX_CONFIG_BYTES:
            raise ValueError(f"configuration {offset}+{length}: the limit is {MAX_CONFIG_BYTES}")
        self._need_config()
        with self._lock:
            request = Request.GET_CONFIG
            self._send(request, CONFIG.pack(0, end, 0) + bytes(end))
            payload = self._receive(request, self._timeout_s).payload
            if not payload:
                raise RequestRefusedError(
                    self.peer, f"GET_CONFIG: the back end has no {end} bytes of configuration"
                )
            if len(payload) != CONFIG.size + end:
                raise self._channel.fail(
                    f"GET_CONFIG: reply of {len(payload)} bytes, not {CONFIG.size + end}"
                )
            if CONFIG.unpack_from(payload)[:2] != (0, end):
                raise self._channel.fail("GET_CONFIG: the reply is about other bytes")
            return payload[CONFIG.size + offset :]

    def set_config(self, offset: int, data: bytes) -> None:
        """Write ``data``, from the driver, at ``offset`` of the configuration space
        (SET_CONFIG)."""
        self._need_config()
        self._command(Request.SET_CONFIG, CONFIG.pack(offset, len(data), 0) + data)

    def _need_config(self) -> None:
        if not self.protocol_features & ProtocolFeature.CONFIG:
            raise VhostUserError(
                self.peer, "the back end does not offer its configuration space (CONFIG)"
            )

    def set_features(self, features: int) -> None:
        """Pass on that the driver accepts ``features``, which were all offered (SET_FEATURES)."""
        self._command(Request.SET_FEATURES, U64.pack(features | self._session_features))

    # Memory

    def add_region(self, region: MemoryRegion, fd: int) -> None:
        """Share ``region``, which ``fd`` holds; ``fd`` stays the caller's.

        ADD_MEM_REG, or SET_MEM_TABLE with all regions for a back end without
        CONFIGURE_MEM_SLOTS.  VhostUserError if there are ``max_mem_regions`` already.
        """
        if region in self._regions:
            raise ValueError(f"{region} is shared already")
        if len(self._regions) >= self.max_mem_regions:
            raise VhostUserError(
                self.peer, f"the back end takes no more than {self.max_mem_regions} memory regions"
            )
        if self._has_mem_slots:
            self._command(Request.ADD_MEM_REG, SINGLE_MEM_REGION.pack(*region), (fd,))
            self._regions[region] = None
            return
        copy = os.dup(fd)
        try:
            self._set_mem_table({**self._regions, region: copy})
        except BaseException:
            os.close(copy)
            raise
        self._regions[region] = copy

    def remove_region(self, region: MemoryRegion) -> None:
        """Take back ``region``, which was added: once this returns the back end has unmapped it."""
        if region not in self._regions:
            raise ValueError(f"{region} is not shared")
        if self._has_mem_slots:
            self._command(Request.REM_MEM_REG, SINGLE_MEM_REGION.pack(*region))
        else:
            self._set_mem_table({one: fd for one, fd in self._regions.items() if one != region})
        _close(self._regions.pop(region))

    @property
    def _has_mem_slots(self) -> bool:
        return bool(self.protocol_features & ProtocolFeature.CONFIGURE_MEM_SLOTS)

    def _set_mem_table(self, regions: dict[MemoryRegion, int | None]) -> None:
        table = [MEM_TABLE.pack(len(regions), 0), *(MEM_REGION.pack(*region) for region in regions)]
        fds = [fd for fd in regions.values() if fd is not None]
        self._command(Request.SET_MEM_TABLE, b"".join(table), tuple(fds))

    # Queues

    def start_queue(
        self,
        index: int,
        *,
        size: int,
        descriptor: int,
        driver: int,
        device: int,
        base: int,
        kick_fd: int,
        call_fd: int,
    ) -> None:
        """Hand over queue ``index`` of ``size`` entries, and let the back end serve it.

        ``descriptor``, ``driver`` and ``device`` are the user addresses of its areas, in regions
        that were added.  ``kick_fd`` and ``call_fd`` are eventfds and stay the caller's.

        ``base`` is the ring's position (SET_VRING_BASE): for a split ring the next available
        index.  For a packed one bits 0 to 14 are the next available slot, 15 its wrap counter, 16
        to 30 the next used slot, 31 its wrap counter.  So a fresh one has 0x80008000.
        """
        self._command(Request.SET_VRING_NUM, VRING_STATE.pack(index, size))
        self._command(Request.SET_VRING_BASE, VRING_STATE.pack(index, base))
        self._command(
            Request.SET_VRING_ADDR, VRING_ADDR.pack(index, 0, descriptor, device, driver, 0)
        )
        # The call first: the ring starts with the kick, and may be answered at once.
        self._command(Request.SET_VRING_CALL, U64.pack(index), (call_fd,))
        self._command(Request.SET_VRING_KICK, U64.pack(index), (kick_fd,))
        if self._session_features:
            self._command(Request.SET_VRING_ENABLE, VRING_STATE.pack(index, 1))

    def stop_queue(self, index: int) -> int:
        """Take queue ``index`` back; return its ring's position as ``base`` of ``start_queue``.

        By then the back end has answered every request that it had taken, and touches the ring no
        more (GET_VRING_BASE).
        """
        with self._lock:
            self._send(Request.GET_VRING_BASE, VRING_STATE.pack(index, 0))
            stopped, base = self._reply(
                Request.GET_VRING_BASE, VRING_STATE, self._stop_timeout_s
            )
            if stopped != index:
                raise self._channel.fail(
                    f"GET_VRING_BASE: the reply is about queue {stopped}, not {index}"
                )
            return int(base)

    # The connection

    def fileno(self) -> int:
        """The socket.  It is readable once the back end has gone: then call ``check``."""
        return self._channel.fileno()

    def check(self) -> None:
        """Look, without waiting, if the back end is still there.

        Call this from time to time, or when the socket is readable.  PeerClosedError if it has hung
        up, VhostUserError if it sends a message that nobody has asked for.
        """
        with self._lock:
            message = self._channel.poll()
            if message is not None:
                message.close_fds()
                raise self._channel.fail(f"{message.name}: nobody has asked for it")

    def close(self) -> None:
        """Hang up, which ends every queue; idempotent."""
        self._channel.close()
        while self._regions:
            _close(self._regions.popitem()[1])

    def __enter__(self) -> Frontend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # Exchanges; the lock is held

    def _command(self, request: Request, payload: bytes, fds: tuple[int, ...] = ()) -> None:
        """Have the back end do ``request``; RequestRefusedError if it answers that it cannot."""
        with self._lock:
            if self.protocol_features & ProtocolFeature.REPLY_ACK:
                self._send(request, payload, fds, flags=NEED_REPLY)
                (status,) = self._reply(request, U64, self._timeout_s)
                if status:
                    raise RequestRefusedError(
                        self.peer, f"{request.name}: the back end refuses it (status {status:#x})"
                    )
            else:
                # Messages are handled in order: an answer to a later one tells that this one was.
                self._send(request, payload, fds)
                self._get(Request.GET_FEATURES)

    def _get(self, request: Request, *, least: int = 0) -> int:
        """Return the number that ``request`` asks for; an error if it is below ``least``."""
        self._send(request)
        (value,) = self._reply(request, U64, self._timeout_s)
        if value < least:
            raise self._channel.fail(f"{request.name}: {value} is less than {least}")
        return int(value)

    def _send(
        self, request: Request, payload: bytes = b"", fds: tuple[int, ...] = (), *, flags: int = 0
    ) -> None:
        self._channel.send(request, payload, fds, flags=flags, timeout_s=self._timeout_s)

    def _reply(
        self, request: Request, layout: struct.Struct, timeout_s: float
    ) -> tuple[Any, ...]:
        """Return the back end's answer to ``request``, taken apart."""
        message = self._receive(request, timeout_s)
        try:
            return self._channel.unpack(message, layout)
        except VhostUserError as error:
            raise self._channel.fail(error.problem) from None

    def _receive(self, request: Request, timeout_s: float) -> Message:
        """Return the reply to ``request``; its payload is not checked yet."""
        message = self._channel.receive(timeout_s, what=f"the reply to {request.name}")
        if message.fds:
            message.close_fds()
            raise self._channel.fail(f"{request.name}: the reply brings file descriptors")
        if not message.is_reply or message.request != request:
            kind = "reply to " if message.is_reply else "request "
            raise self._channel.fail(f"{request.name}: answered by the {kind}{message.name}")
        return message


def _handshake_end(latest_s: float) -> float:
    return min(latest_s, time.monotonic() + HANDSHAKE_TIMEOUT_S)


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)
