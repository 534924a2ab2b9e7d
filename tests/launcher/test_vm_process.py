"""The process of a launched machine: its start, its end in every way, and that nothing is left."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import pyvmm
from pyvmm import Kind, MachineConfig
from tests.support.launched import is_there, until
from tests.support.patience import patient
from tests.support.tiny_guests import (
    REPORT_7,
    SPIN,
    TRIPLE_FAULT,
    echoes,
    prints,
    prints_for_ever,
    waits,
    write_guest,
)

pytestmark = pytest.mark.bare


def test_a_run_from_start_to_status(tmp_path: Path) -> None:
    kernel = write_guest(tmp_path / "guest.elf", prints(b"hello\r\nbye"), REPORT_7)
    log = tmp_path / "console.log"
    with pyvmm.launch(MachineConfig(kernel=kernel), console_log=log) as vm:
        pid = vm.pid
        outcome = vm.wait(patient(20))
        assert outcome is not None
        assert (outcome.kind, outcome.value) == (Kind.GUEST_STATUS, 7)
        assert vm.outcome == outcome == vm.stop()
        assert vm.console.text == "hello\r\nbye"
        assert vm.evidence["has_printed"] is True
        assert vm.end_registers[0].startswith("vcpu0: rax ")
        assert vm.registers().rip == vm.registers(0).rip > 0
    assert log.read_bytes() == b"hello\r\nbye"
    assert not is_there(pid)


def test_a_guest_that_ends_at_once_has_an_outcome_every_time(tmp_path: Path) -> None:
    """Its process waits until its owner has heard."""
    kernel = write_guest(tmp_path / "guest.elf", prints(b"!"), REPORT_7)
    for _ in range(10):
        with pyvmm.launch(MachineConfig(kernel=kernel)) as vm:
            outcome = vm.wait(patient(20))
            assert outcome is not None
            assert outcome.value == 7
            assert vm.console.text == "!"


def test_stop_pause_memory_and_registers(kernel: Path) -> None:
    with pyvmm.launch(MachineConfig(kernel=kernel, memory=64 << 20)) as vm:
        vm.console.expect("hello\n", patient(20))
        assert vm.wait(0.01) is None
        assert vm.outcome is None
        with pytest.raises(RuntimeError, match="pause it first"):
            vm.registers()
        assert vm.pause()
        assert [vm.is_paused] == [True]
        registers = vm.registers()
        assert vm.memory.read(registers.rip, 2) == SPIN
        assert len(vm.memory.read(0x100000, 3 << 20)) == 3 << 20
        assert vm.memory.read(0, 0) == b""
        with pytest.raises(pyvmm.PyvmmError, match="is not RAM"):
            vm.memory.read(64 << 20, 1)
        with pytest.raises(pyvmm.PyvmmError, match="vcpu"):
            vm.registers(1)
        vm.resume()
        assert [vm.is_paused] == [False]
        vm.refresh_disks()
        assert vm.stop().kind is Kind.STOPPED
        with pytest.raises(pyvmm.EndedError, match="stopped by the script"):
            vm.pause()


def test_console_input_and_lines(tmp_path: Path) -> None:
    lines: list[str] = []
    with pyvmm.launch(
        MachineConfig(kernel=write_guest(tmp_path / "guest.elf", prints(b"> "), echoes()))
    ) as vm:
        vm.console.on_line(lines.append)
        vm.console.expect("> ", patient(20))
        vm.console.write("echo one\necho two\n")
        vm.console.expect("two\n", patient(20))
        until(lambda: lines == ["> echo one", "echo two"])
        with pytest.raises(TypeError):
            vm.console.write(7)  # type: ignore[arg-type]
        with pytest.raises(pyvmm.PyvmmError, match="at most"):
            vm.console.write(bytes((1 << 20) + 1))


def test_a_callback_may_type_and_stop_but_not_wait(tmp_path: Path) -> None:
    seen: list[Exception] = []
    with pyvmm.launch(
        MachineConfig(kernel=write_guest(tmp_path / "guest.elf", prints(b">\n"), echoes()))
    ) as vm:
        def answer(line: str) -> None:
            if line.endswith("bye"):
                vm.finish()
            else:
                for call in (vm.wait, vm.stop, vm.close, vm.pause):
                    try:
                        call()
                    except RuntimeError as error:
                        seen.append(error)
                vm.console.write("bye\n")

        vm.console.on_line(answer)
        vm.console.write("\n")  # the first line may have gone by before the callback was there
        assert vm.wait(patient(20)) is not None
    assert len(seen) >= 4
    assert "use another thread" in str(seen[0])


def test_a_callback_that_raises_fails_the_run(kernel: Path) -> None:
    with pyvmm.launch(MachineConfig(kernel=kernel)) as vm:
        vm.on_end(lambda outcome: 1 / 0)
        vm.finish()
        vm.wait(patient(20))
        with pytest.raises(pyvmm.PyvmmError, match="ZeroDivisionError"):
            vm.console.expect("never", patient(20))


@pytest.mark.parametrize("how", ["fail", "outcome", "kill"])
def test_whoever_waits_is_told_at_once(kernel: Path, how: str) -> None:
    """By the error given to fail, or by the outcome."""
    told: list[BaseException] = []
    with pyvmm.launch(MachineConfig(kernel=kernel)) as vm:
        def wait(call: Callable[[], object]) -> None:
            try:
                call()
            except pyvmm.PyvmmError as error:
                told.append(error)

        threads = [
            threading.Thread(target=wait, args=(call,))
            for call in (
                lambda: vm.console.expect("never", 600),
                lambda: vm.wait_for_agent(600),
                lambda: vm.run(["true"], timeout_s=600),
                lambda: vm.put(kernel, "/", timeout_s=600),
            )
        ]
        for thread in threads:
            thread.start()
        until(lambda: len(told) == 2)  # run and put find no agent
        mine = pyvmm.PyvmmError("the last straw")
        began_s = time.monotonic()
        if how == "fail":
            vm.fail(mine)
            vm.fail(pyvmm.PyvmmError("another"))
            assert vm.failure is mine
        elif how == "outcome":
            vm.finish()
        else:
            os.kill(vm.pid, signal.SIGKILL)
        for thread in threads:
            thread.join()
        assert time.monotonic() - began_s < patient(5)
        assert all(isinstance(error, pyvmm.AgentError) for error in told[:2])
        outcome = vm.wait(patient(20))
        assert outcome is not None
        if how == "fail":
            assert told[2:] == [mine, mine]
            with pytest.raises(pyvmm.PyvmmError, match="the last straw"):
                vm.run(["true"])
        elif how == "outcome":
            assert sorted(type(error).__name__ for error in told[2:]) == [
                "EndedError", "ExpectError"]
            assert outcome.kind is Kind.STOPPED
        else:
            assert outcome.kind is Kind.HOST_ERROR
            assert "ended by signal 9" in outcome.detail
            with pytest.raises(pyvmm.EndedError, match="signal 9"):
                vm.run(["true"])


def test_on_end_comes_before_anybody_is_told(tmp_path: Path) -> None:
    kernel = write_guest(tmp_path / "guest.elf", prints(b"x\n"), TRIPLE_FAULT)
    mine = pyvmm.PyvmmError("no wonder")
    with pyvmm.launch(MachineConfig(kernel=kernel)) as vm:
        vm.on_end(lambda outcome: vm.fail(mine))
        with pytest.raises(pyvmm.PyvmmError, match="no wonder"):
            vm.wait_for_agent(patient(20))
        outcomes: list[pyvmm.Outcome] = []
        vm.on_end(outcomes.append)
        assert outcomes == [vm.wait()]
        assert outcomes[0].kind is Kind.TRIPLE_FAULT
        assert "rip" in outcomes[0].detail


def test_what_cannot_start_is_an_error_of_launch(tmp_path: Path, kernel: Path) -> None:
    reported: list[str] = []
    with pytest.raises(pyvmm.ConfigError, match=r"nothing\.elf: cannot open") as error:
        pyvmm.launch(MachineConfig(kernel=tmp_path / "nothing.elf"), report=reported.append)
    assert error.value.subject.endswith("nothing.elf")
    with pytest.raises(pyvmm.ConfigError, match="--cpus"):
        pyvmm.launch(MachineConfig(kernel=kernel, cpus=99))
    with pytest.raises(TypeError, match=r"MemoryDisk.*pyvmm\.Machine"):
        pyvmm.launch(MachineConfig(kernel=kernel, disks=[pyvmm.MemoryDisk(512)]))
    with pytest.raises(pyvmm.ConfigError, match="console_log"):
        pyvmm.launch(MachineConfig(kernel=kernel), console_log=tmp_path)
    assert reported == []


def test_what_is_odd_is_reported(tmp_path: Path, kernel: Path) -> None:
    """The lines that pyvmm run prints."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1000))
    reported: list[str] = []
    with pyvmm.launch(MachineConfig(kernel=kernel, disks=[image]), report=reported.append) as vm:
        vm.console.expect("hello", patient(20))
        until(lambda: bool(reported))
    assert "disk.img" in reported[0]
    assert not reported[0].startswith("pyvmm")


