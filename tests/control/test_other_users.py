"""A machine and its clients belong to one user: both sides ask the kernel who the other one is."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm import owners
from pyvmm.control.client import Client, ControlError
from tests.support.patience import patient
from tests.support.planted import ANOTHER, as_another_user
from tests.support.stand_in_target import Served, served, wait_until

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")

def ask(path: Path) -> bytes:
    """Return the first line that the machine at ``path`` sends."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        return client.makefile("rb").readline()


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user may enter and, as in /tmp, make files in."""
    with tempfile.TemporaryDirectory(prefix="pyvmm-users-") as name:
        Path(name).chmod(0o1777)
        yield Path(name)


@pytest.fixture
def rig(place: Path) -> Iterator[Served]:
    with served(place) as found:
        yield found


def test_a_machine_hangs_up_on_another_user(rig: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(owners, "peer_uid", lambda sock: ANOTHER)
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(patient(10))
            client.connect(str(rig.path))
            first, *rest = client.makefile().readlines()
    assert json.loads(first)["error"] == {
        "kind": "refused", "message": "this machine belongs to another user",
    }
    assert rest == []
    assert rig.client().call("status")["cpus"] == 2


def test_a_client_does_not_talk_to_another_user(
    rig: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each side asks in its own thread: only the client sees a stranger.
    real, client_thread = owners.peer_uid, threading.get_ident()

    def peer_uid(sock: socket.socket) -> int:
        return ANOTHER if threading.get_ident() == client_thread else real(sock)

    monkeypatch.setattr(owners, "peer_uid", peer_uid)
    with pytest.raises(ControlError, match=f"control: belongs to uid {ANOTHER}; control a machine"):
        Client.connect(str(rig.path))


@needs_root
def test_no_mode_of_the_socket_lets_another_user_in(rig: Served) -> None:
    rig.path.chmod(0o666)
    said = as_another_user(lambda: ask(rig.path)).result()
    assert json.loads(said)["error"]["kind"] == "refused"
    assert rig.client().call("status")["cpus"] == 2


@needs_root
def test_a_client_sends_nothing_to_another_users_socket(place: Path) -> None:
    path = place / "s"

    def listen() -> bytes:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
            server.listen()
            client, _ = server.accept()
            return client.recv(1)

    listening = as_another_user(listen)
    wait_until(lambda: is_listening(path))
    with pytest.raises(ControlError, match=f"s: belongs to uid {ANOTHER}"):
        Client.connect(str(path))
    assert listening.result() == b""


def is_listening(path: Path) -> bool:
    """True if a socket at ``path`` listens (state 01 with __SO_ACCEPTCON)."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return any(line.endswith(f" {path}") and " 00010000 " in line for line in lines)


def test_this_user_and_root_are_trusted() -> None:
    assert owners.is_trusted(0)
    assert owners.is_trusted(os.geteuid())
    assert not owners.is_trusted(ANOTHER)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert owners.peer_uid(ours) == os.geteuid()
