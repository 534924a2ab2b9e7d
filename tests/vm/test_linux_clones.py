"""Many clones of one booted Linux at once: all answer, each takes little, nothing is left.

``PYVMM_CLONES`` is their number, 20 unless set; ``make soak``: 100.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pyvmm.config import DiskConfig
from pyvmm.ram.pages import own_bytes
from pyvmm.snapshot.capture import take
from pyvmm.snapshot.opening import open_snapshot
from pyvmm.snapshot.snapshot import Snapshot
from pyvmm.storage.open import DiskSource
from tests.support.guest import IMAGE, MIB
from tests.support.linux_machine import LinuxMachine, linux_config
from tests.support.snapshots import Resources

CLONES = int(os.environ.get("PYVMM_CLONES", "20"))
IDLE_S = 10.0
MOST_OWN_BYTES = 3 * MIB
DESCRIPTORS = 4096
# No process for an answer, and few bytes to type: in the lab each is a second of a hundred clones.
ANSWER = "a() { read note </note; read id </proc/sys/kernel/random/uuid; echo is $note $id; }"

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(1800 + 20 * CLONES)]


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """As many open files as so many clones need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    most = DESCRIPTORS if hard == unlimited else min(hard, DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(most, soft), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def anonymous_bytes() -> int:
    """The memory of this process that is in no file: own pages of guests, Python, KVM's tables."""
    status = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
    )
    return int(status["RssAnon"].split()[0]) << 10


def test_many_clones_at_once_all_answer_and_leave_nothing(
    tmp_path: Path, many_descriptors: None
) -> None:
    config = linux_config(tmp_path, console="hvc0", data_disks=0)
    root = DiskConfig(source=DiskSource(location=str(IMAGE), snapshot=True))
    with LinuxMachine(config.replace(disks=(root,), memory_bytes=128 * MIB)) as linux:
        linux.begin()
        assert linux.run(f"echo before >/note; {ANSWER}; a").startswith("is before ")
        take(linux.machine, tmp_path / "saved").close()
        complaints = linux.complaints()
    consoles = tmp_path / "consoles"
    consoles.mkdir()
    before, files = Resources.now(), sorted(tmp_path.iterdir())
    with open_snapshot(tmp_path / "saved", report=pytest.fail) as snapshot:
        try_clones(snapshot, consoles, complaints)
    assert Resources.now() == before
    assert sorted(tmp_path.iterdir()) == files


def try_clones(snapshot: Snapshot, consoles: Path, complaints: str) -> None:
    """Have CLONES of ``snapshot`` go on at once, and idle, and answer; end them."""
    began_s, anonymous = time.monotonic(), anonymous_bytes()
    with ExitStack() as held:
        clones = [
            held.enter_context(LinuxMachine.clone_of(snapshot, consoles / f"{number}"))
            for number in range(CLONES)
        ]
        made_s = time.monotonic()
        time.sleep(IDLE_S)
        own = sorted(own_bytes(clone.machine.board.memory) for clone in clones)
        of_process = (anonymous_bytes() - anonymous) // CLONES
        maps = len(Path("/proc/self/maps").read_text().splitlines())
        descriptors, threads, _, _ = Resources.now()
        asked_s = time.monotonic()
        for clone in clones:
            clone.type("a\n")
        said = [answer(clone) for clone in clones]
        answered_s = time.monotonic()
        assert {note for note, _ in said} == {"before"}
        assert len({number for _, number in said}) == CLONES, "random numbers"
        assert len({clone.machine.clone_id for clone in clones}) == CLONES
        for clone in (clones[0], clones[-1]):
            assert clone.run("echo mine >/note; sync; cat /note") == "mine"
            assert clone.complaints() == complaints
        assert clones[1].run("cat /note") == "before"
        stopping_s = time.monotonic()
    print(
        f"{CLONES} clones: started in {made_s - began_s:.1f} s, all answered"
        f" {answered_s - asked_s:.1f} s after they were asked, stopped in"
        f" {time.monotonic() - stopping_s:.1f} s; own RAM of an idle one {own[0] >> 10} to"
        f" {own[-1] >> 10} KiB, median {own[CLONES // 2] >> 10}; {of_process >> 10} KiB of this"
        f" process for each; {len(descriptors)} descriptors, {threads} threads, {maps} mappings",
        flush=True,
    )
    assert own[-1] <= MOST_OWN_BYTES


def answer(clone: LinuxMachine) -> tuple[str, str]:
    """The clone's answer: its note, and a random number."""
    clone.wait_for("\nis ", 600)
    note, number = clone.wait_for("\n").split()
    return note, number
