"""RamImage: nothing changes it under a clone, and its files go with the last handle."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.errors import SnapshotError
from pyvmm.memory import GuestMemory
from pyvmm.ram.image import MOST_LAYERS, RamImage, new_memfd
from pyvmm.ram.pages import drop_own
from pyvmm.ram.runs import MOST_RUNS
from pyvmm.ram.write import image_in_memory, write_ram
from pyvmm.storage.files import set_lock
from tests.support.ram_images import MIB, PAGE, REGIONS, SIZE, content, in_use, put, scattered


def saved(
    path: Path, memory: GuestMemory, *, over: RamImage | None = None
) -> list[tuple[int, int]]:
    """Write ``memory`` into the file ``path``, as a snapshot does; return the runs."""
    with path.open("xb") as file:
        written = write_ram(memory, file.fileno(), over=over)
    path.chmod(0o400)
    return list(written.runs or ())


@pytest.fixture
def ram_file(tmp_path: Path) -> Path:
    path = tmp_path / "ram"
    with GuestMemory(REGIONS) as memory:
        scattered(memory)
        saved(path, memory)
    return path


def test_a_clone_begins_as_the_file_is_and_never_changes_it(ram_file: Path) -> None:
    before = ram_file.read_bytes()
    with RamImage.open_file(str(ram_file), SIZE) as image:
        first, second = (GuestMemory(REGIONS, image=image) for _ in range(2))
    with first, second:
        assert content(first) == content(second) == before
        scattered(first, seed=2)
        assert content(first) != before == content(second)
        drop_own(first)
        assert content(first) == before
    assert ram_file.read_bytes() == before


def _symlink(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _resized(change: int) -> Callable[[Path], None]:
    def resize(path: Path) -> None:
        path.chmod(0o600)
        os.truncate(path, SIZE + change)
        path.chmod(0o400)

    return resize


@pytest.mark.parametrize(("spoil", "problem"), [
    (_symlink, "symbolic link"),
    (_fifo, "not a regular file"),
    (_folder, "not a regular file"),
    (Path.unlink, "No such file"),
    (_resized(-1), f"{SIZE - 1} bytes, not {SIZE}"),
    (_resized(PAGE), f"{SIZE + PAGE} bytes, not {SIZE}"),
    (lambda path: path.chmod(0o420), "others may write"),
    (lambda path: path.chmod(0o402), "others may write"),
])  # fmt: skip
def test_a_file_that_could_not_be_trusted_is_refused(
    spoil: Callable[[Path], None], problem: str, ram_file: Path
) -> None:
    before = in_use()
    spoil(ram_file)
    with pytest.raises(SnapshotError, match=problem) as caught:
        RamImage.open_file(str(ram_file), SIZE)
    assert caught.value.subject == str(ram_file)
    assert in_use() == before


def test_a_file_that_somebody_writes_is_refused(ram_file: Path) -> None:
    ram_file.chmod(0o600)
    with ram_file.open("r+b") as writer:
        set_lock(writer.fileno(), fcntl.F_WRLCK)
        with pytest.raises(SnapshotError, match="locked by a process that writes"):
            RamImage.open_file(str(ram_file), SIZE)


def test_a_clone_keeps_writers_that_ask_for_a_lock_away(ram_file: Path) -> None:
    ram_file.chmod(0o600)
    with ram_file.open("r+b") as writer:
        with RamImage.open_file(str(ram_file), SIZE) as image:
            clone = GuestMemory(REGIONS, image=image)
        with clone, pytest.raises(OSError):  # noqa: PT011 - EAGAIN or EACCES
            set_lock(writer.fileno(), fcntl.F_WRLCK)
        set_lock(writer.fileno(), fcntl.F_WRLCK)


def test_nobody_can_change_an_image_in_memory() -> None:
    with GuestMemory(REGIONS) as memory:
        scattered(memory)
        with image_in_memory(memory) as image:
            fd = image.layers[0].fd
            for change in (
                lambda: os.pwrite(fd, b"x", 0),
                lambda: os.ftruncate(fd, 0),
                lambda: os.ftruncate(fd, 2 * SIZE),
                lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0),
            ):
                with pytest.raises(PermissionError):
                    change()


def test_the_files_go_with_the_last_handle() -> None:
    before = in_use()
    with GuestMemory(REGIONS) as memory:
        image = image_in_memory(memory)
    more = image.share()
    image.close()
    image.close()
    with pytest.raises(ValueError, match="closed"):
        image.layers  # noqa: B018
    with pytest.raises(ValueError, match="closed"):
        image.share()
    with GuestMemory(REGIONS, image=more) as clone:
        more.close()
        assert clone.image is not None
        with GuestMemory(REGIONS, image=clone.image) as another:
            assert content(another) == bytes(SIZE)
    assert in_use() == before


def test_a_clone_outlives_the_file_s_name(ram_file: Path) -> None:
    before = ram_file.read_bytes()
    with (
        RamImage.open_file(str(ram_file), SIZE) as image,
        GuestMemory(REGIONS, image=image) as clone,
    ):
        ram_file.unlink()
        assert content(clone) == before


def test_a_chain_of_diffs_is_mapped_layer_over_layer(ram_file: Path, tmp_path: Path) -> None:
    chain = RamImage.open_file(str(ram_file), SIZE)
    expected = ram_file.read_bytes()
    for number in range(1, MOST_LAYERS):
        with GuestMemory(REGIONS, image=chain) as memory:
            assert content(memory) == expected
            scattered(memory, seed=number)
            put(memory, 3 * MIB, bytes([number]) * PAGE)  # the end of the first region
            expected = content(memory)
            diff = tmp_path / f"diff{number}"
            runs = saved(diff, memory, over=chain)
        base, chain = chain, chain.over(str(diff), runs)
        base.close()
    with chain:
        with GuestMemory(REGIONS, image=chain) as memory:
            assert content(memory) == expected
        with pytest.raises(SnapshotError, match=f"longer than {MOST_LAYERS}"):
            chain.over(str(diff), runs)


@pytest.mark.parametrize("runs", [
    [(0, 0)], [(0, 1)], [(1, PAGE)], [(-PAGE, PAGE)], [(SIZE, PAGE)], [(0, SIZE + PAGE)],
    [(PAGE, PAGE), (0, PAGE)], [(0, 2 * PAGE), (PAGE, PAGE)], [(0, -PAGE)], [(1 << 80, PAGE)],
])  # fmt: skip
def test_runs_that_cannot_be_are_refused(runs: list[tuple[int, int]], ram_file: Path) -> None:
    before = in_use()
    with (
        RamImage.open_file(str(ram_file), SIZE) as image,
        pytest.raises(SnapshotError, match="cannot be"),
    ):
        image.over(str(ram_file), runs)
    assert in_use() == before


def test_too_many_runs_are_refused(ram_file: Path) -> None:
    runs = [(at * 2 * PAGE, PAGE) for at in range(MOST_RUNS + 1)]
    fd = new_memfd(SIZE)
    with RamImage.open_file(str(ram_file), SIZE) as image:
        with pytest.raises(SnapshotError, match=f"at most {MOST_RUNS}"):
            image.over_memfd(fd, runs)
        os.close(fd)  # it was not taken


def test_an_image_in_memory_of_a_clone_holds_its_own_pages_only() -> None:
    with GuestMemory(REGIONS) as memory:
        scattered(memory)
        first = image_in_memory(memory)
    with first, GuestMemory(REGIONS, image=first) as clone:
        put(clone, 2 * MIB, b"changed")
        second = image_in_memory(clone)
        expected = content(clone)
        put(clone, 2 * MIB, b"forgotten")
    with second, GuestMemory(REGIONS, image=second) as grandchild:
        assert content(grandchild) == expected
        assert second.layers[1].runs == ((2 * MIB, PAGE),)


def test_a_hundred_clones_of_scattered_clones_fit_into_a_process() -> None:
    """Each run is a mapping, of which a process has 65,530."""
    size = 64 * MIB
    with GuestMemory([(0, size)]) as memory:
        for at in range(0, size, MIB):
            memory.write(at, b"base" * 30_000)
        image = image_in_memory(memory)
    for generation in range(5):
        with GuestMemory([(0, size)], image=image) as clone:
            for at in range(generation, size // PAGE, 37):
                clone.write(at * PAGE, b"own")
            image.close()
            image = image_in_memory(clone)
            expected = content(clone)
        assert sum(len(layer.runs or ()) for layer in image.layers) <= 256
    with image, GuestMemory([(0, size)], image=image) as last:
        assert content(last) == expected


def test_images_of_images_without_end() -> None:
    memory = GuestMemory(REGIONS)
    for turn in range(3 * MOST_LAYERS):
        scattered(memory, seed=turn, count=2)
        expected = content(memory)
        with image_in_memory(memory) as image:
            assert len(image.layers) <= MOST_LAYERS
            memory.map_image(image)
        assert content(memory) == expected
    memory.close()
