"""How far a Linux came before it ended: guests of a few bytes that say what a Linux says."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pyvmm.devices.power import SLEEP_ENABLE, SLEEP_TYPE_SHIFT
from pyvmm.x86 import layout
from tests.support.guest import command, environment
from tests.support.kernels import bzimage
from tests.support.patience import patient
from tests.support.tiny_guests import HALT, REBOOT, SPIN, out, prints

pytestmark = pytest.mark.bare

ENTRY_64 = 0x200  # boot.rst, "64-bit Boot Protocol"
POWER_OFF = out(
    layout.SLEEP_CONTROL_PORT, layout.S5_SLEEP_TYPE << SLEEP_TYPE_SHIFT | SLEEP_ENABLE
) + SPIN
IN_A_PROGRAM = bytes.fromhex(
    "b9000100c0"  # mov $0xc0000100, %ecx   MSR_FS_BASE
    "b800100000"  # mov $0x1000, %eax
    "31d2 0f30"  # xor %edx, %edx; wrmsr
)
BOOTS = prints(b"[    0.000000] Linux version 6.1.0-synthetic\r\n")
UNPACKS = prints(b"\r\n\r\nDecoding failed\r\n\r\n -- System halted")
MEMTEST = b"Memtest86+ v6.20"


def says(text: str) -> bytes:
    """Code that prints a line of printk."""
    return prints(f"[    1.000000] {text}\r\n".encode())


def run(folder: Path, *code: bytes, version: bytes = b"6.1.0-synthetic") -> tuple[int, str]:
    """Exit status and messages of a kernel that does all of ``code``."""
    whole = b"".join(code)
    stack = b"\x48\x8d\x25" + (len(whole) + 2048).to_bytes(4, "little")  # lea rsp, [rip + ...]
    kernel = folder / "bzImage"
    kernel.write_bytes(bzimage(code=bytes(ENTRY_64) + stack + whole, version_text=version))
    done = subprocess.run(
        command("--timeout", str(patient(30)), kernel=kernel), stdin=subprocess.DEVNULL,
        capture_output=True, env=environment(), text=True, timeout=patient(90), check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(("code", "outcome"), [
    ((REBOOT,), "guest rebooted before it started an init"),
    ((BOOTS, REBOOT), "guest rebooted before it started an init"),
    ((BOOTS, HALT), "guest halted before it started an init: halted with interrupts off"),
    ((HALT,), "guest halted without a word: halted with interrupts off"),
    ((UNPACKS, HALT), "the boot gave up early: Decoding failed"),
    ((BOOTS, prints(b"PANIC: early exception 0x0d\r\nRIP: 0010:0\r\n"), HALT),
     "the boot gave up early: PANIC: early exception 0x0d"),
])
def test_fault_36_who_ends_before_an_init_was_reached_has_not_succeeded(
    tmp_path: Path, code: tuple[bytes, ...], outcome: str
) -> None:
    status, messages = run(tmp_path, *code)
    assert status == 121, messages
    assert f"pyvmm: {outcome}\n" in messages


@pytest.mark.parametrize("code", [
    (BOOTS, says("Run /sbin/init as init process"), REBOOT),
    (BOOTS, says("Run /sbin/init as init process"), HALT),
    (says("reboot: Restarting system"), REBOOT),  # "quiet" hides all that came before
    (says("reboot: System halted"), HALT),
    (says("reboot: Power down"), HALT),
    (POWER_OFF,),
    (IN_A_PROGRAM, REBOOT),
    (IN_A_PROGRAM, HALT),
    (IN_A_PROGRAM, BOOTS, UNPACKS, HALT),
])
def test_fault_36_who_ends_on_purpose_has(tmp_path: Path, code: tuple[bytes, ...]) -> None:
    status, messages = run(tmp_path, *code)
    assert status == 0, messages


@pytest.mark.parametrize("end", [HALT, REBOOT, POWER_OFF])
def test_fault_36_what_is_not_linux_may_halt_as_it_likes(tmp_path: Path, end: bytes) -> None:
    status, messages = run(tmp_path, prints(b"Memtest86+\r\n"), end, version=MEMTEST)
    assert status == 0, messages
