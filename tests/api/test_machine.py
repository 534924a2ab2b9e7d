"""``pyvmm.Machine`` from a script: bare guests of a few instructions on any /dev/kvm."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pyvmm
from pyvmm.virtio.entropy.device import EntropyDevice
from tests.support.kernels import ElfSegment, elf
from tests.support.patience import patient
from tests.support.vhost_user_peers import open_fds

pytestmark = pytest.mark.bare

PRINT_HI = bytes.fromhex(
    "66baf803"  # mov dx, 0x3f8
    "b068 ee b069 ee b00a ee"  # "hi\n"
)
STATUS_7 = bytes.fromhex("b007 e6f4 f4")  # mov al, 7; out 0xf4, al; hlt
SPIN = bytes.fromhex("ebfe")
ECHO_THEN_STATUS = bytes.fromhex(
    "66bafd03 ec a801 74fb"  # again: mov dx, 0x3fd; in al, dx; test al, 1; jz again
    "66baf803 ec 3c21 7403"  # in al, dx; cmp al, '!'; je done
    "ee ebeb"  # out dx, al; jmp again (to mov)
    "b003 e6f4 f4"
)

MakeConfig = Callable[..., pyvmm.MachineConfig]


@pytest.fixture
def config(tmp_path: Path) -> MakeConfig:
    """Makes the configuration of a machine that runs some code."""

    def make(code: bytes, **more: Any) -> pyvmm.MachineConfig:
        kernel = tmp_path / f"guest-{len(os.listdir(tmp_path))}.elf"
        kernel.write_bytes(elf(ElfSegment(data=code, p_memsz=4096)))
        return pyvmm.MachineConfig(
            **{"kernel": kernel, "timeout_s": patient(30), **more}
        )

    return make


def test_a_guest_prints_and_reports(config: MakeConfig) -> None:
    with pyvmm.Machine(config(PRINT_HI + STATUS_7)) as machine:
        assert machine.outcome is None
        outcome = machine.run()
        assert (outcome.kind, outcome.value, outcome.exit_status) == (
            pyvmm.Kind.GUEST_STATUS, 7, 7)
        assert machine.console.text == "hi\n"
        assert machine.exits.io >= 4
        assert machine.wait() == outcome == machine.outcome == machine.stop()
        assert machine.evidence.has_printed


def test_a_script_talks_to_the_guest(config: MakeConfig) -> None:
    lines: list[str] = []
    with pyvmm.Machine(config(ECHO_THEN_STATUS)) as machine:
        machine.console.on_line(lines.append)
        machine.start()
        machine.console.write("hello\n")
        assert machine.console.expect("h(.*)o", patient(20)).group(1) == "ell"
        machine.console.write("!")
        outcome = machine.wait(patient(20))
        assert outcome == pyvmm.Outcome(pyvmm.Kind.GUEST_STATUS, 3)
        with pytest.raises(pyvmm.ExpectError, match="the run has ended"):
            machine.console.expect("never", patient(20))
    assert lines == ["hello"]


def test_a_machine_is_paused_and_stopped_from_any_thread(config: MakeConfig) -> None:
    with pyvmm.Machine(config(SPIN)) as machine:
        machine.start()
        assert machine.wait(0.01) is None
        ended: list[object] = []

        def control() -> None:
            ended.append(machine.pause())
            machine.resume()
            ended.append(machine.stop())

        thread = threading.Thread(target=control)
        thread.start()
        thread.join(patient(20))
        stopped = pyvmm.Outcome(pyvmm.Kind.STOPPED)
        assert ended == [True, stopped]
        assert machine.outcome == stopped
        assert stopped.exit_status == 0


def test_a_time_limit_is_an_outcome(config: MakeConfig) -> None:
    with pyvmm.Machine(config(SPIN, timeout_s=0.1)) as machine:
        assert machine.run().kind is pyvmm.Kind.TIMEOUT


def test_misuse_is_one_clear_exception(config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="takes a MachineConfig, not str"):
        pyvmm.Machine("bzImage")  # type: ignore[arg-type]
    for devices, said in (
        ([EntropyDevice()], "are virtio devices by name"), ({3: EntropyDevice()}, "must be str"),
        ({"own": object()}, "device own: must be a VirtioDevice, not object"),
        ({"own": EntropyDevice}, "not the class EntropyDevice"),
    ):
        with pytest.raises(TypeError, match=said):
            pyvmm.Machine(config(STATUS_7), devices=devices)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="report must be a function of a text, not str"):
        pyvmm.Machine(config(STATUS_7), report="log")  # type: ignore[arg-type]
    with pytest.raises(pyvmm.ConfigError, match="missing"):
        pyvmm.Machine(pyvmm.MachineConfig(kernel=tmp_path / "missing"))
    machine = pyvmm.Machine(config(STATUS_7))
    with pytest.raises(RuntimeError, match=r"wait\(\): the machine was not started"):
        machine.wait()
    with pytest.raises(pyvmm.ExpectError, match="0 s have passed, and the machine was not started"):
        machine.console.expect("login: ", 0)
    assert machine.stop() is None
    machine.run()
    with pytest.raises(RuntimeError, match="runs once"):
        machine.start()
    machine.close()
    machine.close()
    for call in (machine.start, machine.wait, machine.run, machine.stop, machine.pause,
                 machine.resume, machine.quiesce, machine.refresh_disks):
        with pytest.raises(RuntimeError, match="the machine was closed"):
            call()
    for use in (
        lambda: machine.console.write("x"), lambda: machine.console.expect("x"),
        lambda: machine.console.on_line(print),
    ):
        with pytest.raises(RuntimeError, match="the machine was closed"):
            use()
    assert machine.console.text == ""
    with pytest.raises(TypeError, match="report must be a function"):
        pyvmm.Machine(config(STATUS_7), report=5)  # type: ignore[arg-type]


def test_a_report_that_raises_ends_the_run_and_is_named(config: MakeConfig) -> None:
    def report(line: str) -> None:
        raise SystemExit(line)

    with pyvmm.Machine(config(SPIN), report=report) as machine:
        machine._machine.runner.loop.call_soon(lambda: machine._machine.runner.report("odd"))
        outcome = machine.run()
    assert outcome.kind is pyvmm.Kind.HOST_ERROR
    assert "the report hook" in outcome.detail
    assert "SystemExit: odd" in outcome.detail


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"memory": "lots"}, pyvmm.ConfigError, "memory 'lots': is not a size"),
        ({"memory": 3.5}, TypeError, "memory must be a text"),
        ({"memory": "1M"}, pyvmm.ConfigError, "must be"),
        ({"cpus": "2"}, TypeError, "cpus must be int, not str"),
        ({"cpus": 99}, pyvmm.ConfigError, "must be from 1 to"),
        ({"disks": "root.img"}, TypeError, "disks is a list"),
        ({"disks": {"root": "root.img"}}, TypeError, "disks is a list"),
        ({"disks": [None]}, TypeError, "is no path, no disk of pyvmm"),
        ({"kernel": None}, TypeError, "kernel must be a path, not NoneType"),
        ({"initrd": 3}, TypeError, "initrd must be a path or None, not int"),
        ({"memory": "256"}, pyvmm.ConfigError, "memory '256': has no unit: write '256M'"),
        ({"cmdline": 3}, TypeError, "cmdline must be str or None, not int"),
        ({"timeout_s": "3"}, TypeError, "timeout_s must be seconds or None, not str"),
        ({"append": None}, TypeError, "append must be str"),
        ({"cmdline": 5}, TypeError, "cmdline must be str or None, not int"),
        ({"timeout_s": True}, TypeError, "timeout_s must be"),
        ({"initrd": 5}, TypeError, "initrd must be"),
        ({"disks": None}, TypeError, "disks is a list"),
        ({"cpu": "z80"}, pyvmm.ConfigError, "unknown model"),
        ({"agent": 1}, TypeError, "agent must be True, False, 'image', 'inject' or 'none', not in"),
        ({"agent": "yes"}, pyvmm.ConfigError, "--agent yes: is none of none, image, inject"),
        ({"agent": True, "append": "rdinit=/x"}, pyvmm.ConfigError, "--agent: the guest starts"),
    ],
)
def test_a_field_of_the_wrong_kind(
    config: MakeConfig, fields: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        pyvmm.Machine(config(STATUS_7, **fields))


def test_a_callback_that_raises_ends_the_run_and_is_shown(config: MakeConfig) -> None:
    def broken(line: str) -> None:
        raise ValueError(f"cannot read {line!r}")

    with pyvmm.Machine(config(PRINT_HI + SPIN)) as machine:
        machine.console.on_line(broken)
        outcome = machine.run()
    assert outcome.kind is pyvmm.Kind.HOST_ERROR
    assert "the console.on_line hook" in outcome.detail
    assert "broken" in outcome.detail
    assert "Traceback" in outcome.detail
    assert outcome.detail.endswith("ValueError: cannot read 'hi'")


def test_hooks_registers_and_memory_of_a_machine(config: MakeConfig) -> None:
    seen: list[tuple[int, int | None]] = []

    def on_port(access: Any) -> int | None:
        seen.append((access.address, access.value))
        return 9 if access.value == 7 else None

    with pyvmm.Machine(config(PRINT_HI + STATUS_7)) as machine:
        machine.on_port(range(0xF0, 0x100), on_port)
        entry = machine.vcpus[0].registers.rip
        assert machine.memory.read(entry, 4) == PRINT_HI[:4]
        assert machine.run() == pyvmm.Outcome(pyvmm.Kind.GUEST_STATUS, 9)
    assert seen == [(0xF4, 7)]
    with pytest.raises(RuntimeError, match="closed"):
        machine.on_port(0x80, on_port)


@pytest.mark.parametrize("call", ["wait", "stop", "pause", "quiesce", "close"])
def test_a_callback_that_would_wait_for_itself_is_told(config: MakeConfig, call: str) -> None:
    said: list[str] = []

    def on_line(_line: str) -> None:
        try:
            getattr(machine, call)()
        except RuntimeError as error:
            said.append(str(error))

    with pyvmm.Machine(config(PRINT_HI + STATUS_7)) as machine:
        machine.console.on_line(on_line)
        machine.run()
    assert len(said) == 1
    assert "in a thread of the run would wait for ever" in said[0]


def test_disks_of_all_kinds_are_told_to_the_guest(config: MakeConfig, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    disks = [
        path, pyvmm.MemoryDisk(4096), pyvmm.MemoryDisk(4096), pyvmm.disk(
            pyvmm.Overlay(pyvmm.MemoryDisk(1 << 20)), serial="over", queues=2),
    ]
    with pyvmm.Machine(config(STATUS_7, disks=disks)) as machine:
        slots = machine._machine.board.slots
        assert [slot.name for slot in slots] == [
            "virtio0", "virtio1", "virtio2", "virtio3", "entropy"]
        assert machine.run().value == 7
    with pytest.raises(pyvmm.ConfigError, match="given twice"):
        pyvmm.Machine(config(STATUS_7, disks=[path, str(path)]))


def test_odd_things_are_logged_unless_somebody_takes_them(
    config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(bytes((1 << 20) + 1))
    said: list[str] = []
    with pyvmm.Machine(config(STATUS_7, disks=[path]), report=said.append):
        pass
    assert any("odd.img" in line for line in said)
    assert caplog.records == []
    with pyvmm.Machine(config(STATUS_7, disks=[path])):
        pass
    assert [record.name for record in caplog.records] == ["pyvmm"] * len(said)


def process_state() -> tuple[object, ...]:
    handlers = tuple(signal.getsignal(number) for number in signal.valid_signals())
    return (
        handlers, signal.pthread_sigmask(signal.SIG_BLOCK, []), sys.getswitchinterval(),
        gc.isenabled(), gc.get_threshold(), Path.cwd(), sorted(sys.path),
    )


def test_machines_in_several_threads_leave_nothing_behind(config: MakeConfig) -> None:
    """200 of them, and the process is as it was before: also while they run."""
    configs = [config(PRINT_HI + STATUS_7), config(SPIN)]

    def one(index: int) -> None:
        with pyvmm.Machine(configs[index % 2]) as machine:
            machine.start()
            if index % 2:
                assert machine.pause(patient(20))
                machine.resume()
                assert machine.stop() is not None
            else:
                assert machine.wait(patient(30)) == pyvmm.Outcome(pyvmm.Kind.GUEST_STATUS, 7)
                assert machine.console.text == "hi\n"

    one(0)  # what is imported and cached
    one(1)
    gc.collect()
    before = process_state(), open_fds(), threading.active_count(), mappings()
    failed: list[BaseException] = []

    def many() -> None:
        try:
            for index in range(50):
                one(index)
                assert process_state() == before[0]
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patient(200))
    assert failed == []
    gc.collect()
    assert (process_state(), open_fds(), threading.active_count()) == before[:3]
    assert mappings() <= before[3] + 60, "threads' stacks and arenas may be kept, but no machine's"


def mappings() -> int:
    """The number of the process's mappings."""
    return len(Path("/proc/self/maps").read_text().splitlines())


