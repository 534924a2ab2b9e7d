"""A guest that does not come to rest, because nobody reads its console, is no reason to hang."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import pyvmm
from pyvmm.snapshot import still
from tests.support.patience import patient
from tests.support.tiny_guests import prints_for_ever, write_guest

pytestmark = pytest.mark.bare

PIPE_BYTES = 64 << 10


@pytest.mark.parametrize("call", [
    pyvmm.Machine.checkpoint, pyvmm.Machine.rewind, pyvmm.Machine.snapshot,
])
def test_a_guest_at_a_full_console_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[pyvmm.Machine], object]
) -> None:
    kernel = write_guest(tmp_path / "guest.elf", prints_for_ever(b"guest\n"))
    os.mkfifo(tmp_path / "console")
    with pyvmm.Machine(pyvmm.MachineConfig(kernel=kernel, memory="32M")) as machine:
        snapshot = machine.snapshot()
    with (
        snapshot,
        snapshot.clone(console=tmp_path / "console", report=lambda _line: None) as clone,
    ):
        reader = os.open(tmp_path / "console", os.O_RDONLY | os.O_NONBLOCK)
        clone.start()
        until_s = time.monotonic() + patient(20)
        while clone.pause(0.2):  # until its vCPU waits for room
            clone.resume()
            assert time.monotonic() < until_s
            time.sleep(0.05)
        clone.resume()
        monkeypatch.setattr(still, "STILL_S", 0.3)
        with pytest.raises(pyvmm.SnapshotError, match=r"did not come to rest in 0\.3 s: a vCPU"):
            call(clone)
        assert clone.outcome is None
        monkeypatch.setattr(still, "STILL_S", patient(30))
        clone.finish()  # it need not come to rest for that
        os.close(reader)
