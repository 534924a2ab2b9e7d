"""Whoever serves a disk and stands still: how long it holds up a start and an end."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.run.io_loop import LAST_WAIT_S
from pyvmm.vhost_user.channel import Message
from pyvmm.vhost_user.protocol import Request
from tests.support.export_process import Export
from tests.support.guest import command, environment
from tests.support.live_backend import LiveBackend
from tests.support.nbd_servers import agree, request, scripted
from tests.support.patience import patient
from tests.support.tiny_disk_guests import reads_a_sector, resets_disk, starts_disk
from tests.support.tiny_guests import SPIN, prints, write_guest

pytestmark = pytest.mark.bare

MANY = 6


def guest(tmp_path: Path, *code: bytes) -> Path:
    """A kernel that prints a line, does ``code`` and spins."""
    return write_guest(tmp_path / "guest", prints(b"up\n"), *code, SPIN)


def run(
    kernel: Path, *disks: str, timeout: str = "1", options: tuple[str, ...] = ()
) -> tuple[subprocess.CompletedProcess[str], float]:
    """A run with ``disks``, and how many seconds it took."""
    arguments = [*options, "--timeout", timeout, "--console", "none"]
    for disk in disks:
        arguments += ["--disk", disk]
    began_s = time.monotonic()
    done = subprocess.run(
        command(*arguments, kernel=kernel), stdin=subprocess.DEVNULL, capture_output=True,
        text=True, env=environment(), timeout=patient(60), check=False,
    )
    return done, time.monotonic() - began_s


@contextlib.contextmanager
def stuck_server(path: Path) -> Iterator[threading.Event]:
    """An NBD server that answers no request; the event is set once there was one."""
    asked, is_over = threading.Event(), threading.Event()

    def serve(connection: socket.socket) -> None:
        agree(connection)
        request(connection)
        asked.set()
        is_over.wait(patient(60))

    with scripted(path, serve):
        try:
            yield asked
        finally:
            is_over.set()


@pytest.mark.parametrize("resets", [False, True], ids=["at_close", "in_a_reset"])
def test_fault_5_stuck_back_ends_share_the_last_wait(tmp_path: Path, resets: bool) -> None:
    code = b"".join(map(starts_disk, range(MANY)))
    if resets:
        code += b"".join(map(resets_disk, range(MANY)))
    kernel = guest(tmp_path, code)
    backends = []
    with contextlib.ExitStack() as stack:
        for index in range(MANY):
            backend = stack.enter_context(LiveBackend(tmp_path / f"s{index}"))
            backend.answers[Request.GET_VRING_BASE] = None
            backends.append(backend)
        done, took_s = run(kernel, *(f"vhost-user={tmp_path}/s{index}" for index in range(MANY)))
    assert (done.returncode, done.stderr) == (124, "pyvmm: timeout\n")
    assert sum("GET_VRING_BASE" in backend.names for backend in backends) == MANY
    assert took_s < patient(1) + (MANY - 1) * LAST_WAIT_S


@pytest.mark.parametrize("serve", ["thread", "exit"])
@pytest.mark.parametrize("layer", ["", ",snapshot", ",faults"])
def test_fault_5_a_stuck_nbd_server_does_not_hold_up_the_end(
    tmp_path: Path, serve: str, layer: str
) -> None:
    kernel = guest(tmp_path, starts_disk(0), reads_a_sector(0))
    if layer == ",faults":
        (tmp_path / "script").write_text("write 1: EIO\n")
        layer += f"={tmp_path}/script"
    with stuck_server(tmp_path / "s") as asked:
        uri = f"nbd+unix:///?socket={tmp_path}/s"
        done, _ = run(kernel, f"{uri}{layer}", options=("--serve", serve))
        assert asked.is_set()
    assert done.returncode == 124
    assert done.stderr == (
        f"pyvmm: {uri}: connection lost (a request was unanswered at the end)\npyvmm: timeout\n"
    )


def test_fault_5_a_scripted_delay_does_not_hold_up_the_end(tmp_path: Path) -> None:
    kernel = guest(tmp_path, starts_disk(0), reads_a_sector(0))
    (tmp_path / "script").write_text("read 1: delay 300\n")
    (tmp_path / "disk.img").write_bytes(bytes(1 << 16))
    done, _ = run(kernel, f"{tmp_path}/disk.img,faults={tmp_path}/script")
    assert (done.returncode, done.stderr) == (124, "pyvmm: timeout\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_fault_5_a_stuck_nbd_server_does_not_hold_up_the_end_of_an_export(
    tmp_path: Path, number: signal.Signals
) -> None:
    kernel = guest(tmp_path, starts_disk(0), reads_a_sector(0))
    uri = f"nbd+unix:///?socket={tmp_path}/s"
    with stuck_server(tmp_path / "s") as asked, Export(uri, tmp_path / "x") as export:
        with subprocess.Popen(
            command("--disk", f"vhost-user={tmp_path}/x", "--console", "none", kernel=kernel),
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(),
        ) as front_end:
            try:
                assert asked.wait(patient(20))
                export.process.send_signal(number)
                # Half of NBD's own 30 s: nothing but the signal ends the wait.
                assert export.process.wait(patient(15)) == 0
                assert front_end.wait(patient(20)) == 125
            finally:
                front_end.kill()
        assert f"{uri}: connection lost (a request was unanswered at the end)" in export.messages


# The start


def test_fault_6_a_back_end_that_does_not_tell_its_configuration(tmp_path: Path) -> None:
    """It has agreed on everything else, and the disk does not stand yet."""
    with LiveBackend(tmp_path / "s") as backend:
        backend.answers[Request.GET_CONFIG] = None
        done, _ = run(guest(tmp_path), f"vhost-user={tmp_path}/s", timeout="1")
    assert done.returncode == 125
    found = re.fullmatch(
        f"pyvmm: {tmp_path}/s: the reply to GET_CONFIG did not come within (.*) s\n", done.stderr
    )
    assert found
    assert float(found[1]) <= 1


@pytest.mark.parametrize("kind", ["nbd", "vhost-user"])
def test_fault_6_servers_that_are_slow_share_the_time_to_start(tmp_path: Path, kind: str) -> None:
    """Each is within the timeout, all of them are not."""
    def serve(connection: socket.socket) -> None:
        time.sleep(2)
        agree(connection)

    def slow(message: Message) -> bytes:
        time.sleep(2)
        return message.payload

    with contextlib.ExitStack() as stack:
        stack.enter_context(scripted(tmp_path / "first", serve))
        second = tmp_path / "second"
        disks = [f"nbd+unix:///?socket={tmp_path}/first"]
        if kind == "nbd":
            stack.enter_context(scripted(second, serve))
            disks.append(f"nbd+unix:///?socket={second}")
            problem = "the server has not agreed on a disk within 0."
        else:
            backend = stack.enter_context(LiveBackend(second))
            backend.answers[Request.GET_CONFIG] = slow
            disks.append(f"vhost-user={second}")
            problem = "the reply to GET_CONFIG did not come within 0."
        done, _ = run(guest(tmp_path), *disks, timeout="3")
    assert done.returncode == 125
    assert problem in done.stderr
