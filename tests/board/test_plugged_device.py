"""Devices of one's own in a real machine, under a guest of a few instructions: any /dev/kvm will
do.  Nothing in pyvmm knows of the devices here."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from pyvmm.cli.session import run_at_terminal
from pyvmm.config import RunConfig
from pyvmm.errors import ConfigError
from pyvmm.machine import Machine, build
from pyvmm.memory import GuestMemory
from pyvmm.report import Reporter
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.virtio.device import RingDevice, VirtioDevice
from pyvmm.virtio.entropy.device import EntropyDevice
from pyvmm.virtio.ring.queue import Chain
from pyvmm.virtio.spec import Feature
from tests.support.bare import LONG_MODE_ENTRY, assemble
from tests.support.kernels import ElfSegment, elf
from tests.support.patience import patient
from tests.support.vhost_user_peers import open_fds

pytestmark = pytest.mark.bare


class BackwardsDevice(RingDevice):
    """Says what it is told, backwards."""

    device_type = 63

    def __init__(self) -> None:
        super().__init__(avail_features=Feature.VERSION_1, queue_max_sizes=(8,))
        self.threads: set[str] = set()
        self.is_closed = False

    def read_config(self, offset: int, length: int) -> bytes:
        return bytes(length)

    def write_config(self, offset: int, data: bytes) -> None:
        pass

    def _serve(self, chain: Chain, memory: GuestMemory) -> int:
        self.threads.add(threading.current_thread().name)
        said = memory.read(*chain.readable[0])
        memory.write(chain.writable[0][0], said[::-1])
        return len(said)

    def close(self) -> None:
        self.is_closed = True


class LateDevice(BackwardsDevice):
    """Answers once it has looked at the host, which it is asked for by SIGUSR1."""

    def __init__(self) -> None:
        super().__init__()
        self.is_ready = False

    def process_queue(self, index: int) -> float | None:
        if self.is_ready:
            return super().process_queue(index)
        os.kill(os.getpid(), signal.SIGUSR1)
        return None

    def refresh(self) -> bool:
        self.threads.add(threading.current_thread().name)
        self.is_ready = True
        self._slot.serve(0)
        return False


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A machine whose guest asks the last device it is told of."""
    kernel = tmp_path / "ask_device.elf"
    code = assemble("ask_device", LONG_MODE_ENTRY, tmp_path)
    kernel.write_bytes(elf(ElfSegment(data=code, p_memsz=len(code))))
    return RunConfig(
        kernel=kernel, console=str(tmp_path / "console"), timeout_s=patient(30)
    )


def run(config: RunConfig, devices: dict[str, VirtioDevice]) -> tuple[Outcome, bytes, Machine]:
    """The outcome, the console and the machine of a run with ``devices``."""
    with build(config, report=Reporter(), devices=devices) as machine:
        outcome = run_at_terminal(machine)
    return outcome, Path(config.console).read_bytes(), machine


@pytest.mark.parametrize("mmio", ["mapped", "trapped"])
def test_a_guest_finds_rings_and_is_answered_by_a_device_of_a_test(
    config: RunConfig, mmio: str
) -> None:
    before = open_fds()
    device = BackwardsDevice()
    outcome, said, machine = run(config.replace(mmio=mmio), {"backwards": device})
    assert outcome == Outcome(Kind.GUEST_STATUS, 2)  # the devices it was told of
    assert said == b"olleh"
    assert device.threads == {"backwards"}, "not the vCPU's: nobody said that it never waits"
    assert device.is_closed
    # The guest has to be left for set-up and for the UART, not for what it asks.
    assert machine.exits.mmio > 0
    assert open_fds() == before


def test_sigusr1_has_a_device_look_at_the_host_on_its_own_thread(config: RunConfig) -> None:
    device = LateDevice()
    with build(config, report=Reporter(), devices={"late": device}) as machine:
        outcome = run_at_terminal(machine)  # it takes the process's signals
    assert outcome == Outcome(Kind.GUEST_STATUS, 2)
    assert Path(config.console).read_bytes() == b"olleh"
    assert device.threads == {"late"}


