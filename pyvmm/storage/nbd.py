"""A disk on an NBD server, over TCP or a Unix socket (the protocol's doc/proto.md).

The client sends one request at a time and takes simple replies.  A lost connection stays lost:
the server may have dropped data that was not flushed, and a new connection could not tell.
"""

from __future__ import annotations

import errno
import os
import select
import struct
import time
from collections.abc import Callable, Sequence
from enum import IntEnum, IntFlag

from pyvmm.errors import ConfigError
from pyvmm.peers.wait_limit import WaitLimit
from pyvmm.storage.backend import (
    SECTOR_SIZE,
    BufferCursor,
    HostErrors,
    buffers_behind,
    check_range,
    read_only_error,
    write_real_zeroes,
)
from pyvmm.storage.nbd_handshake import (
    Export,
    Transmission,
    connect,
    negotiate,
)
from pyvmm.storage.nbd_uri import parse_nbd_uri

_IOV_MAX = os.sysconf("SC_IOV_MAX")
_REQUEST = struct.Struct(">IHHQQI")  # magic, flags, command, cookie, offset, length
_REQUEST_MAGIC = 0x2560_9513
_REPLY = struct.Struct(">IIQ")  # magic, error, cookie
_SIMPLE_REPLY_MAGIC = 0x6744_6698
_RANGE_MAX = 64 << 20
"""Bytes trimmed or zeroed at once: a server that writes the zeroes must answer in time too."""
TIMEOUT_S = 30.0
"""Seconds that a server may be silent before it counts as lost."""


class Command(IntEnum):
    """Request types."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6


_OPERATIONS = {
    Command.READ: "a read", Command.WRITE: "a write", Command.FLUSH: "a flush",
    Command.TRIM: "a discard", Command.WRITE_ZEROES: "zeroing",
}


class CommandFlag(IntFlag):
    """Command flags."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1


_NO_FLAGS = CommandFlag(0)

# Error values are Linux's on x86; a server may send only these.
_ERRORS = frozenset({
    errno.EPERM, errno.EIO, errno.ENOMEM, errno.EINVAL, errno.ENOSPC, errno.EOVERFLOW,
    errno.EOPNOTSUPP, errno.ESHUTDOWN,
})


_SLOWEST_BYTES_PER_S = 64 << 10
"""A server's least speed, beyond the time that it has for an answer."""