def test_the_face_is_lazy_and_complete() -> None:
    import subprocess

    code = (
        "import sys, pyvmm; assert len([m for m in sys.modules if m.startswith('pyvmm')]) == 1\n"
        "for name in pyvmm.__all__: assert getattr(pyvmm, name) is not None\n"
        "assert set(pyvmm.__all__) <= set(dir(pyvmm))\n"
        "try: pyvmm.Machin\n"
        "except AttributeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "module 'pyvmm' has no attribute 'Machin'\n"


def test_a_hook_ends_the_run(config: MakeConfig) -> None:
    with pyvmm.Machine(config(PRINT_HI + SPIN)) as machine:
        machine.console.on_line(lambda _line: machine.finish())
        assert machine.run() == pyvmm.Outcome(pyvmm.Kind.STOPPED)
    with pyvmm.bare(bytes.fromhex("e651 ebfe")) as guest:
        guest.on_port(0x51, lambda _access: guest.finish())
        assert guest.run() == pyvmm.Outcome(pyvmm.Kind.STOPPED)
    with pytest.raises(RuntimeError, match="closed"):
        guest.finish()


def test_a_disk_is_called_by_the_guests_name_too(config: MakeConfig) -> None:
    with pyvmm.Machine(config(STATUS_7, disks=[pyvmm.MemoryDisk(512)])) as machine:
        machine.on_request("vda", lambda _request: None)
        with pytest.raises(ValueError, match="no disk 'vdb'"):
            machine.on_request("vdb", lambda _request: None)
