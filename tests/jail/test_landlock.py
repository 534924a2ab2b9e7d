"""After ``forbid_all`` no path, no port, no abstract socket and no other process is in reach."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.jail import landlock, privileges
from tests.support.apart import apart, become_nobody, refuse_calls

CREATE_RULESET = 444


def abi() -> int:
    """Return the host's version of Landlock; 0 without one."""
    try:
        return landlock.abi()
    except OSError:
        return 0


needs_landlock = pytest.mark.skipif(not abi(), reason="this host has no Landlock")


def needs_abi(version: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(abi() < version, reason=f"this host's Landlock is not ABI {version}")


def enter() -> tuple[str, ...]:
    privileges.no_new_privileges()
    return landlock.forbid_all()


def refusal(attempt: Callable[[], object]) -> int:
    """Return the errno with which ``attempt`` fails; 0 if it works."""
    try:
        attempt()
    except OSError as error:
        return error.errno or -1
    return 0


@needs_landlock
def test_no_file_can_be_opened_made_or_removed(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_bytes(b"x")
    attempts: dict[str, Callable[[], object]] = {
        "read": lambda: os.open(old, os.O_RDONLY),
        "write": lambda: os.open(old, os.O_WRONLY),
        "list": lambda: os.listdir(tmp_path),
        "make a file": lambda: os.open(tmp_path / "new", os.O_WRONLY | os.O_CREAT),
        "make a directory": lambda: os.mkdir(tmp_path / "directory"),
        "make a pipe": lambda: os.mkfifo(tmp_path / "pipe"),
        "link": lambda: os.symlink("x", tmp_path / "link"),
        "remove": lambda: os.unlink(old),
        "remove a directory": lambda: os.rmdir(tmp_path),
        "rename": lambda: os.rename(old, tmp_path / "renamed"),
        "execute": lambda: os.execv("/bin/true", ["true"]),
        "a device": lambda: os.open("/dev/null", os.O_RDWR),
        "own memory": lambda: os.open("/proc/self/mem", os.O_RDWR),
    }

    def body(_: int) -> dict[str, int]:
        enter()
        return {name: refusal(attempt) for name, attempt in attempts.items()}

    assert apart(body) == dict.fromkeys(attempts, errno.EACCES)
    assert old.read_bytes() == b"x"


@needs_landlock
def test_files_that_are_open_stay_usable(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"old")

    def body(_: int) -> bytes:
        fd = os.open(path, os.O_RDWR)
        enter()
        data = os.pread(fd, 3, 0)
        os.ftruncate(fd, 10)
        os.pwrite(fd, b"new", 5)
        os.fsync(fd)
        return data

    assert apart(body) == b"old"
    assert path.read_bytes() == b"old\0\0new\0\0"


@needs_landlock
@needs_abi(3)
def test_no_file_can_be_truncated_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")

    def body(_: int) -> int:
        enter()
        return refusal(lambda: os.truncate(path, 0))

    assert apart(body) == errno.EACCES


@needs_landlock
@needs_abi(4)
def test_no_port_can_be_bound_or_connected_to() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()

        def body(_: int) -> tuple[int, int]:
            client, other = socket.socket(), socket.socket()
            enter()
            return (
                refusal(lambda: client.connect(address)),
                refusal(lambda: other.bind(("127.0.0.1", 0))),
            )

        assert apart(body) == (errno.EACCES, errno.EACCES)


@needs_landlock
@needs_abi(4)
def test_a_connection_that_is_there_stays() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        def body(_: int) -> bytes:
            client = socket.create_connection(server.getsockname())
            peer, _ = server.accept()
            enter()
            peer.send(b"data")
            return client.recv(4)

        assert apart(body) == b"data"


@needs_landlock
@needs_abi(6)
def test_no_abstract_socket_of_others_can_be_connected_to() -> None:
    name = f"\0pyvmm-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()

        def body(_: int) -> int:
            client = socket.socket(socket.AF_UNIX)
            enter()
            return refusal(lambda: client.connect(name))

        assert apart(body) == errno.EPERM


@needs_landlock
@needs_abi(6)
def test_signals_reach_only_this_process() -> None:
    def body(_: int) -> tuple[int, int, list[int]]:
        parent, got = os.getppid(), list[int]()
        signal.signal(signal.SIGUSR2, lambda number, _frame: got.append(number))
        enter()
        to_parent = refusal(lambda: os.kill(parent, 0))
        to_group = refusal(lambda: os.kill(1, 0))
        os.kill(os.getpid(), signal.SIGUSR2)
        main = threading.main_thread().ident
        assert main is not None
        kicker = threading.Thread(target=lambda: signal.pthread_kill(main, signal.SIGUSR2))
        kicker.start()
        kicker.join()
        return to_parent, to_group, got

    to_parent, to_first, got = apart(body)
    assert (to_parent, to_first) == (errno.EPERM, errno.EPERM)
    assert got == [signal.SIGUSR2] * 2


@needs_landlock
def test_it_holds_for_threads_that_start_later() -> None:
    def body(_: int) -> list[int]:
        enter()
        found: list[int] = []
        thread = threading.Thread(
            target=lambda: found.append(refusal(lambda: os.open("/", os.O_RDONLY)))
        )
        thread.start()
        thread.join()
        return found

    assert apart(body) == [errno.EACCES]


@needs_landlock
def test_it_needs_no_privilege_but_that_none_is_gained() -> None:
    def body(_: int) -> tuple[int, int]:
        become_nobody()
        before = refusal(landlock.forbid_all)
        enter()
        return before, refusal(lambda: os.open("/", os.O_RDONLY))

    assert apart(body) == (errno.EPERM, errno.EACCES)


@needs_landlock
def test_no_descriptor_is_left_of_it() -> None:
    def body(_: int) -> tuple[int, int]:
        privileges.no_new_privileges()
        before = os.dup(0)
        os.close(before)
        landlock.forbid_all()
        return before, os.dup(0)

    before, after = apart(body)
    assert before == after


@needs_landlock
@pytest.mark.parametrize("version", range(1, abi() + 1))
def test_an_older_kernel_forbids_what_it_can(
    version: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The kernel refuses a ruleset with a right that it does not know, so each needs its own."""
    monkeypatch.setattr(landlock, "abi", lambda: version)
    path = tmp_path / "file"
    path.write_bytes(b"x")

    def body(_: int) -> tuple[tuple[str, ...], int, int, int]:
        names = enter()
        return (
            names,
            refusal(lambda: os.open("/etc/passwd", os.O_RDONLY)),
            refusal(lambda: os.truncate(path, 0)),
            refusal(lambda: os.kill(os.getppid(), 0)),
        )

    names, reading, truncating, signalling = apart(body)
    assert reading == errno.EACCES
    assert truncating == (errno.EACCES if version >= 3 else 0)
    assert signalling == (errno.EPERM if version >= 6 else 0)
    assert ("TCP" in names) == (4 <= version < 10)
    assert ("signals to others" in names) == (version >= 6)


def test_a_newer_kernel_is_asked_only_for_rights_that_are_known() -> None:
    attributes = landlock._ATTRIBUTES.unpack(landlock._attributes(1000))
    assert attributes == ((1 << 17) - 1, 0b1111, 0b11)


def test_a_kernel_is_not_asked_for_rights_that_it_lacks() -> None:
    """Linux 6.1, as Debian 12 has it: its Landlock has ABI 2."""
    assert landlock._ATTRIBUTES.unpack(landlock._attributes(2)) == ((1 << 14) - 1, 0, 0)


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM])
def test_a_host_without_it_is_told(error: int) -> None:
    def body(_: int) -> int:
        refuse_calls(error, CREATE_RULESET)
        return refusal(landlock.forbid_all)

    assert apart(body) == error
