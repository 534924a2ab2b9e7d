"""Arguments of a wrong type to calls about snapshots: each is a TypeError that names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pyvmm
from tests.support.tiny_guests import SPIN, write_guest


class BytesPath:
    """An ``os.PathLike`` of bytes."""

    def __fspath__(self) -> bytes:
        return b"x"


OPENED: list[tuple[dict[str, Any], str]] = [
    ({"disks": ["x"]}, r'disks are by index from 0, \{0: "root.img"\}, not list'),
    ({"disks": "root.img"}, "disks are by index from 0, .*, not str"),
    ({"disks": {"0": "x"}}, "the index of a disk must be int, not str"),
    ({"disks": {True: "x"}}, "the index of a disk must be int, not bool"),
    ({"disks": {0: 5}}, r"disks\[0\] must be a path, not int"),
    ({"disks": {0: b"x"}}, r"disks\[0\] must be a path, not bytes"),
]


@pytest.mark.parametrize(("options", "problem"), [
    *OPENED,
    ({"dir": b"x"}, "dir must be a path, not bytes"),
    ({"dir": BytesPath()}, "dir must be a path of text, not one of bytes"),
    ({"report": 5}, "report must be a function of a text, not int"),
])
def test_a_snapshot_is_not_opened_with_a_wrong_type(
    options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(TypeError, match=problem):
        pyvmm.Snapshot.open(**{"dir": "not there", **options})


@pytest.mark.parametrize(("options", "problem"), [
    *OPENED, ({"path": 5}, "path must be a path, not int"),
])
def test_a_snapshot_of_processes_is_not_made_with_a_wrong_type(
    options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(TypeError, match=problem):
        pyvmm.VmSnapshot(**{"path": "not there", **options})


@pytest.mark.parametrize(("options", "problem"), [
    ({"clock": 5}, "clock must be 'keep' or 'now', not int"),
    ({"timeout_s": "soon"}, "timeout_s must be seconds or None, not str"),
    ({"console_log": b"x"}, "console_log must be a path or None, not bytes"),
    ({"control": 5}, "control must be a path or None, not int"),
    ({"report": 5}, "report must be a function of a text, not int"),
])
def test_a_clone_in_a_process_is_not_started_with_a_wrong_type(
    options: dict[str, Any], problem: str
) -> None:
    with pyvmm.VmSnapshot("not there") as snapshot, pytest.raises(TypeError, match=problem):
        snapshot.clone(**options)


SAVED: list[tuple[dict[str, Any], str]] = [
    ({"live": "yes"}, "live must be True or False, not str"),
    ({"diff": 1}, "diff must be True or False, not int"),
]
REWINDS: list[tuple[Any, str]] = [
    ("1", "number must be the number of a checkpoint or None, not str"),
    (True, "number must be the number of a checkpoint or None, not bool"),
    ([1], "number must be the number of a checkpoint or None, not list"),
]


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Callable[..., object]]]:
    """The calls of a machine that spins, by name."""
    kernel = write_guest(tmp_path_factory.mktemp("guest") / "guest.elf", SPIN)
    with pyvmm.Machine(pyvmm.MachineConfig(kernel=kernel, memory="16M")) as machine:
        machine.start()
        machine.checkpoint()
        with machine.snapshot() as snapshot:
            yield {
                "snapshot": machine.snapshot, "rewind": machine.rewind,
                "wait_until_prepared": snapshot.wait_until_prepared,
            }


@pytest.mark.bare
@pytest.mark.parametrize(("call", "arguments", "options", "problem"), [
    *(("snapshot", (), options, problem) for options, problem in SAVED),
    ("snapshot", (5,), {}, "dir must be a path or None, not int"),
    ("snapshot", (b"x",), {}, "dir must be a path or None, not bytes"),
    *(("rewind", (number,), {}, problem) for number, problem in REWINDS),
    ("wait_until_prepared", ("x",), {}, "timeout_s must be seconds or None, not str"),
])
def test_a_machine_is_not_saved_or_rewound_with_a_wrong_type(
    calls: dict[str, Callable[..., object]], call: str, arguments: tuple[Any, ...],
    options: dict[str, Any], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match=problem):
        calls[call](*arguments, **options)
    assert not any(tmp_path.iterdir())
