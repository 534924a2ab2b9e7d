"""pyvmm doctor: the truth about a host, in lines, and an exit status."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.cli.doctor import doctor_main
from pyvmm.cli.main import main
from pyvmm.errors import ConfigError
from pyvmm.kvm.probe import Host
from pyvmm.x86 import trial
from pyvmm.x86.trial import TrialResult

COMPLETE = {"kvm_amd", "kvm_intel"}


def _nowhere(tmp_path: Path) -> Host:
    return Host(device=str(tmp_path / "kvm"))


def test_a_host_without_kvm_is_one_failure_with_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor_main([], _nowhere(tmp_path)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"FAIL  {tmp_path / 'kvm'}: ")
    assert "No such file" in lines[0]
    assert lines[1].lstrip().startswith("remedy: ")
    assert "pyvmm lab -- CMD" in lines[1]
    assert lines[-1].startswith("This host cannot run a stock Linux kernel")


def test_quiet_says_it_by_the_exit_status_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor_main(["--quiet"], _nowhere(tmp_path)) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_the_device_option_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "/dev/null"]) == 1
    assert "FAIL  /dev/null: KVM_GET_API_VERSION" in capsys.readouterr().out


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENODEV, errno.EBUSY, errno.ENXIO, errno.EIO])
def test_no_state_of_the_device_is_a_traceback(
    code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    really_open: Callable[..., int] = os.open

    def open_or_refuse(path: str, flags: int, mode: int = 0o777) -> int:
        if path == "/dev/kvm":
            raise OSError(code, os.strerror(code), path)
        return really_open(path, flags, mode)

    monkeypatch.setattr(os, "open", open_or_refuse)
    assert doctor_main([]) == 1
    output = capsys.readouterr().out
    assert f"FAIL  /dev/kvm: open /dev/kvm: {os.strerror(code)}" in output
    assert "remedy: " in output


def test_an_unknown_option_is_a_configuration_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--loud"):
        doctor_main(["--loud"])
    assert main(["doctor", "--loud"]) == 125
    assert capsys.readouterr().err.startswith("pyvmm: --loud: is no option of pyvmm doctor")


def test_help_names_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        doctor_main(["--help"])
    assert caught.value.code == 0
    assert "exit status: 0 if a stock Linux kernel can run here" in capsys.readouterr().out


@pytest.mark.bare
@pytest.mark.parametrize("broken", [None, "iretq", "int3", "external interrupt"])
def test_the_status_is_what_the_trial_says(
    broken: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [
        TrialResult(part.name, part.name != broken, "it fell over" if part.name == broken else "")
        for part in trial.PARTS
    ]
    monkeypatch.setattr(trial, "run_trials", lambda _kvm: results)
    assert doctor_main([]) == (0 if broken is None else 1)
    output = capsys.readouterr().out
    assert ("FAIL" in output) == (broken is not None)
    if broken is not None:
        assert f"FAIL  guest trial: {broken}: it fell over" in output


@pytest.mark.bare
def test_the_truth_about_this_host(capsys: pytest.CaptureFixture[str]) -> None:
    """kvm_amd and kvm_intel run stock kernels; kvm_pvm cannot emulate int3, and must say so."""
    status = doctor_main([])
    output = capsys.readouterr().out
    loaded = set(os.listdir("/sys/module")) & {*COMPLETE, "kvm_pvm"}
    assert all(name in output for name in loaded)
    assert "ok    KVM_CAP_IRQFD" in output
    if "kvm_pvm" in loaded:
        assert status == 1
        assert "FAIL  guest trial: int3: KVM cannot emulate an instruction" in output
    elif loaded:
        assert status == 0
        assert output.rstrip().endswith("This host can run a stock Linux kernel.")
    assert doctor_main(["--quiet"]) == status
    assert capsys.readouterr().out == ""