def test_one_more_entropy_device_is_announced_served_and_has_its_own_interrupt(
    config: RunConfig,
) -> None:
    """The experiment of issue 12: it was built, not announced, and took another one's thread."""
    outcome, said, machine = run(
        config.replace(append="console=ttyS0 console=hvc0 console=ttyS0"),
        {"more entropy": EntropyDevice()},
    )
    assert outcome == Outcome(Kind.GUEST_STATUS, 3)
    assert len(said) == 64, "the third one answered, and its interrupt came"
    slots = machine.board.slots
    assert [slot.name for slot in slots] == ["console", "entropy", "more entropy"]
    assert len({slot.gsi for slot in slots}) == len({slot.base for slot in slots}) == 3


def test_every_device_of_a_machine_has_a_thread_of_its_own(config: RunConfig) -> None:
    with build(config, report=Reporter(), devices={"more": EntropyDevice()}) as machine:
        workers = machine.board.workers
    assert [name for name, _ in workers] == ["entropy", "more", "console"]
    fds = [source.fd for _, sources in workers for source in sources]
    assert len(set(fds)) == len(fds) == 2 + 2 + 1


def test_a_machine_that_cannot_be_built_closes_the_devices_it_was_given(
    config: RunConfig,
) -> None:
    before = open_fds()
    device = BackwardsDevice()
    with pytest.raises(ConfigError):
        build(config.replace(kernel="/nowhere"), report=Reporter(), devices={"own": device})
    assert device.is_closed
    with pytest.raises(ValueError, match="two devices are named 'entropy'"):
        build(config, report=Reporter(), devices={"entropy": BackwardsDevice()})
    assert open_fds() == before


def test_a_device_is_plugged_in_once(config: RunConfig) -> None:
    device = BackwardsDevice()
    with pytest.raises(ValueError, match="device 'one' is plugged in already: make another"):
        build(config, report=Reporter(), devices={"one": device, "two": device})
    with build(config, report=Reporter(), devices={"one": device}) as machine:
        with pytest.raises(ValueError, match="device 'own' is plugged in already"):
            build(config, report=Reporter(), devices={"own": device})
        assert not device.is_closed, "it is another machine's"
        run_at_terminal(machine)
    with pytest.raises(ValueError, match="plugged in already"):
        build(config, report=Reporter(), devices={"again": device})


@pytest.mark.parametrize("sizes", [(), (0,), (65536,), (8, -1)])
def test_a_device_has_queues_of_a_size_that_can_be(sizes: tuple[int, ...]) -> None:
    class Odd(BackwardsDevice):
        def __init__(self) -> None:
            VirtioDevice.__init__(self, avail_features=Feature.VERSION_1, queue_max_sizes=sizes)

    with pytest.raises(ValueError, match=r"Odd: queue_max_sizes .* has queues of 1 to 32768"):
        Odd()


def test_a_device_that_fails_at_the_end_keeps_nothing(config: RunConfig) -> None:
    class Failing(BackwardsDevice):
        def hurry(self, until_s: float) -> None:
            raise SystemExit("no")

    before = open_fds(), threading.active_count()
    outcome, said, _ = run(config, {"failing": Failing()})
    assert (outcome, said) == (Outcome(Kind.GUEST_STATUS, 2), b"olleh")
    assert (open_fds(), threading.active_count()) == before


def test_more_devices_than_lines_are_one_config_error(config: RunConfig) -> None:
    before = open_fds()
    devices = {f"own{index}": BackwardsDevice() for index in range(16)}
    with pytest.raises(ConfigError, match="device own15: is one too many"):
        build(config, report=Reporter(), devices=devices)
    assert all(device.is_closed for device in devices.values())
    assert open_fds() == before


def test_fifteen_devices_beside_the_machines_own_work(config: RunConfig) -> None:
    """The last one's line is the IOAPIC's last pin."""
    devices: dict[str, VirtioDevice] = {f"own{index}": BackwardsDevice() for index in range(15)}
    outcome, said, _ = run(config, devices)
    assert (outcome, said) == (Outcome(Kind.GUEST_STATUS, 16), b"olleh")
