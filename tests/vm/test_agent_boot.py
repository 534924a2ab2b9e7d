"""The agent in guests of every kind: in our image, brought into it, into an image without a shell,
and into Debian with systemd and its stock kernel.
"""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from pyvmm.agent.link import JobEnd
from pyvmm.cli.parse import parse_disk
from pyvmm.config import RunConfig
from pyvmm.x86.layout import MIB
from tests.support.agent_guest import AgentGuest
from tests.support.guest import BUILD, IMAGE, KERNEL
from tests.support.roots import find_tool
from tests.support.stock import STABLE, stock_kernel

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(900)]

BARE_INIT = """
#include <unistd.h>
int main(void) { for (;;) pause(); }
"""


def config(disk: str, agent: str, *, kernel: Path = KERNEL, memory: int = 256) -> RunConfig:
    return RunConfig(
        kernel=kernel, disks=(parse_disk(disk),), agent=agent, append="quiet",
        memory_bytes=memory * MIB, console="none",
    )


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run(guest: AgentGuest, *argv: str) -> tuple[int, str, str]:
    """Status and output of a command that has to end by itself."""
    done = guest.run(argv)
    assert done.result.kind is JobEnd.EXITED, done
    return done.result.value, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize("agent", ["image", "inject"])
def test_our_image_takes_orders(agent: str) -> None:
    with AgentGuest(config(f"{IMAGE},snapshot", agent)) as guest:
        assert run(guest, "sh", "-c", "echo out; echo err >&2; exit 7") == (7, "out\n", "err\n")
        assert run(guest, "cat", "/proc/1/comm") == (0, "init\n", "")
        mounts = run(guest, "cat", "/proc/self/mountinfo")[1]
        assert sum(" / / rw" in line for line in mounts.splitlines()) == 1, "the root is the disk's"
        assert "ext4 /dev/root" in mounts or "ext4 /dev/vda" in mounts
        assert run(guest, "sh", "-c", "grep -sc pyvmm-agent /proc/[0-9]*/comm | grep -c :1") == (
            0, "1\n", ""), "one agent alone"
        assert guest.reports == [] or agent == "inject"


def test_an_image_without_a_shell_takes_orders(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sbin").mkdir(parents=True)
    (tree / "dev").mkdir()
    source = tmp_path / "init.c"
    source.write_text(BARE_INIT)
    subprocess.run(
        ["gcc", "-Os", "-static", "-s", "-o", tree / "sbin/init", source], check=True
    )
    image = tmp_path / "bare.img"
    subprocess.run(
        [find_tool("mke2fs"), "-q", "-t", "ext4", "-d", tree, image, "16M"], check=True
    )
    before = digest(image)
    with AgentGuest(config(f"{image},ro", "inject")) as guest:
        guest.wait_until_ready()
        done = guest.run(["/bin/sh", "-c", "true"])
        assert done.result.kind is JobEnd.FAILED
        assert done.result.value == 2, "ENOENT"
        assert "/bin/sh" in done.result.reason
    assert digest(image) == before


def test_debian_with_systemd_is_ready_with_the_first_command() -> None:
    image = BUILD / "debian.img"
    before = digest(image)
    kernel = stock_kernel(STABLE)
    with AgentGuest(config(f"{image},snapshot", "inject", kernel=kernel.vmlinuz, memory=512)
                    ) as guest:
        status, out, err = run(guest, "systemctl", "is-system-running", "--wait")
        assert (status, out, err) == (0, "running\n", "")
        assert run(guest, "uname", "-r") == (0, f"{kernel.release}\n", "")
        assert run(guest, "cat", "/proc/1/comm") == (0, "systemd\n", "")
        assert run(guest, "systemctl", "--failed", "--no-legend", "--plain") == (0, "", "")
    assert digest(image) == before
