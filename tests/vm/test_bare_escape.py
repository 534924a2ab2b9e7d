"""Attempts to get out of the jail, from each kind of thread of a running pyvmm.

``tests.support.escape`` makes them, with the rights of code that a guest runs in such a thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.escape.attempts import Buffers, Machine, attempts
from tests.support.nbd_servers import nbdkit
from tests.support.patience import patient
from tests.support.storage_daemon import StorageDaemon
from tests.support.tiny_guests import REPORT_7, prints, write_guest

pytestmark = pytest.mark.bare

ROOT = Path(__file__).resolve().parents[2]
Found = dict[str, dict[str, tuple[str, str]]]
UNASKED = ("335", "336")
"""uretprobe and uprobe: Linux asks no filter, and they do nothing in a process without probes."""
AS_A_USER = ("setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups", "--inh-caps",
             "+dac_override", "--ambient-caps", "+dac_override")
"""Another user, who may still read this Python and /dev/kvm; the jail drops that capability."""


class Escape:
    """Runs pyvmm with the program that tries; ``folder`` takes files."""

    def __init__(self, folder: Path) -> None:
        self._report = folder / "report.json"
        self.disk = folder / "disk.img"
        self.disk.write_bytes(bytes(1 << 20))
        self._kernel = write_guest(folder / "guest.elf", prints(b"hello\n"), REPORT_7)
        self.stderr = ""

    def run(self, mode: str, *options: str, prefix: Sequence[str] = ()) -> tuple[int, Found]:
        """Return the exit status of ``pyvmm run``, and what was tried in its threads."""
        return self.command(
            mode, "run", "--kernel", str(self._kernel), "--memory", "16M", *options, prefix=prefix
        )

    def command(
        self, mode: str, *words: str, prefix: Sequence[str] = ()
    ) -> tuple[int, Found]:
        """The same of any command of pyvmm's."""
        done = subprocess.run(
            [*prefix, sys.executable, "-m", "tests.support.escape", self._report, mode, *words],
            cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            timeout=patient(120),
        )
        self.stderr = done.stderr
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(self._report.read_text())
        kinds = {
            kind: {name: (result, table) for name, (result, table) in tried.items()}
            for kind, tried in found["kinds"].items()
        }
        return found["status"], kinds


@pytest.fixture
def escape(tmp_path: Path) -> Escape:
    return Escape(tmp_path)


def check(found: Found) -> None:
    """What happened is what the table says, and it says that nothing gets out."""
    for kind, tried in found.items():
        for name, (result, table) in tried.items():
            assert (name in UNASKED or result == table
                    or (table == "allowed" and result not in ("killed", "hung"))), (
                f"{kind}: {name}: {result}, but the table has: {table}"
            )


def test_nothing_gets_out_of_the_threads_of_a_run(escape: Escape) -> None:
    status, found = escape.run("attempts", "--disk", str(escape.disk))
    assert status == 7, escape.stderr
    assert set(found) == {"vcpu", "disk", "console", "entropy", "main"}
    assert min(map(len, found.values())) > 130
    check(found)
    for kind, tried in found.items():
        got_out = {name for name, (result, _) in tried.items() if result == "ok"}
        assert got_out <= {"signal oneself"}, kind


@contextlib.contextmanager
def nbd_disk(folder: Path) -> Iterator[tuple[str, ...]]:
    with nbdkit(folder / "nbd", "memory", "1M"):
        yield "--disk", f"nbd+unix:///?socket={folder}/nbd"


@contextlib.contextmanager
def vhost_user_disk(folder: Path) -> Iterator[tuple[str, ...]]:
    with StorageDaemon(folder / "disk.img", folder / "vhost"):
        yield "--disk", f"vhost-user={folder}/vhost"


@contextlib.contextmanager
def served_at_exits(folder: Path) -> Iterator[tuple[str, ...]]:
    yield "--serve", "exit", "--disk", f"{folder}/disk.img"


@contextlib.contextmanager
def controlled(folder: Path) -> Iterator[tuple[str, ...]]:
    yield "--control", f"{folder}/control", "--disk", f"{folder}/disk.img"


