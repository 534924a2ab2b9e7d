"""Servers that say what no server should: never believed, never waited for, never a traceback."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.storage.nbd import NbdBackend
from tests.support.counted_buffers import CountedBuffers
from tests.support.nbd_servers import (
    GREETING,
    agree,
    export_info,
    greet,
    option_reply,
    read_exactly,
    reply,
    request,
    scripted,
)
from tests.support.patience import patient
from tests.support.raw_disks import room

Serve = Callable[[socket.socket], None]
ACK = option_reply(1)
ERR_UNSUP, ERR_TLS_REQD = (1 << 31) + 1, (1 << 31) + 5


def refusal(tmp_path: Path, serve: Serve) -> str:
    uri = f"nbd+unix:///?socket={tmp_path / 'socket'}"
    with scripted(tmp_path / "socket", serve), pytest.raises(ConfigError) as caught:
        NbdBackend(uri, report=print, timeout_s=patient(2))
    assert caught.value.subject == uri
    assert str(caught.value).isprintable()
    return caught.value.problem


@pytest.mark.parametrize(("greeting", "problem"), [
    (b"", "closed the connection"), (b"NBDMA", "closed the connection"),
    (b"HTTP/1.1 400 Bad Request\r\n\r\n", "no NBD server"),
    (b"NBDMAGIC" + bytes.fromhex("00420281861253") + bytes(300), "old negotiation"),
    (GREETING + b"\0\0", "old negotiation"), (GREETING + b"\0\1", "closed the connection"),
])
def test_greetings(tmp_path: Path, greeting: bytes, problem: str) -> None:
    def serve(connection: socket.socket) -> None:
        connection.sendall(greeting)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass

    assert problem in refusal(tmp_path, serve)


@pytest.mark.parametrize(("answer", "problem"), [
    (b"", "closed the connection"),
    (ACK, "makes no sense"),  # without having told the size
    (option_reply(17), "makes no sense"),
    (option_reply(1, option=6), "makes no sense"),
    (b"\0" * 20, "makes no sense"),
    (struct.pack(">QIII", 0x3E889045565A9, 7, 3, 0xFFFF_FFFF), "makes no sense"),
    (option_reply(3, b"\0") + ACK, "makes no sense"),
    (option_reply(3, b"\0\0short") + ACK, "makes no sense"),
    (option_reply(3, b"\0\7unknown") * 1000, "makes no sense"),
    (option_reply(ERR_TLS_REQD), "wants TLS"),
    (option_reply((1 << 31) + 2, b"go\x1b[2J\naway"), "does not allow it (go?[2J?away)"),
    (option_reply((1 << 31) + 99), "error 99"),
    (export_info(0, 1) + ACK, "has 0 bytes"),
    (export_info(1 << 63, 1) + ACK, "has 9223372036854775808 bytes"),
    (option_reply(3, struct.pack(">HIII", 3, 0, 0, 0)), "blocks of 0 bytes"),
    (option_reply(3, struct.pack(">HIII", 3, 1000, 0, 0)), "blocks of 1000 bytes"),
    (option_reply(3, struct.pack(">HIII", 3, 1, 4096, 100)), "no more than 100 bytes"),
])
def test_negotiations(tmp_path: Path, answer: bytes, problem: str) -> None:
    def serve(connection: socket.socket) -> None:
        greet(connection)
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass

    assert problem in refusal(tmp_path, serve)


@pytest.mark.parametrize("flags", [1, 3])
def test_a_server_that_does_not_know_go(tmp_path: Path, flags: int) -> None:
    """The export is chosen the older way; 124 zeroes follow unless both sides can do without."""

    def serve(connection: socket.socket) -> None:
        assert greet(connection, flags) == b"name"
        connection.sendall(option_reply(ERR_UNSUP))
        assert read_exactly(connection, 20) == b"IHAVEOPT" + struct.pack(">II", 1, 4) + b"name"
        connection.sendall(struct.pack(">QH", 8192, 5) + bytes(0 if flags & 2 else 124))
        _, command, cookie, offset, length = request(connection)
        assert (command, offset, length) == (0, 512, 512)
        connection.sendall(reply(cookie) + b"r" * 512)
        assert request(connection)[1] == 2  # it takes leave

    with (
        scripted(tmp_path / "socket", serve),
        closing(NbdBackend(
            f"nbd+unix:///name?socket={tmp_path / 'socket'}", report=print, timeout_s=patient(5)
        )) as disk,
    ):
        assert (disk.size_bytes, disk.can_discard, disk.can_write_zeroes) == (8192, False, False)
        buffers = room(512)
        disk.readv(buffers, 512)
        assert buffers[0] == b"r" * 512


def first_answer(tmp_path: Path, answer: Callable[[bytes], bytes]) -> tuple[OSError, list[str]]:
    """What a read of 512 bytes raises when it is answered by ``answer(cookie)``."""

    def serve(connection: socket.socket) -> None:
        agree(connection)
        connection.sendall(answer(request(connection)[2]))
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass

    reports: list[str] = []
    with (
        scripted(tmp_path / "socket", serve),
        closing(NbdBackend(
            f"nbd+unix:///?socket={tmp_path / 'socket'}", report=reports.append,
            timeout_s=patient(2),
        )) as disk,
        pytest.raises(OSError) as caught,  # noqa: PT011 (the test looks)
    ):
        disk.readv(room(512), 0)
    return caught.value, reports


@pytest.mark.parametrize("answer", [
    lambda cookie: b"",
    lambda cookie: reply(cookie)[:-1],
    lambda cookie: reply(cookie) + b"r" * 511,
    lambda cookie: bytes(16) + bytes(512),
    lambda cookie: reply(bytes(8)) + bytes(512),
    lambda cookie: struct.pack(">IHHQI", 0x668E33EF, 0, 1, 1, 0),  # structured, not agreed on
])
def test_answers_that_make_no_sense_end_it(
    tmp_path: Path, answer: Callable[[bytes], bytes]
) -> None:
    error, reports = first_answer(tmp_path, answer)
    assert "connection is lost" in str(error)
    assert len(reports) == 1


@pytest.mark.parametrize(("number", "name"), [
    (28, "No space"), (22, "Invalid argument"), (12345, "Input/output"), (2, "Input/output"),
])
def test_error_numbers(tmp_path: Path, number: int, name: str) -> None:
    error, reports = first_answer(tmp_path, lambda cookie: reply(cookie, number))
    assert name in str(error)
    assert len(reports) == 1
    assert f": a read failed: {name}" in reports[0]


def test_fault_7_a_read_in_many_requests_looks_at_each_buffer_once(tmp_path: Path) -> None:
    """A server that takes little at once."""
    def serve(connection: socket.socket) -> None:
        greet(connection)
        sizes = option_reply(3, struct.pack(">HIII", 3, 1, 512, 512))
        connection.sendall(export_info(64 * 512, 0x6D) + sizes + ACK)
        while True:
            _, command, cookie, offset, length = request(connection)
            if command == 2:
                return
            connection.sendall(reply(cookie) + bytes([offset // 512 + 1]) * length)

    ram = bytearray(64 * 512)
    buffers = CountedBuffers(memoryview(ram)[n : n + 256] for n in range(0, len(ram), 256))
    uri = f"nbd+unix:///?socket={tmp_path / 'socket'}"
    with scripted(tmp_path / "socket", serve), closing(NbdBackend(uri, report=print)) as disk:
        disk.readv(buffers, 0)
        assert disk.extra_calls >= 63
    assert ram == b"".join(bytes([n + 1]) * 512 for n in range(64))
    assert buffers.looks <= 2 * len(buffers), "once to measure it, once to fill it"


def test_a_failed_fua_write_is_latched(tmp_path: Path) -> None:
    def serve(connection: socket.socket) -> None:
        agree(connection)
        flags, command, cookie, _, length = request(connection)
        assert (flags, command) == (1, 1)
        read_exactly(connection, length)
        connection.sendall(reply(cookie, 5))
        assert request(connection)[1] == 2

    with (
        scripted(tmp_path / "socket", serve),
        closing(NbdBackend(
            f"nbd+unix:///?socket={tmp_path / 'socket'}", report=print, timeout_s=patient(5)
        )) as disk,
    ):
        with pytest.raises(OSError, match="Input/output"):
            disk.writev(room(512), 0, durable=True)
        with pytest.raises(OSError, match="earlier flush"):
            disk.flush()


def test_a_server_that_drips_is_given_up(tmp_path: Path) -> None:
    """Each byte comes well within the timeout; the answer does not."""

    def serve(connection: socket.socket) -> None:
        agree(connection)
        cookie = request(connection)[2]
        with contextlib.suppress(OSError):
            for byte in reply(cookie) + bytes(512):
                connection.sendall(bytes([byte]))
                time.sleep(0.05)

    reports: list[str] = []
    with (
        scripted(tmp_path / "socket", serve),
        closing(NbdBackend(
            f"nbd+unix:///?socket={tmp_path / 'socket'}", report=reports.append, timeout_s=0.3
        )) as disk,
    ):
        with pytest.raises(OSError, match="connection is lost"):
            disk.readv(room(512), 0)
        assert len(reports) == 1


@pytest.mark.parametrize("first", [b"", GREETING + b"\0\3"], ids=["greeting", "options"])
def test_fault_6_the_handshake_has_one_deadline(tmp_path: Path, first: bytes) -> None:
    """Each byte comes well within the timeout; an agreement does not."""

    def serve(connection: socket.socket) -> None:
        connection.sendall(first)
        with contextlib.suppress(OSError):
            for byte in (GREETING + b"\0\3")[len(first) :] + option_reply(3, bytes(1000)) * 100:
                connection.sendall(bytes([byte]))
                time.sleep(0.05)

    uri = f"nbd+unix:///?socket={tmp_path / 'socket'}"
    with scripted(tmp_path / "socket", serve), pytest.raises(ConfigError) as caught:
        NbdBackend(uri, report=print, open_until_s=time.monotonic() + 0.5)
    assert caught.value.problem == "the server has not agreed on a disk within 0.5 s"


def test_fault_6_a_server_that_reads_nothing(tmp_path: Path) -> None:
    """The client's own writes are under the deadline, too."""

    def serve(connection: socket.socket) -> None:
        connection.sendall(GREETING + b"\0\3")
        time.sleep(1)

    name = "x" * 4096
    uri = f"nbd+unix:///{name}?socket={tmp_path / 'socket'}"
    with scripted(tmp_path / "socket", serve), pytest.raises(ConfigError, match=r"within 0\.3 s"):
        NbdBackend(uri, report=print, open_until_s=time.monotonic() + 0.3)


