"""Another user, and namespaces with an empty root: each is entered in a process of its own."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from pyvmm.errors import ConfigError
from pyvmm.jail.namespaces import Namespaces
from pyvmm.jail.root import MadeNamespaces, NextNamespaces, User, parse_user
from tests.support.apart import NOBODY, apart, become_nobody, refuse_calls

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has what is given up here")
PIVOT_ROOT, MOUNT, SETNS, UNSHARE = 155, 165, 308, 272
T = TypeVar("T")
KINDS = ("mnt", "net", "ipc", "uts")


def namespaces_of(pid: int | str = "self") -> list[str]:
    return [os.readlink(f"/proc/{pid}/ns/{kind}") for kind in KINDS]


def refusal(attempt: Callable[[], object]) -> str:
    """Return the name of the errno with which ``attempt`` fails; "" if it works."""
    try:
        attempt()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""


# The user.


@pytest.mark.parametrize(("text", "uid", "gid"), [
    ("1000:1001", 1000, 1001),
    ("4294967294:4294967294", 4294967294, 4294967294),
    ("daemon", 1, 1),
    ("1", 1, 1),
    ("daemon:bin", 1, 2),
    ("daemon:1234", 1, 1234),
    ("123456:bin", 123456, 2),
])
def test_a_user_is_a_name_or_a_number(text: str, uid: int, gid: int) -> None:
    assert parse_user(text) == User(uid, gid, text)


@pytest.mark.parametrize(("text", "problem"), [
    ("", "there is no user ''"),
    ("nobody-there", "there is no user 'nobody-there'"),
    ("-1", "there is no user '-1'"),
    ("4294967295", "there is no user '4294967295'"),
    ("a\0b", "there is no user 'a\\x00b'"),
    ("123456", "user 123456 has no name here, so no group; write 123456:GROUP"),
    ("daemon:", "there is no group ''"),
    ("daemon:no-group-there", "there is no group 'no-group-there'"),
    ("daemon:4294967295", "there is no group '4294967295'"),
    ("daemon:1:1", "there is no group '1:1'"),
    ("root", "is root, or root's group: choose another"),
    ("0:1", "is root, or root's group: choose another"),
    ("1:0", "is root, or root's group: choose another"),
    ("daemon:root", "is root, or root's group: choose another"),
])
def test_another_text_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_user(text)
    assert str(refused.value) == f"--user {text}: {problem}"


@needs_root
def test_root_becomes_the_user_for_good() -> None:
    def body(_: int) -> tuple[object, ...]:
        os.setgroups([5, 6])
        User(1234, 5678, "1234:5678").become()
        return (
            os.getresuid(), os.getresgid(), os.getgroups(),
            refusal(lambda: os.setresuid(0, 0, 0)), refusal(lambda: os.setresgid(0, 0, 0)),
            refusal(lambda: os.setgroups([0])),
        )

    assert apart(body) == ((1234,) * 3, (5678,) * 3, [], "EPERM", "EPERM", "EPERM")


@needs_root
def test_files_that_are_open_stay_usable(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"old")
    path.chmod(0o600)

    def body(_: int) -> tuple[bytes, str]:
        fd = os.open(path, os.O_RDWR)
        User(NOBODY, NOBODY, "nobody").become()
        os.pwrite(fd, b"new", 3)
        return os.pread(fd, 10, 0), refusal(lambda: os.open(path, os.O_RDONLY))

    assert apart(body) == (b"oldnew", "EACCES")


def test_a_user_cannot_become_another_one() -> None:
    def body(_: int) -> None:
        become_nobody()
        User(1234, 5678, "somebody").become()

    with pytest.raises(ConfigError, match=r"^--user somebody: needs root, with CAP_SETUID and"):
        apart(body)


def test_a_user_may_be_what_it_is() -> None:
    def body(_: int) -> tuple[int, int, int]:
        become_nobody()
        User(os.getuid(), os.getgid(), "me").become()
        return os.getresuid()

    assert len(set(apart(body))) == 1


@needs_root
def test_a_user_that_a_container_does_not_have_is_refused() -> None:
    def body(_: int) -> None:
        refuse_calls(errno.EINVAL, 119)  # setresgid
        User(1234, 5678, "somebody").become()

    with pytest.raises(ConfigError) as refused:
        apart(body)
    assert str(refused.value) == "--user somebody: Invalid argument (user 1234, group 5678)"


# The namespaces.


def in_namespaces(then: Callable[[], T], before: Callable[[], object] = lambda: None) -> T:
    """Return what ``then`` returns in a process that has entered namespaces of its own."""
    def body(_: int) -> T:
        before()
        Namespaces().enter()
        return then()

    return apart(body)


@needs_root
def test_the_root_is_empty_and_cannot_be_written() -> None:
    def look() -> list[object]:
        return [
            os.listdir("/"), os.getcwd(), os.listdir("/.."),
            refusal(lambda: os.mkdir("/x")), refusal(lambda: os.open("/x", os.O_CREAT)),
            refusal(lambda: os.stat("/proc")), refusal(lambda: os.chmod("/", 0o700)),
            os.stat("/").st_mode & 0o7777,
        ]

    assert in_namespaces(look) == [[], "/", [], "EROFS", "EROFS", "ENOENT", "EROFS", 0o500]


@needs_root
def test_the_network_is_empty() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()

        def look() -> tuple[list[str], str]:
            with socket.socket() as client:
                return [name for _, name in socket.if_nameindex()], refusal(
                    lambda: client.connect(address)
                )

        names, error = in_namespaces(look)
    assert "eth0" not in names
    assert error == "ENETUNREACH"


@needs_root
def test_a_connected_socket_and_an_open_file_stay(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"data")

    def body(_: int) -> tuple[bytes, bytes]:
        fd = os.open(path, os.O_RDONLY)
        with socket.create_server(("127.0.0.1", 0)) as server:
            client = socket.create_connection(server.getsockname())
            peer, _address = server.accept()
            Namespaces().enter()
            peer.send(b"sent")
            return client.recv(4), os.pread(fd, 4, 0)

    assert apart(body) == (b"sent", b"data")


@needs_root
def test_all_four_are_other_ones_than_the_hosts() -> None:
    def body(_: int) -> tuple[list[str], list[str]]:
        before = namespaces_of()
        proc = os.open("/proc/self/ns", os.O_RDONLY)
        Namespaces().enter()
        return before, [os.readlink(kind, dir_fd=proc) for kind in KINDS]

    before, after = apart(body)
    assert not set(before) & set(after)


@needs_root
def test_the_process_and_the_host_stay_as_they_are_until_it_enters() -> None:
    mounts = Path("/proc/self/mounts").read_text()

    def body(_: int) -> tuple[list[str], list[str], str, str]:
        before, place = namespaces_of(), os.getcwd()
        made = MadeNamespaces()
        made.wait()
        return before, namespaces_of(), place, os.getcwd()

    before, after, place_before, place = apart(body)
    assert (before, place_before) == (after, place)
    assert Path("/proc/self/mounts").read_text() == mounts
    assert in_namespaces(os.getcwd) == "/"
    assert Path("/proc/self/mounts").read_text() == mounts


@needs_root
def test_no_descriptor_is_left() -> None:
    def body(_: int) -> list[set[str]]:
        def descriptors() -> set[str]:
            return set(os.listdir(fds))

        fds = os.open("/proc/self/fd", os.O_RDONLY)
        found = [descriptors()]
        unused = MadeNamespaces()
        unused.close()
        unused.close()
        found.append(descriptors())
        Namespaces().enter()
        found.append(descriptors())
        return found

    before, closed, entered = apart(body)
    assert before == closed == entered


@needs_root
def test_an_initramfs_is_covered() -> None:
    """Its root cannot be pivoted away."""
    def look() -> list[object]:
        return [os.listdir("/"), os.listdir("/.."), refusal(lambda: os.mkdir("/x"))]

    found = in_namespaces(look, before=lambda: refuse_calls(errno.EINVAL, PIVOT_ROOT))
    assert found == [[], [], "EROFS"]


def test_a_process_that_may_not_make_them_is_told() -> None:
    """A user, and root in most containers."""
    with pytest.raises(PermissionError):
        in_namespaces(os.getcwd, before=become_nobody)


@needs_root
@pytest.mark.parametrize("kind", [Namespaces, MadeNamespaces])
@pytest.mark.parametrize("number", [UNSHARE, MOUNT, PIVOT_ROOT, SETNS])
def test_a_call_that_is_forbidden_is_told_and_nothing_is_left(
    number: int, kind: type[Namespaces]
) -> None:
    """Later steps of the jail still see the host's /proc."""
    def body(_: int) -> tuple[str, bool, bool]:
        fds = os.open("/proc/self/fd", os.O_RDONLY)
        before = set(os.listdir(fds))
        refuse_calls(errno.EPERM, number)
        made = kind()
        return (
            refusal(made.enter), set(os.listdir(fds)) == before, os.path.exists("/proc/self/task")
        )

    if number != SETNS or kind is MadeNamespaces:
        assert apart(body) == ("EPERM", True, True)


