"""Front ends come and go: who is let in, who is turned away, what happens to the others."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from pyvmm.vhost_user.protocol import U64, Request
from pyvmm.vhost_user.server import MAX_FRONTENDS
from pyvmm.vhost_user.session import MESSAGES_PER_TURN
from pyvmm.virtio.block import BlockConfig
from tests.support.patience import patient
from tests.support.vhost_rig import QUEUE_SIZE, ExportRig, held, open_fds
from tests.support.virtio_driver import readable, writable

IN, OUT = 0, 1
READ_ONLY = BlockConfig(queue_size=QUEUE_SIZE, read_only=True)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    before = held()
    with ExitStack() as stack:
        yield stack
    assert held() == before


def test_one_front_end_at_a_time_writes(tmp_path: Path, stack: ExitStack) -> None:
    rig = stack.enter_context(ExportRig(tmp_path / "s"))
    first = rig.connect()
    driver = first.start()
    second = rig.connect()
    assert second.is_closed()
    name = f"{rig.path}: front end (pid {os.getpid()})"
    assert rig.reports == [f"{name} is turned away: front end (pid {os.getpid()}) uses the disk"]
    assert driver.request(OUT, 1, data=b"z" * 512).status == 0
    first.hang_up()
    third = rig.connect()
    assert third.start().request(IN, 1, room=512).data == b"z" * 512
    assert len(rig.reports) == 1


def test_one_that_has_hung_up_is_in_nobodys_way(tmp_path: Path, stack: ExitStack) -> None:
    """Even if the server hears of it and of the next one at the same time."""
    rig = stack.enter_context(ExportRig(tmp_path / "s"))
    for _ in range(5):
        frontend = rig.connect()
        assert frontend.start().request(IN, 1, room=512).data == b"\1" * 512
        frontend.socket.close()
    assert rig.reports == []
    assert sum("connected" in note for note in rig.notes) == 5


def test_one_that_has_hung_up_with_much_unread_is_in_nobodys_way(
    tmp_path: Path, stack: ExitStack
) -> None:
    """Its last messages are more than are read in a turn, so that its end is not seen yet."""
    rig = stack.enter_context(ExportRig(tmp_path / "s"))
    frontend = rig.connect()
    with frontend.socket.dup() as other:
        other.sendall(b"\3\0\0\0\1\0\0\0\0\0\0\0" * 2 * MESSAGES_PER_TURN)  # SET_OWNER
    frontend.socket.close()
    assert rig.connect().start().request(IN, 1, room=512).data == b"\1" * 512
    assert rig.reports == []


def test_what_a_ring_holds_before_it_starts_is_served_without_a_kick(
    tmp_path: Path, stack: ExitStack
) -> None:
    """It may have been kicked before this export was there to hear of it."""
    rig = stack.enter_context(ExportRig(tmp_path / "s"))
    frontend = rig.connect()
    frontend.negotiate()
    frontend.share()
    driver = frontend.driver()
    frontend.set_up(driver)
    status = driver.status_byte()
    driver.place([
        readable(driver.header(IN, 1), 16), writable(driver.alloc(512), 512), writable(status, 1)
    ])  # fmt: skip
    frontend.run()
    assert [used.length for used in driver.reap()] == [513]
    assert frontend.calls() == 1


def test_many_read(tmp_path: Path, stack: ExitStack) -> None:
    rig = stack.enter_context(ExportRig(tmp_path / "s", config=READ_ONLY))
    drivers = [rig.connect().start() for _ in range(4)]
    for sector, driver in enumerate(drivers):
        assert driver.request(IN, sector, room=512).data == bytes([sector]) * 512
        assert driver.request(OUT, sector, data=b"z" * 512).status == 1


def test_a_crowd(tmp_path: Path, stack: ExitStack) -> None:
    rig = stack.enter_context(ExportRig(tmp_path / "s", config=READ_ONLY))
    sockets = []
    for _ in range(MAX_FRONTENDS + 2):
        sockets.append(stack.enter_context(socket.socket(socket.AF_UNIX)))
        sockets[-1].connect(rig.path)
        rig.turn()
    assert len(rig.reports) == 2
    assert rig.reports[0].endswith(" is turned away: 64 front ends use the disk")
    assert sockets[-1].recv(1) == b""
    for one in sockets:
        one.close()
    rig.turn()
    assert rig.connect().start().request(IN, 1, room=512).status == 0


def test_who_comes_and_goes_is_noted(tmp_path: Path, stack: ExitStack) -> None:
    rig = stack.enter_context(ExportRig(tmp_path / "s"))
    frontend = rig.connect()
    frontend.negotiate()
    frontend.hang_up()
    name = f"{rig.path}: front end (pid {os.getpid()})"
    assert rig.notes[0] == f"{name} connected"
    assert rig.notes[1].startswith(name)
    assert "hung up" in rig.notes[1]
    assert rig.reports == []


@contextmanager
def room_for_descriptors(count: int) -> Iterator[None]:
    """Let this process open ``count`` descriptors more, meanwhile."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(line.split()[0]) for line in open_fds())
    fillers: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + count, limits[1]))
    try:
        with suppress(OSError):
            while True:
                fillers.append(os.dup(0))
        for _ in range(count):
            os.close(fillers.pop())
        yield
    finally:
        for fd in fillers:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_no_file_descriptors_left(tmp_path: Path, stack: ExitStack) -> None:
    rig = stack.enter_context(ExportRig(tmp_path / "s", config=READ_ONLY))
    driver = rig.connect().start()
    caller = stack.enter_context(socket.socket(socket.AF_UNIX))
    caller.settimeout(patient(2))
    with room_for_descriptors(0):
        caller.connect(rig.path)
        rig.turn()
        assert rig.delay_s == 1.0  # not at once, again and again
        assert "nobody is let in for now: Too many open files" in rig.reports[0]
        assert driver.request(IN, 1, room=512).data == b"\1" * 512
    rig.now_s += 1
    rig.turn()
    caller.sendall(b"\x11\0\0\0\1\0\0\0\0\0\0\0")  # GET_QUEUE_NUM
    rig.turn()
    assert U64.unpack(caller.recv(100)[12:])[0] == 1
    assert len(rig.reports) == 1


def test_an_eventfd_that_cannot_be_kept(tmp_path: Path, stack: ExitStack) -> None:
    """This process may run out of file descriptors in the middle of a request."""
    rig = stack.enter_context(ExportRig(tmp_path / "s"))
    frontend = rig.connect()
    frontend.negotiate()
    frontend.share()
    driver = frontend.driver()
    frontend.set_up(driver)
    with room_for_descriptors(1):  # for the one that arrives, not for its duplicate
        call = [frontend.call_fds[0]]
        assert frontend.ack(Request.SET_VRING_CALL, U64.pack(0), call) == 1
    assert "SET_VRING_CALL: [Errno 24] Too many open files" in rig.reports[0]
    frontend.run()
    assert driver.request(IN, 1, room=512).data == b"\1" * 512


def test_close_hangs_up_and_takes_the_socket_away(tmp_path: Path, stack: ExitStack) -> None:
    rig = stack.enter_context(ExportRig(tmp_path / "s"))
    frontend = rig.connect()
    frontend.start()
    rig.server.close()
    rig.server.close()
    assert frontend.is_closed()
    assert not Path(rig.path).exists()
