"""Machines of a few instructions that go back in time, and what is asked of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyvmm
from tests.support.patience import patient
from tests.support.tiny_guests import write_guest
from tests.support.vhost_user_peers import open_fds

WAIT_S = 30.0
LISTEN = bytes.fromhex("66bafd03 ec a801 74fb 66baf803 ec")
"""Wait for a byte, and have it in al."""
MakeMachine = Callable[..., pyvmm.Machine]


def ask_then(*code: bytes) -> bytes:
    """Code that waits for a byte and then does ``code``."""
    return LISTEN + b"".join(code)


def machines_made(tmp_path: Path) -> Iterator[MakeMachine]:
    """A fixture: makes machines of some code, which are closed; nothing of them is left."""
    made: list[pyvmm.Machine] = []
    before, threads = open_fds(), threading.active_count()

    def make_one(*code: bytes, **more: Any) -> pyvmm.Machine:
        kernel = write_guest(tmp_path / f"guest{len(made)}.elf", *code)
        how = {"kernel": kernel, "timeout_s": patient(2 * WAIT_S), "memory": 16 << 20, **more}
        made.append(pyvmm.Machine(pyvmm.MachineConfig(**how)))
        return made[-1]

    yield make_one
    for machine in made:
        machine.close()
    assert open_fds() == before
    assert threading.active_count() == threads


def echo(machine: pyvmm.Machine, text: str) -> None:
    """Have the guest echo ``text``."""
    machine.console.write(text)
    machine.console.expect(text, patient(WAIT_S))