def test_fault_6_a_full_backlog_is_waited_for_and_named(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(closing(socket.socket(socket.AF_UNIX)))
        listener.bind(str(path))
        listener.listen(0)
        waiting = stack.enter_context(closing(socket.socket(socket.AF_UNIX)))
        waiting.connect(str(path))
        with pytest.raises(ConfigError) as caught:
            NbdBackend(
                f"nbd+unix:///?socket={path}", report=print, open_until_s=time.monotonic() + 0.2
            )
        assert caught.value.problem == (
            "the server has not agreed on a disk within 0.2 s: whoever listens does not accept "
            "connections (its backlog is full)"
        )

        # Once there is room the client is let in.
        def make_room() -> None:
            time.sleep(0.2)
            listener.accept()[0].close()
            connection = listener.accept()[0]
            with closing(connection):
                agree(connection)
                connection.recv(100)

        thread = threading.Thread(target=make_room)
        thread.start()
        with closing(NbdBackend(f"nbd+unix:///?socket={path}", report=print)) as disk:
            assert disk.size_bytes == 64 * 512
        thread.join()


def test_fault_25_a_socket_path_that_is_too_long(tmp_path: Path) -> None:
    path = f"{tmp_path}/{'s' * 108}"
    with pytest.raises(ConfigError) as caught:
        NbdBackend(f"nbd+unix:///?socket={path}", report=print)
    assert caught.value.problem.endswith(f"its path has {len(path)} bytes, the limit is 107")


def test_fault_6_an_address_that_does_not_answer_leaves_time_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A host has an IPv6 address that goes nowhere, say, and one that serves."""
    with contextlib.ExitStack() as stack:
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        port: int = silent.getsockname()[1]
        for _ in range(3):  # its backlog is full, so the kernel answers nobody
            waiting = stack.enter_context(closing(socket.socket()))
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", port))
        listener = stack.enter_context(socket.create_server(("127.0.0.2", port)))

        def serve() -> None:
            with listener.accept()[0] as connection:
                agree(connection)
                connection.recv(100)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        found = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{last}", port))
            for last in (1, 1, 2)
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_how: found)
        uri = f"nbd://host:{port}/"
        until_s = time.monotonic() + patient(3)
        with closing(NbdBackend(uri, report=print, open_until_s=until_s)) as disk:
            assert disk.size_bytes == 64 * 512
        thread.join()

        del found[2:]
        with pytest.raises(ConfigError, match=r"within 0\.4 s: no answer from 127\.0\.0\.1"):
            NbdBackend(uri, report=print, open_until_s=time.monotonic() + 0.4)
