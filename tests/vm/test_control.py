"""``pyvmm run --control`` and ``pyvmm ctl`` with Linux and the agent in it, in one boot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyvmm.control.client import Client
from tests.support.guest import IMAGE, command, environment
from tests.support.patience import patient
from tests.support.stand_in_target import wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(900)]


def test_a_linux_guest_is_driven_from_outside_until_it_panics(tmp_path: Path) -> None:
    path = tmp_path / "control"
    machine = subprocess.Popen(
        command("--agent", "--disk", f"{IMAGE},snapshot", "--console", "none", "--append", "quiet",
                "--control", str(path), "--timeout", str(patient(300))),
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment(),
    )

    def ctl(*words: str, given: bytes = b"", status: int = 0) -> bytes:
        done = subprocess.run(
            [sys.executable, "-m", "pyvmm", "ctl", str(path), *words], input=given,
            stdout=subprocess.PIPE, check=False, env=environment(), cwd=tmp_path,
        )
        assert done.returncode == status, done
        return done.stdout

    wait_until(lambda: path.exists() or machine.poll() is not None, 60)
    events: list[dict[str, Any]] = []
    with Client.connect(str(path), on_event=events.append, timeout_s=patient(60)) as client:
        client.call("agent.wait", {"timeout_s": patient(120)})
        client.call("subscribe", {"events": ["ended"]})
        assert ctl("run", "--", "uname", "-s") == b"Linux\n"
        data = os.urandom(300_000)
        assert ctl("run", "--", "cat", given=data) == data
        ctl("run", "--", "sh", "-c", "exit 9", status=9)
        ctl("run", "--", "no-such", status=127)
        ctl("run", "--timeout", "0.5", "--", "sleep", "60", status=124)
        (tmp_path / "tree" / "inner").mkdir(parents=True)
        (tmp_path / "tree" / "inner" / "data").write_bytes(data)
        ctl("put", "tree", "/tmp/")
        assert ctl("run", "--", "cat", "/tmp/tree/inner/data") == data
        ctl("get", "/tmp/tree", "back")
        assert (tmp_path / "back" / "inner" / "data").read_bytes() == data
        ctl("pause")
        assert b"paused" in ctl("status")
        assert b"rip" in ctl("registers")
        ctl("resume")
        client.call("agent.ping", {"timeout_s": patient(20)})
        result = client.call(
            "agent.run", {"argv": ["sh", "-c", "echo c > /proc/sysrq-trigger; sleep 60"]},
            timeout_s=patient(120),
        )
        assert result["kind"] == "lost"
        wait_until(lambda: client.is_closed, 60)
    assert machine.wait(patient(60)) == 121
    assert machine.stderr is not None
    assert b"kernel panic: sysrq triggered crash" in machine.stderr.read()
    machine.stderr.close()
    ended = events[-1]
    assert ended["outcome"]["kind"] == "PANIC"
    assert ended["evidence"]["panic"] == "sysrq triggered crash"
    assert ended["kernel"]["is_linux"]
    assert not path.exists()
