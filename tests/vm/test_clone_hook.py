"""Clones of Linux: each is told by its agent, has new random numbers, and ran the hook."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import pyvmm
from pyvmm.control.client import Client
from tests.support.guest import BUILD, IMAGE, KERNEL
from tests.support.patience import patient
from tests.support.stock import STABLE, stock_kernel

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(1800)]

HOOK = """#!/bin/sh
echo "$PYVMM_CLONE_ID" >>/run/clones
head -c 16 /dev/urandom | md5sum >/run/random
echo hook says hello
"""


def booted(config: pyvmm.MachineConfig, log: Path) -> pyvmm.Vm:
    vm = pyvmm.launch(config, console_log=log)
    vm.wait_for_agent(patient(300))
    return vm


def install(vm: pyvmm.Vm, hook: str) -> None:
    vm.run(["mkdir", "-p", "/etc/pyvmm", "/run"], check=True)
    vm.run(["rm", "-f", "/etc/pyvmm/clone"], check=True)
    vm.write("/etc/pyvmm/clone", hook, 0o755)


def status(socket: Path) -> dict[str, Any]:
    with Client.connect(str(socket), timeout_s=patient(30)) as client:
        return client.call("status", timeout_s=patient(30))


def look_at(clone: pyvmm.Vm, socket: Path) -> str:
    """Check that the guest knows which clone it is; return its random bytes."""
    clone.wait_for_agent(patient(300))
    assert clone.clone_id is not None
    assert clone.run(["cat", "/run/clones"], check=True).stdout == f"{clone.clone_id}\n"
    told = status(socket)
    assert told["clone_id"] == str(clone.clone_id)
    assert told["clone"] == {
        "told": True, "reseeded": True, "clock_set": told["clone"]["clock_set"],
        "hook": "exited", "value": 0, "reason": "", "output": "hook says hello\n",
    }
    return str(clone.run(["cat", "/run/random"], check=True).stdout)


def check_clones(vm: pyvmm.Vm, folder: Path, count: int) -> None:
    """Clones of ``vm`` run its hook and differ; their date is that of this host."""
    install(vm, HOOK)
    seen = set()
    with vm.snapshot() as warm:
        time.sleep(5)
        for number in range(count):
            socket = folder / f"socket{number}"
            with warm.clone(clock="now", control=socket) as clone:
                seen.add(look_at(clone, socket))
                before_s = time.time()
                date = int(clone.run(["date", "+%s"], check=True).stdout)
                assert before_s - 3 < date < time.time() + 3
                assert status(socket)["clone"]["clock_set"] is True
    assert len(seen) == count
    assert vm.run(["test", "-e", "/run/clones"]).status == 1, "the original is no clone"


def test_our_image(tmp_path: Path) -> None:
    config = pyvmm.MachineConfig(
        kernel=KERNEL, disks=[pyvmm.Overlay(IMAGE)], append="quiet", agent=True
    )
    with booted(config, tmp_path / "log") as vm:
        check_clones(vm, tmp_path, 3)
        # A rewind is a clone of its own, also for a command that runs meanwhile.
        number = vm.checkpoint()
        random = set()
        for _ in range(3):
            with vm.begin(["sleep", "1000"]) as command:
                vm.rewind(number)
                with pytest.raises(pyvmm.AgentError):
                    command.wait()
            vm.wait_for_agent(patient(120))
            assert vm.run(["cat", "/run/clones"]).stdout == f"{vm.clone_id}\n"
            random.add(vm.run(["cat", "/run/random"]).stdout)
        assert len(random) == 3
        # From its end, too.
        assert vm.stop().kind is pyvmm.Kind.STOPPED
        vm.rewind(number)
        vm.resume()
        vm.wait_for_agent(patient(120))
        assert vm.run(["cat", "/run/clones"]).stdout == f"{vm.clone_id}\n"
        # A hook that fails.
        install(vm, "#!/bin/sh\necho no address >&2; exit 3\n")
        vm.checkpoint()
        vm.rewind()
        with pytest.raises(pyvmm.AgentError, match="exited with status 3: no address"):
            vm.wait_for_agent(patient(120))
        assert vm.run(["echo", "x"]).stdout == "x\n"


def test_debian_with_systemd(tmp_path: Path) -> None:
    kernel = stock_kernel(STABLE)
    config = pyvmm.MachineConfig(
        kernel=kernel.vmlinuz, disks=[pyvmm.Overlay(BUILD / "debian.img")], memory="512M",
        append="quiet", agent=True,
    )
    with booted(config, tmp_path / "log") as vm:
        vm.run(["systemctl", "is-system-running", "--wait"], timeout_s=patient(300))
        check_clones(vm, tmp_path, 2)
