"""Our NBD client and a wicked server: the handshake, and the answers to requests"""

from __future__ import annotations

import contextlib
import queue
import shutil
import socket
import struct
import tempfile
import threading
import time
from pathlib import Path

from fuzz.checks import check_printable
from fuzz.source import Source
from fuzz.target import Target
from pyvmm.errors import ConfigError
from pyvmm.storage.backend import BlockBackend
from pyvmm.storage.nbd import NbdBackend
from tests.support.nbd_servers import GREETING, option_reply
from tests.support.vhost_rig import open_fds

_TIMEOUT_S = 0.3
_DISK_BYTES = 64 * 512
_MOST_STEPS = 8
_NEVER = 0xFFFF
_MOST_REPORTS = 8
"""A line for each kind of request that fails, for the connection, and for what is odd."""
_ERRORS = (0, 0, 0, 0, 1, 5, 12, 22, 28, 75, 95, 108, 7, 0xFFFF_FFFF)

Script = list[tuple[bytes, float]]
"""The parts that a server sends, and its pause behind each."""


class NbdTarget(Target):
    """A server's lies end in a ConfigError at the start, in an OSError later."""

    is_structured = True
    is_guided = False
    """A thread of ours plays the server."""
    max_bytes = 1024
    limit_s = 4.0

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="pyvmm-fuzz-")
        self._path = str(Path(self._folder) / "nbd.sock")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self._path)
        self._listener.listen()
        self._scripts: queue.Queue[Script] = queue.Queue()
        self._served: queue.Queue[None] = queue.Queue()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            script = self._scripts.get()
            connection, _ = self._listener.accept()
            with connection, contextlib.suppress(OSError):  # the client has had enough
                for piece, pause_s in script:
                    connection.sendall(piece)
                    time.sleep(pause_s)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):
                    pass
            self._served.put(None)

    def run(self, data: bytes) -> None:
        """Use the disk of the server that ``data`` describes."""
        source = Source(data)
        before = open_fds()
        uri = f"nbd+unix:///export?socket={self._path}"
        steps = [source.number(0, 5) for _ in range(source.number(0, _MOST_STEPS))]
        self._scripts.put(_handshake(source) + _answers(source, steps))
        reports: list[str] = []
        read_only = source.chance(64)
        try:
            disk = NbdBackend(uri, read_only=read_only, report=reports.append,
                              timeout_s=_TIMEOUT_S)
        except ConfigError as error:
            check_printable(error)
            disk = None
        if disk is not None:
            assert disk.size_bytes % disk.block_size == 0
            assert disk.block_size in (512, 1024, 2048, 4096), disk.block_size
            assert disk.size_bytes > 0
            for step in steps:
                _use(disk, step)
            disk.close()
        self._served.get()
        assert len(reports) <= _MOST_REPORTS, reports
        assert all(line.isprintable() for line in reports), reports
        # The descriptor of the server's connection may still be about to be closed.
        assert len(open_fds()) <= len(before) + 1, "descriptors were left behind"

    def close(self) -> None:
        """See ``Target.close``."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _use(disk: BlockBackend, step: int) -> None:
    """One request; an OSError is an answer."""
    buffer = memoryview(bytearray(1024))
    with contextlib.suppress(OSError):
        match step:
            case 0:
                disk.readv([buffer[:512], buffer[512:]], 0)
            case 1:
                disk.writev([buffer], 0)
            case 2:
                disk.writev([buffer[:512]], 512, durable=True)
            case 3:
                disk.flush()
            case 4:
                disk.discard(0, 4096)
            case 5:
                disk.write_zeroes(0, 4096, unmap=True)


def _handshake(source: Source) -> Script:
    """Return what a server sends until the export is chosen."""
    greeting = GREETING + struct.pack(">H", source.pick((3, 3, 3, 1, 2, 0, _NEVER)))
    said: Script = [(_bent(source, greeting), _pause_s(source))]
    if source.chance(40):  # it does not know NBD_OPT_GO
        said.append((option_reply((1 << 31) + 1), 0.0))
        export = struct.pack(">QH", _size(source), source.bits(16))
        said.append((_bent(source, export + bytes(source.pick((0, 124)))), 0.0))
        return said
    for _ in range(source.number(0, 3)):
        said.append((_bent(source, _information(source)), _pause_s(source)))
    good = option_reply(3, struct.pack(">HQH", 0, _size(source), source.pick((0x6D, 0x1, 0xFFFF))))
    said.append((_bent(source, good), _pause_s(source)))
    kind = 1 if source.chance(230) else source.edge(1, 3, 1 << 31, bits=32)
    said.append((_bent(source, option_reply(kind, source.take(source.bits(3)))), 0.0))
    return said


def _information(source: Source) -> bytes:
    """One option reply of information."""
    if source.chance(128):
        sizes = [source.edge(512, 4096, 1536, 1 << 25, bits=32) for _ in range(3)]
        return option_reply(3, struct.pack(">HIII", 3, *sizes))
    return option_reply(source.edge(3, 2, 1 << 31, bits=32), source.take(source.bits(5)))


def _size(source: Source) -> int:
    return source.edge(0, 512, _DISK_BYTES, 1 << 63) if source.chance(48) else _DISK_BYTES


def _answers(source: Source, steps: list[int]) -> Script:
    """Return the answers of a server to the requests ``steps``."""
    said: Script = []
    cookie = 0
    for step in steps:
        for length in {0: (1024,), 2: (0, 0)}.get(step, (0,)):
            cookie += 1
            error = source.pick(_ERRORS)
            answer = struct.pack(">IIQ", 0x6744_6698, error, cookie)
            data = b"" if error or not length else source.take(8).ljust(length, b"\x11")
            said.append((_bent(source, answer + data), _pause_s(source)))
    return said


def _bent(source: Source, said: bytes) -> bytes:
    """``said``, or rarely something else."""
    if not source.chance(12):
        return said
    match source.number(0, 3):
        case 0:
            return said[: source.number(0, len(said))]
        case 1:
            at = source.number(0, max(0, len(said) - 1))
            return said[:at] + source.take(2) + said[at + 2 :]
        case 2:
            return source.take(source.bits(6))
        case _:
            return said + source.take(4)


def _pause_s(source: Source) -> float:
    return 0.002 if source.chance(4) else 0.0


def make() -> Target:
    """Return the target."""
    return NbdTarget()
