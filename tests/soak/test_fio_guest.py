"""What the host makes of what the guest under fio says, and of a VM that ends too early."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from soak.errors import TrialError
from soak.fio_guest import DISK_MIB, FAULTS, SCRIPT, FioGuest
from soak.parts.kills import ACK
from soak.processes import killed_at_last
from tests.support.patience import patient


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[FioGuest]:
    """A guest whose VM is ``cat``, which ends when its input does."""
    with killed_at_last(subprocess.Popen(
        ["cat"], stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )) as vm:
        yield FioGuest(vm, tmp_path, vm)


def say(guest: FioGuest, text: str) -> None:
    with (guest.folder / "console").open("ab") as console:
        console.write(text.encode())


def test_whole_lines_are_counted_once(guest: FioGuest) -> None:
    guest.listen()
    say(guest, "booting\r\npassed vdb\r\npassed vd")
    guest.listen()
    guest.listen()
    say(guest, "c\r\nnot passed vdc\r\nfailed vdf\r\npassed vdb\r\n")
    guest.listen()
    assert guest.counts == {"passed vdb": 2, "passed vdc": 1, "failed vdf": 1}


def test_a_wrong_disk_is_found_and_its_text_is_quoted(guest: FioGuest) -> None:
    say(guest, "passed vdb\r\nbroken vdd\r\nfio: \x1b[2Jverify\r\n")
    with pytest.raises(TrialError, match=r"vdd is wrong: .*\\x1b\[2Jverify"):
        guest.listen()


def test_a_vm_that_ends_too_early_is_found(guest: FioGuest) -> None:
    assert guest.vm.stdin is not None
    guest.vm.stdin.close()
    guest.vm.wait(patient(20))
    with pytest.raises(TrialError, match=r"ended with 0: b''"):
        guest.listen()
    say(guest, "finished\r\n")
    guest.listen()


def test_the_script_is_one_that_a_shell_takes() -> None:
    text = SCRIPT.replace("@FILL@", "1").replace("@BAD@", "8")
    assert "@" not in text
    subprocess.run(["busybox", "sh", "-n"], input=text.encode(), check=True)


def test_a_pass_of_fio_with_any_seed_finds_nothing_wrong_with_a_plain_file(tmp_path: Path) -> None:
    """fio 3.33 finds its own headers wrong with ``--rw=randrw --bs=4k-64k``, and most seeds."""
    (tmp_path / "disk").write_bytes(bytes(DISK_MIB << 20))
    begin = SCRIPT.index("pass() {")
    function = SCRIPT[begin : SCRIPT.index("}\n", begin) + 2].replace("/mnt", str(tmp_path))
    said = subprocess.run(
        ["busybox", "sh", "-c", f"{function}for n in 1 2 3 4 5 6; do pass vdb {tmp_path}/disk $n &&"
         f" grep -q fio-3 {tmp_path}/vdb.said && echo passed $n; done"],
        stdout=subprocess.PIPE, check=False, text=True,
    ).stdout
    assert said.split() == [word for n in range(1, 7) for word in ("passed", str(n))]


def test_the_faults_are_a_script_of_ours(tmp_path: Path) -> None:
    from pyvmm.storage.fault_script import parse_script

    assert len(parse_script(FAULTS, name="faults")) == 3


def test_acknowledged_files_are_lines_of_their_own() -> None:
    console = "ack 1-1\r\nack 1-2\r\n[    2.0] ack 1-9 \r\nack 1-33\r\nack 1-3"
    assert ACK.findall(console) == ["1-1", "1-2", "1-33", "1-3"]
