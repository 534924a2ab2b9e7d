"""Directories that are no whole snapshot: one line each, which names the file."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.errors import SnapshotError
from pyvmm.snapshot.files import layout
from pyvmm.snapshot.files.content import About, Base, SavedDisk, SavedRam
from pyvmm.snapshot.files.records import MAX_STATE_BYTES, decode, encode
from pyvmm.snapshot.files.saved import open_saved
from tests.support.patience import patient
from tests.support.saved_directories import MIB, make_saved, make_writable

RAM_BYTES = 3 * MIB + (640 << 10)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot, made once, because each one waits for the disk."""
    path = tmp_path_factory.mktemp("template") / "warm"
    make_saved(path)
    return path


@pytest.fixture
def warm(tmp_path: Path, template: Path) -> Path:
    """A snapshot that the test may damage."""
    shutil.copytree(template, tmp_path / "warm")
    make_writable(tmp_path / "warm")
    return tmp_path / "warm"


def refusal(path: Path) -> str:
    """The line with which ``path`` is refused; no descriptor is left open."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SnapshotError) as caught:
        open_saved(path)
    assert len(os.listdir("/proc/self/fd")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(path: Path, **records: object) -> None:
    """Put ``records`` into the state of the snapshot ``path``."""
    file = path / "state"
    state = decode(file.read_bytes(), name="f") | records
    file.write_bytes(encode(state, name="f", versions=layout.RECORDS))


# The file state -----------------------------------------------------------------------------------


def test_every_flipped_byte_of_state_is_refused(warm: Path) -> None:
    data = (warm / "state").read_bytes()
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 0x41
        (warm / "state").write_bytes(damaged)
        assert refusal(warm).startswith(f"{warm}/state: ")


def test_state_is_refused_at_every_length(warm: Path) -> None:
    data = (warm / "state").read_bytes()
    for length in [*range(0, len(data), 7), len(data) - 1]:
        os.truncate(warm / "state", length)
        assert refusal(warm).startswith(f"{warm}/state: ")
        (warm / "state").write_bytes(data)
    (warm / "state").write_bytes(data + b"x")
    assert "too long" in refusal(warm)


def test_a_state_without_end_is_not_read(warm: Path) -> None:
    os.truncate(warm / "state", MAX_STATE_BYTES + 1)
    assert f"has {MAX_STATE_BYTES + 1} bytes, the limit is {MAX_STATE_BYTES}" in refusal(warm)


@pytest.mark.parametrize("name", ["about", "ram", "disks", "base"])
def test_records_that_must_be_there(warm: Path, name: str) -> None:
    state = decode((warm / "state").read_bytes(), name="f")
    del state[name]
    (warm / "state").write_bytes(encode(state, name="f"))
    assert refusal(warm) == f"{warm}/state: has no record {name!r}"


def test_a_later_version_says_so(warm: Path) -> None:
    state = decode((warm / "state").read_bytes(), name="f")
    (warm / "state").write_bytes(encode(state, name="f", versions={"machine": 2}))
    assert "state: was made by a later pyvmm: record 'machine' has version 2" in refusal(warm)
    (warm / "state").write_bytes(encode(state | {"holograms": 1}, name="f"))
    assert "state: was made by a later pyvmm: record 'holograms'" in refusal(warm)


RAM = SavedRam(regions=((0, 640 << 10), (MIB, 3 * MIB))).record()
DISK = SavedDisk(
    index=0, location="/d", size_bytes=1, stamp_ns=0, read_only=False, overlay_bytes=None
).record()


@pytest.mark.parametrize(("records", "problem"), [
    ({"about": 5}, "record about: the state is no dict"),
    ({"about": About.new().record() | {"id": b"short"}}, "record about: id is not 16 bytes"),
    ({"about": About.new().record() | {"more": 1}}, "record about: has no field 'more'"),
    ({"about": About.new().record() | {"pyvmm": None}}, "record about: pyvmm is no text"),
    ({"ram": RAM | {"regions": []}}, "record ram: regions are not 1 to"),
    ({"ram": RAM | {"regions": [[0, 1 << 50]]}}, "record ram: regions has an element"),
    ({"ram": RAM | {"regions": [[0, 8192], [4096, 4096]]}}, "no ascending ranges of pages"),
    ({"ram": RAM | {"regions": [[0, 100]]}}, "no ascending ranges of pages"),
    ({"ram": RAM | {"regions": [[(1 << 64) - 4096, 8192]]}}, "no ascending ranges of pages"),
    ({"ram": RAM | {"regions": [[at << 20, 4096] for at in range(17)]}}, "at most 16 pairs"),
    ({"ram": RAM | {"chunk": 4096}}, "record ram: chunk is not"),
    ({"ram": RAM | {"crcs": b"x"}}, "record ram: crcs is no multiple of 8"),
    ({"ram": RAM | {"crcs": bytes(16)}}, "record ram: crcs has chunks that do not ascend"),
    ({"ram": RAM | {"crcs": b"\4" + bytes(7)}}, "record ram: crcs has chunk 4, and there are 4"),
    ({"ram": RAM | {"bytes": -1}}, "record ram: bytes is not"),
    ({"ram": RAM | {"runs": []}}, "record ram: runs must be there exactly if there is a base"),
    ({"ram": RAM | {"runs": [[4096, 4096], [0, 4096]]}}, "no ascending ranges of pages"),
    ({"ram": RAM | {"runs": [[RAM_BYTES, 4096]]}}, "no ascending ranges of pages"),
    ({"ram": RAM | {"runs": [[at * 8192, 4096] for at in range(4097)]}}, "at most 4096"),
    ({"disks": {}}, "record disks: is no list of at most 8"),
    ({"disks": [DISK] * 9}, "record disks: is no list of at most 8"),
    ({"disks": [DISK | {"location": 1}]}, "record disks, disk 0: location is not"),
    ({"disks": [DISK | {"location": "x" * 5000}]}, "record disks, disk 0: location is not"),
    ({"disks": [DISK | {"size_bytes": 0}]}, "record disks, disk 0: size_bytes is not"),
    ({"disks": [DISK | {"has_overlay": 1}]}, "record disks, disk 0: has_overlay is not a boolean"),
    ({"base": Base(path="", id=bytes(16)).record()}, "record base: path is no file name"),
    ({"base": Base(path="a\0b", id=bytes(16)).record()}, "record base: path is no file name"),
    ({"base": {"path": "x"}}, "record base: id is missing"),
    ({"files": {"disk0.overlay": -1}}, "record files: disk0.overlay is not an integer"),
    ({"files": {"../x": 1}}, "record files: has no field '../x'"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_records_with_anything_in_them_are_refused(
    warm: Path, records: dict[str, object], problem: str
) -> None:
    change(warm, **records)
    line = refusal(warm)
    assert line.startswith(f"{warm}/state: ")
    assert problem in line


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["state", "ram", "disk0.overlay"])
def test_a_missing_file_is_named(warm: Path, name: str) -> None:
    (warm / name).unlink()
    assert refusal(warm).startswith(f"{warm}/{name}: is missing")


@pytest.mark.parametrize("name", ["ram", "disk0.overlay"])
def test_files_have_their_exact_sizes(warm: Path, name: str) -> None:
    size = (warm / name).stat().st_size
    for length in [*range(0, size, size // 20), size - 1, size + 1, size + 4096]:
        os.truncate(warm / name, length)
        assert refusal(warm) == f"{warm}/{name}: has {length} bytes instead of {size}"


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = os.open(path.parent, os.O_PATH)
        one.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)


SPECIAL: dict[str, Callable[[Path], None]] = {
    "a FIFO": make_fifo,
    "a directory": Path.mkdir,
    "a symbolic link": lambda path: path.symlink_to("/dev/zero"),
    "cannot be opened: No such device or address": make_socket,
}


@pytest.mark.parametrize("name", ["state", "ram", "disk0.overlay"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_files_are_regular_files(warm: Path, name: str, kind: str) -> None:
    (warm / name).unlink()
    SPECIAL[kind](warm / name)
    assert refusal(warm).startswith(f"{warm}/{name}: ")
    assert kind in refusal(warm)


@pytest.mark.parametrize("name", ["state", "ram", "disk0.overlay"])
def test_a_link_to_the_right_file_is_refused_too(warm: Path, name: str) -> None:
    (warm / name).rename(warm.parent / name)
    (warm / name).symlink_to(warm.parent / name)
    assert f"{warm}/{name}: is a symbolic link" in refusal(warm)


def test_an_overlay_that_state_does_not_know_is_refused(warm: Path) -> None:
    shutil.copy(warm / "disk0.overlay", warm / "disk1.overlay")
    assert f"{warm}/disk1.overlay: does not belong to this snapshot" in refusal(warm)
    (warm / "disk1.overlay").rename(warm / "disk7.overlay")
    assert "disk7.overlay: does not belong" in refusal(warm)


def test_notes_beside_the_files_harm_nobody(warm: Path) -> None:
    (warm / "README").write_text("made for the demo")
    open_saved(warm).close()


# Directories --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "problem"), [
    (lambda path: None, "no such directory"),
    (lambda path: path.write_bytes(b""), "is no directory, and a snapshot is one"),
    (lambda path: path.symlink_to("nowhere"), "/nowhere: no such directory"),
    (lambda path: path.symlink_to("other"), "/other: is a symbolic link"),
    (lambda path: path.symlink_to("warm/ram"), "/warm/ram: is no directory"),
    (os.mkfifo, "is no directory"),
    (lambda path: path.mkdir(), "state: is missing: the directory is no snapshot"),
])
def test_what_is_no_directory_of_a_snapshot(
    warm: Path, make: Callable[[Path], None], problem: str
) -> None:
    make(warm.parent / "other")
    assert problem in refusal(warm.parent / "other")


@pytest.mark.parametrize(("path", "problem"), [
    ("", "has no name"), ("a\0b", "has a NUL"), ("x" * 300, "File name too long"),
    ("x/" * 3000, "File name too long"),
])
def test_paths_that_name_nothing(path: str, problem: str) -> None:
    with pytest.raises(SnapshotError, match=problem):
        open_saved(path)


def test_a_half_written_directory_is_refused_for_what_it_is(warm: Path) -> None:
    half = warm.parent / "late.tmp"
    warm.rename(half)
    assert refusal(half) == (
        f"{half}: is an unfinished snapshot; the process that made it has ended: remove it"
    )
    assert f"no such directory; {half} is an unfinished snapshot" in refusal(half.with_suffix(""))
    fd = os.open(half, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        assert refusal(half) == f"{half}: is an unfinished snapshot, which a process still writes"
    finally:
        os.close(fd)


def test_a_name_may_end_in_a_slash_or_be_relative(
    warm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(warm.parent)
    for path in ("warm", "warm/", "./warm//", f"{warm}/", "warm/.", f"{warm.parent}/./warm"):
        with open_saved(path) as saved:
            assert saved.path == str(warm)
    monkeypatch.chdir(warm)
    with open_saved(".") as saved:
        assert saved.path == str(warm)


def test_a_link_to_the_directory_is_followed_once(warm: Path) -> None:
    """As "latest" in CI: what it names is opened like any, and another target later is no matter.
    """
    latest = warm.parent / "latest"
    latest.symlink_to("warm")
    for path in (str(latest), f"{latest}/"):
        with open_saved(path) as saved:
            assert saved.path == str(warm)
            latest.unlink()
            latest.symlink_to("nowhere")
            saved.open_ram().close()
        latest.unlink()
        latest.symlink_to("warm")
    (warm / "ram").rename(warm.parent / "ram")
    (warm / "ram").symlink_to(warm.parent / "ram")
    assert f"{warm}/ram: is a symbolic link" in refusal(latest)


def test_the_root_is_no_snapshot() -> None:
    assert refusal(Path("/")) == "/state: is missing: the directory is no snapshot"


def test_a_link_in_place_of_a_base_is_refused(tmp_path: Path) -> None:
    full = make_saved(tmp_path / "full")
    make_saved(tmp_path / "diff", base=(tmp_path / "full", full))
    (tmp_path / "full").rename(tmp_path / "moved")
    (tmp_path / "full").symlink_to("moved")
    assert f"its base cannot be used: {tmp_path}/full: is a symbolic link" in refusal(
        tmp_path / "diff"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="root may read everything: it becomes nobody here")
def test_a_directory_that_may_not_be_read(warm: Path) -> None:
    code = (
        "import os, sys\nfrom pyvmm.snapshot.files.saved import open_saved\n"
        "from pyvmm.errors import SnapshotError\nos.setgid(65534); os.setuid(65534)\n"
        "try: open_saved(sys.argv[1])\nexcept SnapshotError as error: print(error)"
    )
    for folder in (warm.parent, *warm.parent.parents):
        if folder.stat().st_uid == 0 and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    done = subprocess.run(
        [sys.executable, "-c", code, str(warm)], capture_output=True, text=True, check=True,
        timeout=patient(60),
    )
    assert done.stdout == (
        f"{warm}: cannot be opened: a snapshot is private to the user who made it, and to root\n"
    )


# Bases --------------------------------------------------------------------------------------------


def test_a_base_that_is_missing_damaged_or_another_one(tmp_path: Path) -> None:
    full = make_saved(tmp_path / "full")
    make_saved(tmp_path / "diff", base=(tmp_path / "full", full))
    (tmp_path / "full").rename(tmp_path / "gone")
    assert f"{tmp_path}/diff: its base cannot be used: {tmp_path}/full: no such" in refusal(
        tmp_path / "diff"
    )
    make_saved(tmp_path / "full")
    assert "is another snapshot than the one it was made over" in refusal(tmp_path / "diff")
    shutil.rmtree(tmp_path / "full")
    make_saved(tmp_path / "full", regions=((0, MIB),))
    change_id(tmp_path / "full", full)
    assert f"its base {tmp_path}/full has another RAM" in refusal(tmp_path / "diff")
    shutil.rmtree(tmp_path / "full")
    (tmp_path / "full").symlink_to(tmp_path / "gone")
    assert "is a symbolic link" in refusal(tmp_path / "diff")


def change_id(path: Path, ident: bytes) -> None:
    make_writable(path)
    change(path, about=About.new().record() | {"id": ident})


def test_bases_beside_a_diff_move_along_with_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    full = make_saved(tmp_path / "a" / "full")
    make_saved(tmp_path / "a" / "diff", base=(tmp_path / "a" / "full", full))
    (tmp_path / "a").rename(tmp_path / "b")
    with open_saved(tmp_path / "b" / "diff") as saved:
        assert [one.path for one in saved.chain] == [
            f"{tmp_path}/b/full", f"{tmp_path}/b/diff",
        ]


def test_bases_elsewhere_have_absolute_paths(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    full = make_saved(tmp_path / "full")
    make_saved(tmp_path / "a" / "diff", base=(tmp_path / "full", full))
    (tmp_path / "a").rename(tmp_path / "b")
    with open_saved(tmp_path / "b" / "diff") as saved:
        assert saved.base is not None


def test_a_chain_is_at_most_8_long(tmp_path: Path) -> None:
    made = make_saved(tmp_path / "s0")
    for at in range(1, 9):
        made = make_saved(tmp_path / f"s{at}", base=(tmp_path / f"s{at - 1}", made))
    with open_saved(tmp_path / "s7") as saved:
        assert len(saved.chain) == 8
    assert refusal(tmp_path / "s8").startswith(f"{tmp_path}/s8: has more than 7 bases; ")


@pytest.mark.parametrize("length", [1, 2, 5])
def test_bases_that_go_round_in_a_circle_are_refused(tmp_path: Path, length: int) -> None:
    ids = {}
    for at in range(length):
        ids[at] = make_saved(
            tmp_path / f"s{at}", base=(tmp_path / f"s{(at + 1) % length}", bytes(16))
        )
    for at in range(length):
        path = tmp_path / f"s{at}"
        make_writable(path)
        base = Base.over(str(tmp_path / f"s{(at + 1) % length}"), ids[(at + 1) % length], str(path))
        change(path, base=base.record())
    assert "its bases go round in a circle" in refusal(tmp_path / "s0")
