"""The end of a launched machine: by close, by nobody, by the end of its owner; nothing is left."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import pyvmm
from pyvmm import MachineConfig
from tests.support.launched import is_there, until
from tests.support.patience import patient
from tests.support.tiny_guests import SPIN, write_guest

pytestmark = pytest.mark.bare


def test_the_process_ends_when_its_owner_is_killed(tmp_path: Path, kernel: Path) -> None:
    script = (
        "import sys, time, pyvmm\n"
        "vm = pyvmm.launch(pyvmm.MachineConfig(kernel=sys.argv[1]))\n"
        "vm.console.expect('hello')\n"
        "print(vm.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(kernel)], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert is_there(pid)
        assert os.getsid(pid) == pid  # Ctrl-C at the owner's terminal does not reach it
        owner.kill()
        until(lambda: not is_there(pid))


def test_an_owner_that_ends_without_close_ends_and_so_does_the_process(kernel: Path) -> None:
    script = (
        "import sys, pyvmm\n"
        "vm = pyvmm.launch(pyvmm.MachineConfig(kernel=sys.argv[1]))\n"
        "print(vm.pid)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(kernel)], capture_output=True, text=True, check=True,
        timeout=patient(60),
    )
    until(lambda: not is_there(int(done.stdout)))


def test_a_forgotten_vm_warns_and_is_gone(kernel: Path) -> None:
    vm = pyvmm.launch(MachineConfig(kernel=kernel))
    pid = vm.pid
    with pytest.warns(ResourceWarning, match="never closed"):  # noqa: PT031 - del is the call
        del vm
        gc.collect()
    assert not is_there(pid)


def test_a_vm_forgotten_in_its_own_callback_is_gone_too(kernel: Path) -> None:
    """The collector runs in any thread."""
    vm = pyvmm.launch(MachineConfig(kernel=kernel))
    pid, held = vm.pid, [vm]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vm.on_end(lambda outcome: held.clear())
        os.kill(pid, signal.SIGKILL)
        del vm
        until(lambda: not held and not is_there(pid))
        until(lambda: not [t for t in threading.enumerate() if f"VM {pid}" in t.name])
    assert [str(one.message) for one in caught] == ["the VM was never closed"]


def test_an_interrupt_during_a_start_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here of a machine that waits for its disk."""
    held: list[socket.socket] = []
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]

        def interrupt(*_: object) -> None:
            held.append(silent.accept()[0])
            raise KeyboardInterrupt

        monkeypatch.setattr("pyvmm.control.client.Client.wait_hello", interrupt)
        kernel = write_guest(tmp_path / "guest.elf", SPIN)
        disk = pyvmm.NbdDisk(f"nbd://127.0.0.1:{port}/x")
        began_s = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            pyvmm.launch(MachineConfig(kernel=kernel, disks=[disk]))
        assert time.monotonic() - began_s < patient(8)
        held[0].close()


def test_close_is_idempotent_and_calls_after_it_say_so(kernel: Path) -> None:
    vm = pyvmm.launch(MachineConfig(kernel=kernel))
    threads = [threading.Thread(target=vm.close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    vm.close()
    assert vm.outcome is not None
    calls: list[Callable[[], object]] = [
        vm.pause, vm.refresh_disks, vm.wait, lambda: vm.run(["true"]),
        lambda: vm.console.expect("hello"), lambda: vm.console.write("x"),
        lambda: vm.get("/etc/passwd", kernel.parent),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="closed"):
            call()


def test_a_stopped_process_does_not_hold_up_close(
    kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("session.STOP_TIMEOUT_S", "process.END_TIMEOUT_S", "process.TERM_TIMEOUT_S",
                 "session.END_TIMEOUT_S", "session.TOLD_TIMEOUT_S"):
        monkeypatch.setattr(f"pyvmm.launcher.{name}", 0.2)
    vm = pyvmm.launch(MachineConfig(kernel=kernel))
    os.kill(vm.pid, signal.SIGSTOP)
    vm.close()
    assert vm.outcome is not None
    assert "signal 9" in vm.outcome.detail


def test_no_warning_is_raised_at_the_end_of_a_closed_vm(kernel: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pyvmm.launch(MachineConfig(kernel=kernel)) as vm:
            vm.wait(0.0)
        del vm
        gc.collect()