@pytest.mark.parametrize(("kind", "machine"), [
    ("control", controlled),
    ("snapshot", controlled),
    ("agent", controlled),
    ("vcpu-serving", served_at_exits),
    ("disk-network", nbd_disk),
    ("disk-elsewhere", vhost_user_disk),
    ("vcpu-elsewhere", vhost_user_disk),
])  # fmt: skip
def test_nothing_gets_out_of_a_thread_that_only_some_machines_have(
    kind: str, machine: Any, escape: Escape, tmp_path: Path
) -> None:
    with machine(tmp_path) as options:
        status, found = escape.run(f"attempts:{kind}", *options)
    assert status == 7, escape.stderr
    assert set(found) == {kind}
    check(found)


@pytest.mark.parametrize("kind", ["main-export", "export-watch"])
def test_nothing_gets_out_of_an_export(kind: str, escape: Escape, tmp_path: Path) -> None:
    path = tmp_path / "export"
    served = threading.Thread(target=end_once_there, args=(path, tmp_path / "pid"))
    served.start()
    status, found = escape.command(
        f"attempts:{kind}", "export", "--disk", str(escape.disk), "--socket", str(path),
        prefix=("sh", "-c", f'echo $$ >{tmp_path}/pid; exec "$@"', "sh"),
    )
    served.join()
    assert status == 0, escape.stderr
    assert set(found) == {kind}
    check(found)


def end_once_there(path: Path, pid: Path) -> None:
    """End the process whose number is in ``pid`` once its socket ``path`` is there."""
    until_s = time.monotonic() + patient(60)
    while not path.exists() and time.monotonic() < until_s:
        time.sleep(0.05)
    os.kill(int(pid.read_text()), signal.SIGTERM)


@pytest.mark.parametrize("who", [
    "as it is",
    pytest.param("as a user", marks=pytest.mark.skipif(
        os.geteuid() != 0, reason="it is a user already"
    )),
])
def test_without_filters_the_rest_of_the_jail_still_stops_most(who: str, escape: Escape) -> None:
    """As in a container that forbids seccomp(2): files, processes, rights and code."""
    escape.disk.chmod(0o666)
    status, found = escape.run(
        "attempts:none", "--disk", str(escape.disk),
        prefix=AS_A_USER if who == "as a user" else (),
    )
    assert status == 7, escape.stderr
    must_fail = {
        one.name for one in attempts(Buffers(), Machine()) if one.is_stopped_without_filter
    }
    assert len(must_fail) > 50
    for name in must_fail:
        assert found["none"][name][0].startswith("errno "), name


@pytest.mark.skipif(os.geteuid() != 0, reason="the first test is a user's then")
def test_nothing_gets_out_of_a_users_run(escape: Escape) -> None:
    escape.disk.chmod(0o666)
    status, found = escape.run("attempts:vcpu", "--disk", str(escape.disk), prefix=AS_A_USER)
    assert status == 7, escape.stderr
    check(found)
    assert set(found) == {"vcpu"}


def test_every_system_call_by_its_number(escape: Escape) -> None:
    """From a vCPU's thread; ``tests/jail/test_seccomp.py`` has all kinds, outside of a run."""
    status, found = escape.run("numbers:vcpu", "--disk", str(escape.disk))
    assert status == 7, escape.stderr
    assert len(found["vcpu"]) > 480
    check(found)


@pytest.mark.parametrize(("kind", "attempt"), [
    ("vcpu", "KVM_CREATE_VM"), ("vcpu", "KVM_SET_USER_MEMORY_REGION"), ("vcpu", "execve"),
    ("disk", "socket of family INET"), ("entropy", "KVM_SET_REGS"), ("main", "fork"),
])
def test_an_attempt_ends_the_machine(kind: str, attempt: str, escape: Escape) -> None:
    """KVM obeys only the process that made the machine, so here no child makes the attempt."""
    status, found = escape.run(f"real:{kind}:{attempt}", "--disk", str(escape.disk))
    assert status == -signal.SIGSYS
    assert found[kind][attempt][0] == "lost"


def test_an_open_in_a_real_thread_fails_and_the_guest_goes_on(escape: Escape) -> None:
    status, found = escape.run("real:vcpu:open own memory", "--disk", str(escape.disk))
    assert status == 7
    assert found["vcpu"]["open own memory"][0] == "errno 13"
