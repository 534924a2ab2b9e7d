"""pyvmm lab: options to a LabConfig, and everything that fails before a machine is started."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from pyvmm.cli.lab import COMMAND, config_from, lab_main
from pyvmm.errors import ConfigError
from pyvmm.lab import (
    CommandError,
    LabConfig,
    default_writable,
    kernel,
    lab_environment,
    resolve_command,
)
from pyvmm.linux import modules, payload
from pyvmm.linux.cache import source_key
from pyvmm.startup.options import parse_options
from tests.support.planted import give_away


def config(*argv: str) -> LabConfig:
    return config_from(parse_options(COMMAND, argv))


@pytest.mark.parametrize(
    "argv",
    [
        ["--", "git", "log", "--", "-v"],
        ["git", "log", "--", "-v"],
        ["--cpus", "2", "--", "git", "log", "--", "-v"],
        ["--cpus", "2", "git", "log", "--", "-v"],
    ],
)
def test_everything_from_cmd_on_is_cmd(argv: list[str]) -> None:
    got = config(*argv)
    assert got.command == ("git", "log", "--", "-v")
    assert not got.verbose


def test_options(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    got = config(
        "--cpus", "2", "--memory", "3G", "--timeout", "1.5", "-v",
        "--rw", str(inner), "--rw", str(tmp_path), "--rw", str(tmp_path), "--", "x",
    )  # fmt: skip
    assert (got.cpus, got.memory_bytes, got.timeout_s, got.verbose) == (2, 3 << 30, 1.5, True)
    assert got.writable == (tmp_path, inner), "parents are mounted first"


def test_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    got = config("x")
    assert (got.cpus, got.memory_bytes, got.timeout_s) == (1, 2 << 30, None)
    assert got.cwd == tmp_path
    assert got.writable == default_writable(tmp_path)


def test_the_checkout_is_written_back(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "a" / ".git").mkdir()
    assert default_writable(inner) == (tmp_path / "a",)


def test_the_root_directory_is_not_written_back() -> None:
    assert default_writable(Path("/")) == ()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no command given"),
        (["--"], "no command given"),
        (["--cpus", "0", "x"], "--cpus 0: must be a number from 1 to 64"),
        (["--cpus", "many", "x"], "--cpus many: must be a number from 1 to 64"),
        (["--memory", "64M", "x"], "--memory 64M: must be from 512M to 1T"),
        (["--memory", "much", "x"], "--memory much: is not a size"),
        (["--timeout", "0", "x"], "--timeout 0: must be a number of seconds above 0"),
        (["--timeout", "inf", "x"], "--timeout inf: must be a number"),
        (["--timeout", "nan", "x"], "--timeout nan: must be a number"),
        (["--rw", "/nowhere", "x"], "--rw /nowhere: is not a directory"),
        (["--rw", "/", "x"], "--rw /: would give away the whole host"),
        (["--nonsense", "x"], "--nonsense: is no option of pyvmm lab"),
    ],
)
def test_bad_options_are_one_line_and_125(
    argv: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert lab_main(argv) == 125
    out, err = capfd.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("pyvmm: ")
    assert err.count("\n") == 1


def test_double_verbose_raises() -> None:
    with pytest.raises(ConfigError, match="--cpus 0"):
        lab_main(["-vv", "--cpus", "0", "x"])


def test_no_lab_in_the_lab(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYVMM_LAB", "1")
    assert lab_main(["--", "true"]) == 125
    assert "this already is the lab" in capfd.readouterr().err


def test_missing_packages_are_one_line_and_125(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PYVMM_LAB", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert lab_main(["--", "/bin/true"]) == 125
    err = capfd.readouterr().err
    assert "apt-get install -y --no-install-recommends qemu-system-x86 busybox-static\n" in err
    assert err.count("\n") == 1


def path_variable(directory: Path) -> Mapping[bytes, bytes]:
    return {b"PATH": os.fsencode(directory)}


def test_cmd_is_found_on_the_path(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.touch(0o755)
    environment = path_variable(tmp_path)
    assert resolve_command(["program", "a b"], Path("/"), environment) == (str(program), "a b")
    assert resolve_command(["./program"], tmp_path, environment) == ("./program",)


@pytest.mark.parametrize(
    ("command", "status"), [("nothing", 127), ("./nothing", 127), ("", 127), ("./data", 126),
                            ("./folder", 126)]
)
def test_a_cmd_that_cannot_run_has_the_shells_status(
    command: str, status: int, tmp_path: Path
) -> None:
    (tmp_path / "data").touch(0o644)
    (tmp_path / "folder").mkdir()
    with pytest.raises(CommandError) as caught:
        resolve_command([command], tmp_path, path_variable(tmp_path))
    assert caught.value.exit_status == status


def test_environment_gets_the_mark_and_one_more_git_setting() -> None:
    got = lab_environment(
        {b"A": b"1", b"GIT_CONFIG_COUNT": b"1", b"GIT_CONFIG_KEY_0": b"user.name"}
    )
    assert got[b"PYVMM_LAB"] == b"1"
    assert got[b"A"] == b"1"
    assert got[b"GIT_CONFIG_COUNT"] == b"2"
    assert got[b"GIT_CONFIG_KEY_0"] == b"user.name"
    assert (got[b"GIT_CONFIG_KEY_1"], got[b"GIT_CONFIG_VALUE_1"]) == (b"safe.directory", b"*")


def test_help_shows_how_to_use_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        lab_main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "pyvmm lab -- pyvmm doctor" in text
    assert "Ctrl-]" in text


@pytest.mark.parametrize("planted", ["cache", "lab", "symlink", "fifo", "hard link", "parent"])
def test_fault_9_a_planted_lab_is_not_booted(
    planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    cache, victim = tmp_path / "a" / "cache", tmp_path / "victim"
    lab = cache / f"lab-{source_key(kernel.__file__, modules.__file__, payload.__file__)}-6.1"
    (lab / "modules").mkdir(parents=True)
    (lab / "vmlinux").write_text("no kernel of ours")
    victim.write_text("precious")
    if planted in ("symlink", "fifo", "hard link"):
        shutil.rmtree(lab)
        {"symlink": Path.symlink_to, "fifo": lambda path, _: os.mkfifo(path)}.get(
            planted, Path.hardlink_to)(cache / "lab.lock", victim)
    else:
        give_away(monkeypatch, {"cache": cache, "lab": lab}.get(planted, cache.parent))
    monkeypatch.setenv("PYVMM_CACHE", str(cache))
    monkeypatch.delenv("PYVMM_LAB", raising=False)
    assert lab_main(["--", "true"]) == 125
    error = capfd.readouterr().err
    assert f"lab: {tmp_path}/a" in error
    assert "set PYVMM_CACHE" in error
    assert error.count("\n") == 1
    assert victim.read_text() == "precious"
