"""The jail of each process that ``pyvmm.launch``, a snapshot, ``test`` and ``matrix`` start."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyvmm
from pyvmm import MachineConfig
from pyvmm.cli.jailed import OFF
from tests.support.guest import environment
from tests.support.launched import until
from tests.support.matrix_program import REAL, start
from tests.support.patience import patient
from tests.support.tiny_guests import REPORT_7, SPIN, echoes_once, prints, write_guest

pytestmark = pytest.mark.bare

MODES = ("on", "off")


@pytest.fixture
def asks(tmp_path: Path) -> Path:
    """A guest that waits for a byte, shows it and ends with status 7."""
    return write_guest(
        tmp_path / "guest.elf", prints(b"first half"), echoes_once(), prints(b" bye\n"), REPORT_7
    )


def jail_of(pid: int) -> str:
    """Return ``on`` if every thread of a process has a filter and no privileges, ``off`` if none.

    A machine tells that it is there before all its threads have entered.
    """
    modes = {("2", "1"): "on", ("0", "0"): "off"}
    found = set[tuple[str, str]]()

    def is_one() -> bool:
        found.clear()
        for thread in Path(f"/proc/{pid}/task").iterdir():
            lines = (thread / "status").read_text().splitlines()
            fields = dict(line.split(":\t", 1) for line in lines)
            found.add((fields["Seccomp"].strip(), fields["NoNewPrivs"].strip()))
        return len(found) == 1 and found <= modes.keys()

    until(is_one)
    return modes[found.pop()]


def descendants(pid: int) -> Iterator[int]:
    """Yield the processes that ``pid`` has started, and those that they have."""
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for word in (task / "children").read_text().split():
                yield int(word)
                yield from descendants(int(word))


def machines_below(pid: int) -> list[int]:
    """Return the processes below ``pid`` that are a launched machine's."""
    found = []
    for child in descendants(pid):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            found += [child] * any(word.startswith(b"--control-fd=") for word in words)
    return found


@pytest.mark.parametrize("jail", MODES)
def test_clones_have_the_jail_of_the_machine_that_was_saved(asks: Path, jail: str) -> None:
    said: list[str] = []
    config = MachineConfig(kernel=asks, jail=jail)
    with pyvmm.launch(config, report=said.append) as vm:
        vm.console.expect("first half")
        assert jail_of(vm.pid) == jail
        with vm.snapshot() as warm, warm.clone(report=said.append) as clone:
            assert jail_of(clone.pid) == jail
            with clone.snapshot() as again, again.clone(report=said.append) as grandchild:
                assert jail_of(grandchild.pid) == jail
                grandchild.console.write("x")
                outcome = grandchild.wait(patient(30))
                assert outcome is not None
                assert outcome.value == 7
    assert said.count(OFF) == (3 if jail == "off" else 0)


@pytest.mark.parametrize("jail", MODES)
def test_an_old_snapshot_is_opened_with_a_jail(asks: Path, tmp_path: Path, jail: str) -> None:
    with pyvmm.launch(MachineConfig(kernel=asks)) as vm:
        vm.console.expect("first half")
        vm.snapshot(tmp_path / "saved").close()
    with pyvmm.VmSnapshot(tmp_path / "saved", jail=jail) as saved, saved.clone() as clone:
        assert jail_of(clone.pid) == jail


def jail_of_machine_below(process: subprocess.Popen[str], console: Path) -> str:
    """Return the jail of the one machine that ``process`` has, once the log has its guest's line.

    Then end the process.
    """
    try:
        until(lambda: console.exists() and b"runs" in console.read_bytes())
        (machine,) = machines_below(process.pid)
        return jail_of(machine)
    finally:
        process.terminate()
        process.communicate(timeout=patient(60))


@pytest.mark.parametrize("jail", MODES)
def test_pyvmm_test_hands_its_jail_on(tmp_path: Path, jail: str) -> None:
    kernel = write_guest(tmp_path / "guest.elf", prints(b"runs\n"), SPIN)
    report, console = tmp_path / "report.json", tmp_path / "console"
    process = subprocess.Popen(
        [sys.executable, "-m", "pyvmm", "test", "--kernel", str(kernel), f"--jail={jail}",
         "--expect", "never", "--boot-timeout", str(patient(60)), "--json", str(report),
         "--console-log", str(console)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(), text=True,
    )
    assert jail_of_machine_below(process, console) == jail
    problems = json.loads(report.read_text())["problems"]
    assert (OFF in problems) == (jail == "off"), problems


@pytest.mark.parametrize(("in_file", "option", "jail"), [
    ("", (), "on"), ("jail = 'off'", (), "off"), ("", ("--jail", "off"), "off"),
    ("jail = 'off'", ("--jail", "on"), "on"),
])
def test_a_matrix_has_a_jail_which_the_command_line_may_change(
    tmp_path: Path, in_file: str, option: tuple[str, ...], jail: str
) -> None:
    write_guest(tmp_path / "guest.elf", prints(b"runs\n"), SPIN)
    path, out = tmp_path / "m.toml", tmp_path / "out"
    path.write_text(f"""
        {in_file}
        agent = "image"
        memory = "16M"
        boot-timeout = {patient(60)}
        [kernels]
        spins = "guest.elf"
        [commands]
        true = ["true"]
    """)
    process = start(str(path), *option, "--out", str(out), program=REAL)
    console = out / "runs" / "spins+16M+1cpu+true" / "console.log"
    assert jail_of_machine_below(process, console) == jail


def test_a_matrix_of_no_such_jail_is_refused(tmp_path: Path) -> None:
    write_guest(tmp_path / "guest.elf", SPIN)
    path = tmp_path / "m.toml"
    path.write_text("[kernels]\nk = 'guest.elf'\n[commands]\ntrue = ['true']\n")
    process = start(str(path), "--jail", "maybe", program=REAL)
    _, error = process.communicate(timeout=patient(60))
    assert process.returncode == 125
    assert error == "pyvmm: --jail maybe: is none of on, off, strict\n"