class NbdBackend:
    """The disk that ``uri`` names.

    ConfigError, naming ``uri``, if the server does not agree on a disk within ``timeout_s`` seconds
    and by ``open_until_s`` (time.monotonic).  ``report`` gets one line when the connection is lost;
    every operation fails from then on.
    """

    def __init__(
        self,
        uri: str,
        *,
        read_only: bool = False,
        report: Callable[[str], None],
        timeout_s: float = TIMEOUT_S,
        open_until_s: float | None = None,
    ) -> None:
        self.uri = uri
        self.read_only = read_only
        self._report = report
        self._errors = HostErrors(uri, report)
        self._timeout_s = timeout_s
        self._until_s = 0.0
        self._flush_errno = 0
        self._cookie = 0
        self.extra_calls = 0
        self.merges = False
        self._is_lost = False
        address = parse_nbd_uri(uri)
        now_s = time.monotonic()
        until_s = now_s + timeout_s
        if open_until_s is not None:
            until_s = max(now_s, min(until_s, open_until_s))
        try:
            self._connection = connect(address, until_s)
            try:
                export = negotiate(self._connection, address.export, until_s)
                _check_export(export, uri, read_only)
                self._connection.setblocking(False)
                self._limit = WaitLimit()
            except BaseException:
                self._connection.close()
                raise
        except TimeoutError as error:
            why = f": {error.strerror}" if error.strerror else ""
            raise ConfigError(
                uri, f"the server has not agreed on a disk within {until_s - now_s:.2g} s{why}"
            ) from error
        except OSError as error:
            raise ConfigError(uri, f"cannot be opened: {error.strerror or error}") from error
        self.size_bytes = export.size_bytes - export.size_bytes % export.block_size
        self.block_size = export.block_size
        self._max_payload = export.max_payload
        flags = export.flags
        self._can_flush = bool(flags & Transmission.SEND_FLUSH)
        self._can_fua = bool(flags & Transmission.SEND_FUA)
        self._can_zero = bool(flags & Transmission.SEND_WRITE_ZEROES)
        self.can_discard = not read_only and bool(flags & Transmission.SEND_TRIM)
        self.can_write_zeroes = not read_only and self._can_zero
        if not (self._can_flush or read_only):
            report(f"{uri}: its server knows no flush; a guest's flush makes nothing safe there")

    def readv(self, buffers: Sequence[memoryview], offset: int) -> None:
        """See ``BlockBackend.readv``."""
        for part, start, count in self._chunks(buffers, offset):
            self._request(Command.READ, start, count, into=part)

    def writev(
        self, buffers: Sequence[memoryview], offset: int, *, durable: bool = False
    ) -> None:
        """See ``BlockBackend.writev``; durable by FUA, or by a flush if the server has no FUA."""
        if self.read_only:
            raise read_only_error(self.uri)
        if durable:
            self._check_latch()
        chunks = self._chunks(buffers, offset)
        flags = CommandFlag.FUA if durable and self._can_fua else _NO_FLAGS
        try:
            for part, start, count in chunks:
                self._request(Command.WRITE, start, count, flags, data=part)
        except OSError as error:
            if flags:
                self._flush_errno = error.errno or errno.EIO
            raise
        if durable and not flags:
            self.flush()

    def flush(self) -> None:
        """See ``BlockBackend.flush``.  A server without flush has promised nothing."""
        self._check_latch()
        if not self._can_flush:
            return
        try:
            self._request(Command.FLUSH, 0, 0)
        except OSError as error:
            self._flush_errno = error.errno or errno.EIO
            raise

    def discard(self, offset: int, length: int) -> None:
        """See ``BlockBackend.discard``."""
        if self.read_only:
            raise read_only_error(self.uri)
        check_range(self.uri, offset, length, self.size_bytes)
        if self.can_discard:
            self._ranges(Command.TRIM, offset, length, _NO_FLAGS)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """See ``BlockBackend.write_zeroes``."""
        if self.read_only:
            raise read_only_error(self.uri)
        check_range(self.uri, offset, length, self.size_bytes)
        if self._can_zero:
            flags = _NO_FLAGS if unmap else CommandFlag.NO_HOLE
            self._ranges(Command.WRITE_ZEROES, offset, length, flags)
        else:
            write_real_zeroes(self, offset, length)

    def refresh_size(self) -> int:
        """Return the size, which NBD tells only once a connection."""
        return self.size_bytes

    def hurry(self, until_s: float) -> None:
        """See ``BlockBackend.hurry``: a request without an answer by then loses the connection."""
        self._limit.set(until_s)

    def close(self) -> None:
        """Tell the server that we leave, and close the connection; idempotent."""
        self._limit.close()
        if self._is_lost:
            return
        self._is_lost = True
        try:
            self._connection.sendall(
                _REQUEST.pack(_REQUEST_MAGIC, 0, Command.DISC, self._cookie, 0, 0)
            )
        except OSError:
            return  # then it has left before us
        finally:
            self._connection.close()

    def _chunks(
        self, buffers: Sequence[memoryview], offset: int
    ) -> list[tuple[Sequence[memoryview], int, int]]:
        """Return the transfer in pieces that the server takes: (buffers, offset, length)."""
        length = sum(map(len, buffers))
        check_range(self.uri, offset, length, self.size_bytes)
        if 0 < length <= self._max_payload:
            return [(buffers, offset, length)]
        chunks: list[tuple[Sequence[memoryview], int, int]] = []
        cursor = BufferCursor(buffers)
        for start in range(0, length, self._max_payload):
            count = min(self._max_payload, length - start)
            chunks.append((cursor.take(count), offset + start, count))
            self.extra_calls += 1
        return chunks

    def _ranges(self, command: Command, offset: int, length: int, flags: CommandFlag) -> None:
        for start in range(offset, offset + length, _RANGE_MAX):
            count = min(_RANGE_MAX, offset + length - start)
            self._request(command, start, count, flags)

    def _request(
        self,
        command: Command,
        offset: int,
        length: int,
        flags: CommandFlag = _NO_FLAGS,
        *,
        data: Sequence[memoryview] = (),
        into: Sequence[memoryview] = (),
    ) -> None:
        """Send a request and wait for its answer.

        OSError with the server's error, or with EIO if the connection is lost.
        """
        if self._is_lost:
            raise OSError(errno.EIO, "the connection is lost", self.uri)
        self._cookie += 1
        header = _REQUEST.pack(_REQUEST_MAGIC, flags, command, self._cookie, offset, length)
        # One deadline for the whole request: a server that drips bytes is as good as dead.
        self._until_s = time.monotonic() + self._timeout_s + length / _SLOWEST_BYTES_PER_S
        reply = bytearray(_REPLY.size)
        try:
            self._send([memoryview(header), *data])
            self._receive_into([memoryview(reply)])
            magic, error, cookie = _REPLY.unpack(reply)
            if magic != _SIMPLE_REPLY_MAGIC or cookie != self._cookie:
                raise OSError(errno.EPROTO, "the server's answer makes no sense")
            if not error:
                self._receive_into(into)
        except OSError as lost:
            self._lose(lost)
            raise OSError(errno.EIO, "the connection is lost", self.uri) from lost
        if error:
            number = error if error in _ERRORS else errno.EIO
            # Two error objects: one that is also a local would make a cycle that keeps the buffers.
            self._errors.say(_OPERATIONS[command], OSError(number, os.strerror(number)))
            raise OSError(number, os.strerror(number), self.uri)

    def _send(self, buffers: Sequence[memoryview]) -> None:
        missing = sum(map(len, buffers))
        while missing:
            try:
                done = self._connection.sendmsg(buffers[:_IOV_MAX])
            except BlockingIOError:
                self._wait(select.POLLOUT)
                continue
            missing -= done
            if missing:
                buffers = buffers_behind(buffers, done)

    def _receive_into(self, buffers: Sequence[memoryview]) -> None:
        missing = sum(map(len, buffers))
        while missing:
            try:
                done = self._connection.recvmsg_into(buffers[:_IOV_MAX])[0]
            except BlockingIOError:
                self._wait(select.POLLIN)
                continue
            if not done:
                raise OSError(errno.ECONNRESET, "the server closed the connection")
            missing -= done
            if missing:
                buffers = buffers_behind(buffers, done)

    def _wait(self, event: int) -> None:
        """Wait for the connection; TimeoutError once the request has no more time."""
        if not self._limit.wait(self._connection.fileno(), event, self._until_s):
            is_end = self._limit.latest_s < self._until_s
            raise TimeoutError(
                errno.ETIMEDOUT,
                "a request was unanswered at the end" if is_end else "timed out",
            )

    def _check_latch(self) -> None:
        if self._flush_errno:
            raise OSError(self._flush_errno, "an earlier flush failed", self.uri)

    def _lose(self, error: OSError) -> None:
        """Give the connection up and say so, once."""
        self._is_lost = True
        self._connection.close()
        why = error.strerror or str(error)
        is_end = self._limit.latest_s < float("inf")
        after = "" if is_end else "; the guest gets I/O errors from now on"
        self._report(f"{self.uri}: connection lost ({why}){after}")


def _check_export(export: Export, uri: str, read_only: bool) -> None:
    """Raise ConfigError unless the export can be this disk."""
    if export.size_bytes < max(SECTOR_SIZE, export.block_size) or export.size_bytes >= 1 << 63:
        raise ConfigError(
            uri, f"has {export.size_bytes} bytes, a disk has at least one block "
            f"of {max(SECTOR_SIZE, export.block_size)}"
        )
    if export.flags & Transmission.READ_ONLY and not read_only:
        raise ConfigError(uri, "cannot be written; attach it read-only by adding ,ro")
