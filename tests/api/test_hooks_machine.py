"""Hooks on a whole machine with a serial port and a disk: any /dev/kvm will do."""

from __future__ import annotations

import collections
import threading
from pathlib import Path

import pytest

import pyvmm
from pyvmm.api.hooked_bus import Access
from pyvmm.api.hooked_disk import DiskRequest
from pyvmm.api.hooks import Hooks
from pyvmm.kvm.exits import Exit, IoExit
from pyvmm.machine import Machine
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.virtio.spec import Register
from pyvmm.x86 import layout
from tests.support.bare import LONG_MODE_ENTRY, assemble
from tests.support.disk_guest import built, disk_machine, expected_disk, wait_for_rounds
from tests.support.kernels import ElfSegment, elf
from tests.support.patience import patient

pytestmark = pytest.mark.bare

ROUNDS = 200
SENT = b"abcdefghijklmnop" * 25 + b"!!!"
DONE = Outcome(Kind.GUEST_STATUS, 0)


def run(machine: Machine) -> Outcome:
    """Run a guest of drive_disk.S, which ends once it was sent a byte."""
    machine.start()
    wait_for_rounds(machine, 1)
    assert machine.consoles.receive(b"!") == 1
    outcome = machine.wait(patient(30))
    assert outcome is not None
    return outcome


@pytest.mark.parametrize("method", ["on_port", "on_exit"])
def test_a_hook_sees_each_byte_that_kvm_would_gather(tmp_path: Path, method: str) -> None:
    kernel, seen, all_came = tmp_path / "guest.elf", bytearray(), threading.Event()
    code = assemble("polled_uart", LONG_MODE_ENTRY, tmp_path)
    kernel.write_bytes(elf(ElfSegment(data=code, p_memsz=4096)))

    def take(data: bytes) -> None:
        seen.extend(data)
        if len(seen) == len(SENT):
            all_came.set()

    def on_port(access: Access) -> None:
        if access.value is not None:
            take(bytes([access.value]))

    def on_exit(vcpu: int, left: Exit) -> None:
        if isinstance(left, IoExit) and left.port == layout.SERIAL_PORT:
            take(left.data)

    config = pyvmm.MachineConfig(kernel=kernel, timeout_s=patient(30))
    with pyvmm.Machine(config) as machine:
        if method == "on_port":
            machine.on_port(layout.SERIAL_PORT, on_port)
        else:
            machine.on_exit(on_exit)
        machine.start()
        assert all_came.wait(patient(20)), bytes(seen)
        machine.stop()
        assert machine.console.text == SENT.decode()
    assert seen == SENT


def test_requests_of_a_guest_are_seen_one_by_one(tmp_path: Path) -> None:
    seen: collections.Counter[str] = collections.Counter()
    names: set[str] = set()

    def watch(request: DiskRequest) -> None:
        seen[request.operation] += 1
        names.add(threading.current_thread().name)

    config = disk_machine(tmp_path, rounds=ROUNDS)
    with built(config) as machine:
        Hooks(machine).on_request(0, watch)
        assert run(machine) == DONE
    assert seen == {"write": ROUNDS, "read": ROUNDS}
    assert names == {"virtio0"}
    assert (tmp_path / "disk.img").read_bytes() == expected_disk(ROUNDS)


def test_a_request_hook_that_waits_for_its_machine_ends_the_run(tmp_path: Path) -> None:
    with built(disk_machine(tmp_path, rounds=ROUNDS)) as machine:
        Hooks(machine).on_request(0, lambda request: machine.pause())  # type: ignore[arg-type,return-value]
        outcome = machine.run()
    assert outcome.kind is Kind.HOST_ERROR
    assert "the on_request hook" in outcome.detail
    assert "RuntimeError: pause() in a thread of the run would wait for ever" in outcome.detail


@pytest.mark.parametrize("mmio", ["mapped", "trapped"])
def test_what_a_hook_on_a_register_page_sees(tmp_path: Path, mmio: str) -> None:
    """docs/api.md says it: reads if they are trapped, and all writes but notifications."""
    reads: collections.Counter[int] = collections.Counter()
    writes: collections.Counter[int] = collections.Counter()
    base, _ = layout.virtio_slot(0)

    def watch(access: Access) -> None:
        (writes if access.is_write else reads)[access.address - base] += 1

    with built(disk_machine(tmp_path, rounds=ROUNDS, mmio=mmio)) as machine:
        Hooks(machine).on_mmio(range(base, base + 4096), watch)
        assert run(machine) == DONE
    assert writes[Register.STATUS] > 0
    assert writes[Register.QUEUE_NOTIFY] == 0
    assert bool(reads) == (mmio == "trapped")
    assert (tmp_path / "disk.img").read_bytes() == expected_disk(ROUNDS)


def test_refused_registers_are_those_of_no_device(tmp_path: Path) -> None:
    base, _ = layout.virtio_slot(0)
    with built(disk_machine(tmp_path, rounds=1, mmio="trapped")) as machine:
        hooks = Hooks(machine)
        hooks.on_mmio(base, lambda access: pyvmm.REFUSE)
        assert machine.board.mmio.read(base, 4) == 0xFFFF_FFFF
        assert machine.board.mmio.read(base + Register.VERSION, 4) == 2


def test_a_hook_is_told_which_vcpu_it_watches(tmp_path: Path) -> None:
    seen: set[int] = set()
    with built(disk_machine(tmp_path, rounds=ROUNDS, cpus=2)) as machine:
        hooks = Hooks(machine)
        hooks.on_exit(lambda vcpu, left: seen.add(vcpu))
        assert run(machine) == DONE
    assert seen <= {0, 1}
    assert 0 in seen
