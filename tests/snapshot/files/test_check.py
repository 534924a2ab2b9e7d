"""``check`` finds what a disk or a copy may do to the files; ``merge`` makes one of a chain."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from pyvmm.errors import SnapshotError
from pyvmm.memory import GuestMemory
from pyvmm.snapshot.files import layout
from pyvmm.snapshot.files.check import content_problems, problems
from pyvmm.snapshot.files.merge import merge
from pyvmm.snapshot.files.saved import open_saved
from tests.support.saved_directories import MIB, make_saved, make_writable, ram_content

RAM_BYTES = 3 * MIB + (640 << 10)
FLIPS = 10_000


def found(path: Path) -> list[str]:
    """The complaints of ``check`` about the directory ``path``, without its path."""
    with open_saved(path) as saved:
        found = problems(saved, {}, report=print)
        return [str(problem).removeprefix(f"{path}/") for problem in found]


def ram_of(path: Path) -> bytes:
    """The RAM that a clone of the snapshot would have."""
    with (
        open_saved(path) as saved, saved.open_ram() as image,
        GuestMemory(saved.ram.regions, image=image) as memory,
    ):
        return b"".join(bytes(region.view) for region in memory.regions)


def test_a_whole_snapshot_has_no_problems(tmp_path: Path) -> None:
    make_saved(tmp_path / "warm")
    assert found(tmp_path / "warm") == []


def test_chunks_are_those_of_the_ram_that_is_written() -> None:
    from pyvmm.ram.write import CHUNK

    assert layout.CHUNK_BYTES == CHUNK


def test_each_of_10000_flips_in_ram_is_found(tmp_path: Path) -> None:
    path, size = tmp_path / "warm", 128 << 10
    make_saved(path, regions=((0, size),))
    make_writable(path)
    generator = random.Random(14)
    with open_saved(path) as saved, (path / "ram").open("r+b", 0) as file:
        for _ in range(FLIPS):
            at, bit = generator.randrange(size), 1 << generator.randrange(8)
            before = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([before[0] ^ bit]), at)
            found = content_problems(saved)
            assert [problem.subject for problem in found] == [f"{path}/ram"], (at, bit)
            os.pwrite(file.fileno(), before, at)
        assert list(content_problems(saved)) == []


def test_each_damaged_chunk_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "warm"
    make_saved(path)
    make_writable(path)
    with (path / "ram").open("r+b") as file:
        for at in (MIB + 5000, MIB + 6000, RAM_BYTES - 1):
            file.seek(at)
            file.write(b"\x55")
    assert found(path) == [
        "ram: is damaged: the CRCs of 2 of 4 chunks of 1 MiB are wrong, the first at 0x100000"
    ]


def test_a_chunk_that_became_a_hole_is_found(tmp_path: Path) -> None:
    path = tmp_path / "warm"
    make_saved(path)
    make_writable(path)
    os.truncate(path / "ram", 2 * MIB)
    os.truncate(path / "ram", RAM_BYTES)
    assert "the CRCs of 2 of 4 chunks of 1 MiB are wrong, the first at 0x200000" in found(path)[0]


def test_holes_and_zeroes_are_the_same(tmp_path: Path) -> None:
    make_saved(tmp_path / "warm")
    (tmp_path / "copy").mkdir()
    for file in (tmp_path / "warm").iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
        (tmp_path / "copy" / file.name).chmod(0o400)
    assert found(tmp_path / "copy") == []


def test_flips_in_an_overlay_are_found(tmp_path: Path) -> None:
    path = tmp_path / "warm"
    make_saved(path, overlays={1: b"data" * 9000})
    make_writable(path)
    content = (path / "disk1.overlay").read_bytes()
    for at in (0, 9, 4096, 5000, 8192 + 35_999, len(content) - 1):
        damaged = bytearray(content)
        damaged[at] ^= 4
        (path / "disk1.overlay").write_bytes(damaged)
        assert found(path)[0] == "disk1.overlay: is damaged: its CRC is wrong", at


def test_a_disk_that_is_missing_or_changed_is_told(tmp_path: Path) -> None:
    path = tmp_path / "warm"
    make_saved(path)
    with open_saved(path) as saved:
        disk = Path(saved.disks[1].location)
        content, facts = disk.read_bytes(), disk.stat()
        disk.rename(tmp_path / "moved")
        try:
            assert len(found(path)) == 1
            assert found(path)[0].startswith(f"{disk}: is missing")
            moved = {1: str(tmp_path / "moved")}
            assert list(problems(saved, moved, report=print)) == []
            lines = [str(one) for one in problems(saved, moved | {2: "x"}, report=print)]
            assert lines == [f"disk 2: {path} has 2 disks, numbers 0 to 1"]
            disk.write_bytes(content)
            os.utime(disk, ns=(facts.st_mtime_ns + 1, facts.st_mtime_ns + 1))
            assert "changed since" in found(path)[0]
        finally:
            os.replace(tmp_path / "moved", disk)
    assert found(path) == []


@pytest.mark.parametrize("name", ["ram", "disk0.overlay"])
def test_files_of_two_snapshots_are_not_mixed(tmp_path: Path, name: str) -> None:
    make_saved(tmp_path / "one", mark=1, overlays={0: b"first" * 99})
    make_saved(tmp_path / "two", mark=2, overlays={0: b"other" * 99})
    os.replace(tmp_path / "two" / name, tmp_path / "one" / name)
    assert [line.partition(":")[0] for line in found(tmp_path / "one")] == [name]


def test_diffs_are_checked_with_their_bases(tmp_path: Path) -> None:
    full = make_saved(tmp_path / "full")
    make_saved(tmp_path / "diff", mark=2, base=(tmp_path / "full", full))
    assert found(tmp_path / "diff") == []
    make_writable(tmp_path / "full")
    with (tmp_path / "full" / "ram").open("r+b") as file:
        file.write(b"\x55")
    assert found(tmp_path / "diff") == [
        f"{tmp_path}/full/ram: is damaged: the CRCs of 1 of 4 chunks of 1 MiB are wrong, the first "
        "at 0x0"
    ]
    make_writable(tmp_path / "diff")
    with (tmp_path / "diff" / "ram").open("r+b") as file:
        file.seek(2 * MIB + 17)
        file.write(b"\x55")
    assert len(found(tmp_path / "diff")) == 2


def test_files_that_are_none_of_a_snapshot_are_told(tmp_path: Path) -> None:
    make_saved(tmp_path / "warm")
    (tmp_path / "warm" / "notes").write_text("mine")
    assert found(tmp_path / "warm") == ["notes: is no file of a snapshot"]


def test_ram_that_others_may_write_is_told(tmp_path: Path) -> None:
    make_saved(tmp_path / "warm")
    (tmp_path / "warm" / "ram").chmod(0o666)
    assert len(found(tmp_path / "warm")) == 1
    assert "others may write it" in found(tmp_path / "warm")[0]


# merge --------------------------------------------------------------------------------------------


def chain(folder: Path, count: int) -> Path:
    """A chain of ``count`` snapshots; the last one's path."""
    path, made = folder / "s0", make_saved(folder / "s0")
    for at in range(1, count):
        base, path = path, folder / f"s{at}"
        runs = ((at * 8192, 4096), (MIB + at * 4096, 8192), (2 * MIB - 4096, 8192))
        made = make_saved(path, mark=10 + at, base=(base, made), runs=runs,
                          overlays={0: b"x" * at})
    return path


