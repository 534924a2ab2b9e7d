"""Boot tests: nothing to import but pytest.  A panic, an oops or a WARNING fails each by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

CHECK = """\
set -e
grep -w "$1" /proc/cmdline >/tmp/words
mount | grep ' / ' >/tmp/root
"""
shared = pytest.mark.pyvmm(scope="module")
"""These tests share one machine, because none of them leaves anything behind that matters."""


@shared
def test_the_kernel_is_linux(vm):
    assert vm.run(["uname", "-s"], check=True).stdout == "Linux\n"


@shared
def test_a_command_that_fails_tells_why(vm):
    done = vm.run(["ls", "/nowhere"])
    assert done.status != 0
    assert "No such file" in done.stderr


@pytest.mark.pyvmm(append="my.word=42", memory="512M")
def test_a_script_goes_in_and_a_file_comes_out(vm, tmp_path):
    vm.write("/tmp/check", CHECK)
    vm.run(["sh", "/tmp/check", "my.word=42"], check=True)
    vm.get("/tmp/root", tmp_path)
    assert "ext4" in Path(tmp_path, "root").read_text()
