"""``Vm.snapshot``, ``checkpoint`` and ``rewind``; the machine is a stand-in with a real agent."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import pyvmm
from pyvmm import Kind, Outcome
from pyvmm.errors import SnapshotError
from tests.support.patience import patient


def test_a_snapshot_is_made_in_the_directory_or_in_a_temporary_one(
    vm: pyvmm.Vm, tmp_path: Path
) -> None:
    with vm.snapshot(tmp_path / "a", live=True) as kept:
        assert kept.path == str(tmp_path / "a")
    with vm.snapshot() as taken:
        folder = Path(taken.path).parent
        assert folder.is_dir()
    assert not folder.exists()


def test_a_rewind_goes_back_and_tells_the_agent(vm: pyvmm.Vm) -> None:
    with pytest.raises(SnapshotError, match="there is nothing to go back to"):
        vm.rewind()
    number = vm.checkpoint()
    assert vm.checkpoint() == number + 1
    vm.rewind(number)
    first = vm.clone_id
    vm.wait_for_agent(patient(20))
    assert vm.run(["echo", "x"]).stdout == "x\n"
    vm.rewind()
    assert len({first, vm.clone_id, None}) == 3


def test_a_command_from_before_a_rewind_is_lost(vm: pyvmm.Vm) -> None:
    vm.checkpoint()
    with vm.begin(["sleep", "1000"]) as command:
        vm.rewind()
        with pytest.raises(pyvmm.AgentError):
            command.wait()
    vm.wait_for_agent(patient(20))


def test_a_hook_that_fails_is_an_agent_error_with_its_output(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pyvmm.launcher.process.PROGRAM", (
        sys.executable, "-P", "-m", "tests.support.agent_process",
    ))
    monkeypatch.chdir(tmp_path)  # the hook is looked for below it by an agent on this host
    hook = tmp_path / "etc/pyvmm/clone"
    hook.parent.mkdir(parents=True)
    with pyvmm.launch(pyvmm.MachineConfig(kernel="k")) as vm:
        vm.wait_for_agent(patient(20))
        vm.checkpoint()
        for script, said in (("echo no address; exit 3", "exited with status 3: no address"),
                             ("kill -KILL $$", "was ended by signal 9")):
            hook.write_text(f"#!/bin/sh\n{script}\n")
            hook.chmod(0o755)
            vm.rewind()
            with pytest.raises(pyvmm.AgentError, match=said):
                vm.wait_for_agent(patient(20))
            assert vm.run(["echo", "x"]).stdout == "x\n"
        hook.write_text("#!/bin/sh\necho $PYVMM_CLONE_ID >>ids\n")
        vm.rewind()
        vm.wait_for_agent(patient(20))
        assert (tmp_path / "ids").read_text() == f"{vm.clone_id}\n"


def test_an_end_is_taken_back(vm: pyvmm.Vm) -> None:
    ends: list[Outcome] = []
    vm.on_end(ends.append)
    vm.checkpoint()
    for _ in range(2):
        assert vm.stop().kind is Kind.STOPPED
        with pytest.raises(pyvmm.EndedError):
            vm.run(["true"])
        with pytest.raises(pyvmm.EndedError):
            vm.checkpoint()
        vm.rewind()
        assert vm.outcome is None
        assert vm.is_paused
        vm.resume()
        vm.wait_for_agent(patient(20))
        assert vm.run(["echo", "x"]).stdout == "x\n"
    assert vm.wait(0.01) is None
    assert vm.stop().kind is Kind.STOPPED
    assert [end.kind for end in ends] == [Kind.STOPPED] * 3


def test_a_run_that_has_gone_with_its_end_cannot_be_rewound(vm: pyvmm.Vm) -> None:
    vm.stop()
    with pytest.raises((pyvmm.EndedError, SnapshotError)):
        vm.rewind()


def test_a_callback_may_not_wait_for_a_rewind(vm: pyvmm.Vm) -> None:
    vm.checkpoint()
    raised: list[type[BaseException]] = []
    is_over = threading.Event()

    def rewind(_outcome: Outcome) -> None:
        try:
            vm.rewind()
        except RuntimeError as error:
            raised.append(type(error))
        is_over.set()

    vm.on_end(rewind)
    vm.stop()
    assert is_over.wait(patient(10))
    assert raised == [RuntimeError]


def test_a_wrong_type_is_an_error_that_names_the_argument(vm: pyvmm.Vm) -> None:
    wrong: Any
    for wrong, problem in ((5, "or None, not int"), (b"x", "or None, not bytes")):
        with pytest.raises(TypeError, match=f"directory must be a path {problem}"):
            vm.snapshot(wrong)
    wrong = "no"
    with pytest.raises(TypeError, match="live must be True or False, not str"):
        vm.snapshot(live=wrong)
    with pytest.raises(TypeError, match="diff must be True or False, not str"):
        vm.snapshot(diff=wrong)
    for wrong in ("1", True):
        with pytest.raises(TypeError, match="number must be the number of a checkpoint or None"):
            vm.rewind(wrong)
