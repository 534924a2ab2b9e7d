"""The numbers of system calls, against the system's headers."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from pyvmm.jail.syscalls import NAMES, NUMBERS


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_numbers_are_those_of_the_headers() -> None:
    done = subprocess.run(
        ["cc", "-E", "-dM", "-include", "asm/unistd_64.h", "-x", "c", "/dev/null"],
        capture_output=True, text=True, check=False,
    )
    if done.returncode:
        pytest.skip("no kernel headers for x86-64")
    theirs = {
        name: int(number) for name, number in re.findall(r"#define __NR_(\w+) (\d+)", done.stdout)
    }
    assert len(theirs) > 300
    # Headers newer than our list have more.
    newest = max(NAMES)
    assert {name: n for name, n in theirs.items() if n <= newest} == {
        name: n for name, n in NUMBERS.items() if n <= max(theirs.values()) and name in theirs
    }


def test_no_number_has_two_names() -> None:
    assert len(NAMES) == len(NUMBERS)
    assert (NUMBERS["read"], NUMBERS["seccomp"], NUMBERS["clone3"]) == (0, 317, 435)
