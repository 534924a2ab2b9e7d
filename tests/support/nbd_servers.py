"""Real NBD servers (Debian's nbdkit and qemu-utils), and one that says what a test wants."""

from __future__ import annotations

import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.patience import patient

GREETING = b"NBDMAGICIHAVEOPT"


@contextmanager
def nbdkit(socket_path: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """nbdkit on a Unix socket; ``arguments`` are filters, plugin and its parameters."""
    command = ["nbdkit", "--foreground", "--exit-with-parent", "-U", str(socket_path), *arguments]
    with _server(command, socket.AF_UNIX, str(socket_path)) as server:
        yield server


@contextmanager
def nbdkit_tcp(*arguments: str) -> Iterator[int]:
    """nbdkit on a TCP port of 127.0.0.1, which it yields."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    command = ["nbdkit", "--foreground", "--exit-with-parent", "-i", "127.0.0.1", "-p", str(port)]
    with _server([*command, *arguments], socket.AF_INET, ("127.0.0.1", port)):
        yield port


@contextmanager
def qemu_nbd(
    socket_path: Path, image: Path, *arguments: str
) -> Iterator[subprocess.Popen[bytes]]:
    """qemu-nbd serving ``image`` under the name "disk"."""
    command = ["qemu-nbd", "--persistent", "--format=raw", "--export-name=disk",
               f"--socket={socket_path}", *arguments, str(image)]
    with _server(command, socket.AF_UNIX, str(socket_path)) as server:
        yield server


@contextmanager
def _server(
    command: list[str], family: socket.AddressFamily, address: str | tuple[str, int]
) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command) as server:
        try:
            _wait_for(server, family, address)
            yield server
        finally:
            server.kill()


def _wait_for(
    server: subprocess.Popen[bytes],
    family: socket.AddressFamily,
    address: str | tuple[str, int],
) -> None:
    deadline = time.monotonic() + patient(20)
    while True:
        with socket.socket(family) as connection:
            try:
                connection.connect(address)
            except OSError:
                assert server.poll() is None, f"{server.args!r} ended at once"
                assert time.monotonic() < deadline, f"{server.args!r} does not listen"
                time.sleep(0.02)
            else:
                return


@contextmanager
def scripted(
    socket_path: Path, serve: Callable[[socket.socket], None]
) -> Iterator[None]:
    """A server that hands its one connection to ``serve`` and closes it when that returns."""

    def run() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(patient(10))
            try:
                serve(connection)
            except ConnectionError:
                return  # the client has had enough

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(socket_path))
        listener.listen()
        listener.settimeout(patient(10))
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            thread.join(patient(20))
            assert not thread.is_alive()


def read_exactly(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            raise ConnectionError("the client has left")
        data += piece
    return data


def greet(connection: socket.socket, flags: int = 3) -> bytes:
    """Greet, and take the client's flags and its NBD_OPT_GO; the name it asks for."""
    connection.sendall(GREETING + struct.pack(">H", flags))
    read_exactly(connection, 4)
    _, option, length = struct.unpack(">8sII", read_exactly(connection, 16))
    assert option == 7
    data = read_exactly(connection, length)
    return data[4 : 4 + int.from_bytes(data[:4], "big")]


def option_reply(kind: int, data: bytes = b"", option: int = 7) -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data


def export_info(size_bytes: int, flags: int) -> bytes:
    """NBD_REP_INFO with NBD_INFO_EXPORT."""
    return option_reply(3, struct.pack(">HQH", 0, size_bytes, flags))


def agree(connection: socket.socket, size_bytes: int = 64 * 512, flags: int = 0x6D) -> None:
    """A whole negotiation, well done; by default for a disk that can do everything."""
    greet(connection)
    connection.sendall(export_info(size_bytes, flags) + option_reply(1))


def request(connection: socket.socket) -> tuple[int, int, bytes, int, int]:
    """The next request's flags, command, cookie, offset and length; its data is left."""
    magic, flags, command, cookie, offset, length = struct.unpack(
        ">IHH8sQI", read_exactly(connection, 28)
    )
    assert magic == 0x25609513
    return flags, command, cookie, offset, length


def reply(cookie: bytes, error: int = 0) -> bytes:
    return struct.pack(">II8s", 0x67446698, error, cookie)
