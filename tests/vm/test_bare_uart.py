"""The UART of a whole machine, with KVM gathering what is sent: any /dev/kvm will do."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.bare import LONG_MODE_ENTRY, assemble
from tests.support.kernels import ElfSegment, elf
from tests.support.patience import patient

pytestmark = pytest.mark.bare

SENT = b"abcdefghijklmnop" * 25 + b"!!!"
SHOWN_S = 10.0
"""A busy host's bound, the start included, for what takes PolledUart's 20 ms."""


def test_all_that_is_sent_is_shown_with_an_exit_a_byte(tmp_path: Path) -> None:
    code = assemble("polled_uart", LONG_MODE_ENTRY, tmp_path)
    kernel, console = tmp_path / "guest.elf", tmp_path / "console"
    kernel.write_bytes(elf(ElfSegment(data=code, p_memsz=4096)))
    with subprocess.Popen(
        [sys.executable, "-m", "pyvmm", "run", "-v", "--kernel", str(kernel),
         "--console", str(console), "--timeout", "20"],
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as run:  # fmt: skip
        give_up_s = time.monotonic() + patient(SHOWN_S)
        seen_s = None
        while time.monotonic() < give_up_s and run.poll() is None:
            if console.exists() and console.read_bytes() == SENT:
                seen_s = time.monotonic()
                break
            time.sleep(0.01)
        assert seen_s is not None, "the last bytes did not come while the guest ran"
        run.terminate()
        said = run.communicate()[1]
    assert console.read_bytes() == SENT
    exits = re.search(r"exits: mmio \d+, io (\d+),", said)
    assert exits is not None, said
    assert len(SENT) <= int(exits[1]) < 1.4 * len(SENT), said
