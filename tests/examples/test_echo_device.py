"""The examples do what they say: any /dev/kvm will do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from examples.echo_device.device import DEVICE_TYPE, EchoDevice
from pyvmm.memory import GuestMemory
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.spec import Register
from tests.support.patience import patient
from tests.support.virtio_driver import RAM_BASE, Used, VirtioDriver, readable, writable

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.bare
def test_the_echo_device_answers_a_guest() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "examples.echo_device.run"], cwd=ROOT, capture_output=True,
        text=True, stdin=subprocess.DEVNULL, timeout=patient(60), check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "HELLO\nguest reported a status 2; the guest was told of 2 devices: entropy, echo\n"
    )


def test_the_echo_device_survives_what_a_driver_may_send() -> None:
    memory = GuestMemory.over(bytearray(1 << 20), RAM_BASE)
    transport = MmioTransport(EchoDevice(), memory, lambda: None, report=print)
    driver = VirtioDriver(transport, memory)
    driver.start()
    assert driver.reg(Register.DEVICE_ID) == DEVICE_TYPE
    said, room = driver.put(b"hello, world"), driver.alloc(16)
    driver.submit([readable(said, 6), readable(said + 6, 6), writable(room, 5),
                   writable(room + 5, 11)])
    assert driver.reap() == [Used(0, 12)]
    assert memory.read(room, 16) == b"HELLO, WORLD\0\0\0\0"
    nowhere = 1 << 40
    for chain, written in (
        ([readable(nowhere, 8), writable(room, 8)], 0),
        ([readable(said, 8), writable(nowhere, 8)], 0),
        ([readable(said, 8), writable(room, 3)], 3),
        ([writable(room, 8)], 0),
        ([readable(said, 8)], 0),
        ([readable(RAM_BASE, 1 << 19), writable(RAM_BASE + (1 << 19), 1 << 19)], 4096),
    ):
        driver.submit(chain)
        assert driver.reap() == [Used(0, written)]
    transport.close()