@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_chain_becomes_one_snapshot(tmp_path: Path, count: int) -> None:
    path = chain(tmp_path, count)
    with open_saved(path) as saved:
        merge(saved, tmp_path / "out")
        ident, machine = saved.id, saved.record("machine")
        overlay = (path / "disk0.overlay").read_bytes()
    expected = ram_of(path)
    assert found(tmp_path / "out") == []
    for at in range(count):
        shutil.rmtree(tmp_path / f"s{at}")
    assert ram_of(tmp_path / "out") == expected
    if count == 1:
        assert expected == ram_content(RAM_BYTES)
    with open_saved(tmp_path / "out") as merged:
        assert (merged.id, merged.record("machine")) == (ident, machine)
        assert merged.base is None
        assert merged.ram.runs is None
    assert (tmp_path / "out" / "disk0.overlay").read_bytes() == overlay


def test_a_merged_snapshot_takes_the_place_of_the_base_of_diffs(tmp_path: Path) -> None:
    path = chain(tmp_path, 3)
    expected = ram_of(path)
    with open_saved(tmp_path / "s1") as saved:
        merge(saved, tmp_path / "out")
    shutil.rmtree(tmp_path / "s1")
    shutil.rmtree(tmp_path / "s0")
    (tmp_path / "out").rename(tmp_path / "s1")
    with open_saved(path) as saved:
        assert len(saved.chain) == 2
    assert ram_of(path) == expected


@pytest.mark.parametrize("name", ["s0/ram", "s1/ram", "s1/disk0.overlay"])
def test_what_is_damaged_is_not_merged(tmp_path: Path, name: str) -> None:
    path = chain(tmp_path, 2)
    make_writable((tmp_path / name).parent)
    with (tmp_path / name).open("r+b") as file:
        file.seek(8192 if name == "s1/ram" else 0)
        file.write(b"\x55")
    with open_saved(path) as saved, pytest.raises(SnapshotError, match=f"{name}: is damaged"):
        merge(saved, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["s0", "s1"]


def test_merge_never_overwrites(tmp_path: Path) -> None:
    path = chain(tmp_path, 2)
    (tmp_path / "out").mkdir()
    with open_saved(path) as saved, pytest.raises(SnapshotError, match="is there already"):
        merge(saved, tmp_path / "out")