@needs_root
def test_they_can_be_made_before_anything_is_given_up() -> None:
    def body(_: int) -> tuple[bool, bool, list[str]]:
        before, made = namespaces_of(), Namespaces()
        made.check()
        are_others = not set(before) & set(namespaces_of())
        sees_files = os.path.exists("/proc/self/task")
        made.check()
        made.enter()
        return are_others, sees_files, os.listdir("/")

    assert apart(body) == (True, True, [])


@needs_root
def test_each_forked_process_has_namespaces_of_its_own() -> None:
    def body(_: int) -> tuple[list[str], list[int]]:
        following, entered = NextNamespaces(), list[str]()
        proc = os.open("/proc", os.O_RDONLY)
        descriptors, children = [], []
        for _turn in range(3):
            following.wait()
            out, into = os.pipe()
            pid = os.fork()
            if pid == 0:
                assert following.taken is not None
                following.taken.enter()
                os.write(into, os.readlink("thread-self/ns/net", dir_fd=proc).encode())
                signal.pause()
            children.append(pid)
            following.renew()
            entered.append(os.read(out, 100).decode())
            os.close(out)
            os.close(into)
            following.wait()
            descriptors.append(len(os.listdir("/proc/self/fd")))
        following.close()
        following.close()
        for pid in children:  # the number of a namespace that is gone is another's soon
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return [*entered, os.readlink("/proc/self/ns/net")], descriptors

    links, descriptors = apart(body)
    assert len(set(links)) == 4
    assert len(set(descriptors)) == 1


def test_a_user_forks_without_namespaces() -> None:
    def body(_: int) -> bool:
        become_nobody()
        following = NextNamespaces()
        following.wait()
        following.renew()
        following.close()
        return following.taken is None

    assert apart(body)


@needs_root
def test_no_thread_to_make_them_is_as_if_they_could_not_be_made(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert refusal(MadeNamespaces().enter) == "EAGAIN"
