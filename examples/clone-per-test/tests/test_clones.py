"""A hundred tests, each of which leaves its machine in ruins.  None of the others notices."""

from __future__ import annotations

import pytest

import pyvmm

SEEN: set[str] = set()
"""The random bytes of all guests so far: no two machines may have the same."""
RUIN = "echo $1 >/root/was-here; sync; rm -rf /root/numbers /bin"


@pytest.mark.parametrize("number", range(100))
def test_a_machine_of_its_own(guest: pyvmm.Vm, number: int) -> None:
    lines = guest.run(["wc", "-l", "/root/numbers"], check=True).stdout
    assert lines.split() == ["1000", "/root/numbers"]
    assert guest.run(["ls", "/root"], check=True).stdout == "numbers\n"
    random = guest.run(["head", "-c16", "/dev/urandom"], check=True).stdout_bytes.hex()
    assert random not in SEEN
    SEEN.add(random)
    guest.run(["sh", "-c", RUIN, "sh", str(number)], check=True)
