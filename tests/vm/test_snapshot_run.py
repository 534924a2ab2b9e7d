"""A booted Linux saved by ``pyvmm run --snapshot``, and clones that go on from it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from pyvmm.linux.images import busybox_tree
from tests.support.guest import KERNEL, environment, run_in_guest
from tests.support.patience import patient
from tests.support.warm_runs import finished, pyvmm

pytestmark = pytest.mark.kvm

BOOT_S = 120
PROMPT = r"pyvmm:.*# $"


def boot_words(image: Path, directory: Path, append: str, *options: str) -> list[str]:
    """The command line of a boot that saves itself in ``directory``."""
    return pyvmm(
        "run", "--kernel", KERNEL, "--disk", f"{image},snapshot", "--append", f"quiet {append}",
        "--timeout", str(patient(BOOT_S)), "--snapshot", directory, *options,
    )


def restore_words(directory: Path, *options: str) -> list[str]:
    """The command line of one clone."""
    return pyvmm("restore", directory, "--timeout", str(patient(BOOT_S)), *options)


def test_two_clones_of_a_shell_answer_at_once_each_with_its_own_disk_and_random_bytes(
    image: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "warm"
    status, shown, said = finished(
        boot_words(image, directory, "pyvmm.shell", "--snapshot-at", PROMPT, "--snapshot-exit"),
        wait_s=2 * BOOT_S,
    )
    assert status == 0, shown + said
    assert "goes on from there" in said
    before = image.read_bytes()
    clones = [
        subprocess.Popen(
            restore_words(directory), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=environment(),
        ) for _ in range(2)
    ]
    random_bytes = []
    for number, clone in enumerate(clones):
        script = (
            f"ls /root/clone*; echo I am {number} >/root/clone{number}; sync; sleep 1; "
            "echo 3 >/proc/sys/vm/drop_caches; echo said: $(cat /root/clone*); "
            "echo random: $(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' '); "
            f"exit {40 + number}\n"  # by pyvmm-exit, so by a port that ioperm gave it
        )
        assert clone.stdin is not None
        clone.stdin.write(script.encode())
        clone.stdin.flush()
    for number, clone in enumerate(clones):
        out, err = clone.communicate(timeout=patient(2 * BOOT_S))
        assert clone.returncode == 40 + number, out + err
        assert f"\nsaid: I am {number}\r\n".encode() in out, out
        found = re.search(rb"\nrandom: ([0-9a-f]{32})\r\n", out)
        assert found is not None, out
        random_bytes.append(found[1])
    assert random_bytes[0] != random_bytes[1]
    assert image.read_bytes() == before


def test_a_script_of_the_guest_says_when_by_pyvmm_warm(image: Path, tmp_path: Path) -> None:
    directory = tmp_path / "warm"
    program = busybox_tree.HERE / "pyvmm-warm"
    for request in (f"rm /sbin/{program.name}", f"write {program} /sbin/{program.name}",
                    f"set_inode_field /sbin/{program.name} mode 0100755"):
        subprocess.run(
            ["debugfs", "-w", "-R", request, image], check=True, capture_output=True
        )
    script = "echo at $((40 + 2)); pyvmm-warm; echo behind $?; reboot -f"
    status, shown, said = finished(
        boot_words(image, directory, run_in_guest(script)), wait_s=2 * BOOT_S
    )
    assert status == 0, shown + said
    assert "at 42\r\n" in shown
    assert "behind 0\r\n" in shown
    for clock in ("keep", "now"):
        status, shown, said = finished(
            restore_words(directory, "--clock", clock), wait_s=2 * BOOT_S
        )
        assert status == 0, shown + said
        assert "at 42" not in shown
        assert "behind 0\r\n" in shown
        assert said == ""
