"""Boot tests.  A panic, an oops or a WARNING of the guest fails each of them by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

import pyvmm

CHECK = """\
set -e
grep -w "$1" /proc/cmdline >/tmp/words
mount | grep ' / ' >/tmp/root
"""
shared = pytest.mark.pyvmm(scope="module")  # these tests share one machine


@shared
def test_the_kernel_is_linux(vm: pyvmm.Vm) -> None:
    assert vm.run(["uname", "-s"], check=True).stdout == "Linux\n"


@shared
def test_a_command_that_fails_tells_why(vm: pyvmm.Vm) -> None:
    done = vm.run(["ls", "/nowhere"])
    assert done.status != 0
    assert "No such file" in done.stderr


@pytest.mark.pyvmm(append="my.word=42", memory="512M")
def test_a_script_goes_in_and_a_file_comes_out(vm: pyvmm.Vm, tmp_path: Path) -> None:
    vm.write("/tmp/check", CHECK)
    vm.run(["sh", "/tmp/check", "my.word=42"], check=True)
    vm.get("/tmp/root", tmp_path)
    assert "ext4" in Path(tmp_path, "root").read_text()