def test_a_flood_is_whole_in_the_file_and_a_slow_client_holds_nobody_up(tmp_path: Path) -> None:
    line = b"0123456789abcdef" * 63 + b"end of a line.\n"
    kernel = write_guest(tmp_path / "guest.elf", prints_for_ever(line))
    log = tmp_path / "console.log"
    is_over = threading.Event()
    with pyvmm.launch(MachineConfig(kernel=kernel), console_log=log) as vm:
        vm.console.on_line(lambda text: is_over.wait(patient(60)))
        until(lambda: log.stat().st_size > 100_000, 60)
        is_over.set()
        assert vm.stop().kind is Kind.STOPPED
        text = vm.console.text
    data = log.read_bytes()
    assert data == (line * (len(data) // len(line) + 1))[: len(data)]
    assert text.encode() == data


def test_several_at_once(tmp_path: Path) -> None:
    kernel = write_guest(tmp_path / "guest.elf", waits(1 << 20), prints(b"hello\n"), SPIN)
    vms = [pyvmm.launch(MachineConfig(kernel=kernel)) for _ in range(4)]
    try:
        for vm in vms:
            vm.console.expect("hello", patient(20))
        assert len({vm.pid for vm in vms}) == 4
    finally:
        for vm in vms:
            vm.close()


def test_the_working_directory_shadows_nothing(
    tmp_path: Path, kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pyvmm", "signal"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    with pyvmm.launch(MachineConfig(kernel=kernel.name)) as vm:
        vm.console.expect("hello", patient(20))




@pytest.mark.parametrize(("line", "level"), [
    ("disk.img: its last bytes are no sector", "WARNING"),
    ("making an initramfs (once; kept in the cache)...", "INFO"),
])
def test_the_log_has_what_is_odd_as_a_warning(
    kernel: Path, caplog: pytest.LogCaptureFixture, line: str, level: str
) -> None:
    """A program without logging shows warnings alone: not that work is under way."""
    caplog.set_level("DEBUG", "pyvmm")
    with pyvmm.launch(MachineConfig(kernel=kernel)) as vm:
        vm._session.report(line)
    assert [(one.levelname, one.getMessage()) for one in caplog.records] == [(level, line)]
