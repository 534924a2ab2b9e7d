"""``Writer``: everything at once or nothing, whoever else is there and whenever it is killed."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import random
import resource
import shutil
import signal
import stat
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvmm.errors import SnapshotError
from pyvmm.snapshot.files.check import problems
from pyvmm.snapshot.files.saved import open_saved
from pyvmm.snapshot.files.writer import Writer, rename_new
from tests.support.patience import patient
from tests.support.saved_directories import make_saved

KILLS = 100


def refusal(path: Path | str) -> str:
    """The line with which a writer of ``path`` is refused; it leaves no descriptor."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SnapshotError) as caught:
        Writer(path)
    assert len(os.listdir("/proc/self/fd")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is there already ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [
    Path.mkdir, Path.touch, os.mkfifo, lambda path: path.symlink_to("nowhere"), make_saved,
])
def test_nothing_is_overwritten(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "warm")
    assert refusal(tmp_path / "warm").startswith(f"{tmp_path}/warm: is there already")
    assert os.listdir(tmp_path) == ["warm"]


def test_nothing_is_overwritten_that_comes_meanwhile(tmp_path: Path) -> None:
    with Writer(tmp_path / "warm") as writer:
        (tmp_path / "warm").mkdir()
        with pytest.raises(SnapshotError, match="made by somebody else meanwhile"):
            writer.finish({})
    assert os.listdir(tmp_path) == ["warm"]
    assert os.listdir(tmp_path / "warm") == []


@pytest.mark.parametrize(("make", "problem"), [
    (Path.touch, "is no directory"),
    (os.mkfifo, "is no directory"),
    (lambda path: path.symlink_to("nowhere"), "is no directory"),
    (lambda path: path.symlink_to(path.parent), "is no directory"),
    (lambda path: (path / "thesis").mkdir(parents=True), "it holds 'thesis'"),
    (lambda path: (path / "ram").mkdir(parents=True), "it holds 'ram'"),
])
def test_what_is_in_the_way_stays(
    tmp_path: Path, make: Callable[[Path], object], problem: str
) -> None:
    make(tmp_path / "warm.tmp")
    line = refusal(tmp_path / "warm")
    assert line.startswith(f"{tmp_path}/warm.tmp: is in the way")
    assert problem in line
    assert os.path.lexists(tmp_path / "warm.tmp")
    if (tmp_path / "warm.tmp").is_dir():
        assert os.listdir(tmp_path / "warm.tmp") != []


def test_symbolic_links_in_a_leftover_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    (tmp_path / "warm.tmp").mkdir()
    (tmp_path / "warm.tmp" / "ram").symlink_to(tmp_path / "precious")
    assert "it holds 'ram'" in refusal(tmp_path / "warm")
    assert (tmp_path / "precious").read_text() == "data"


def test_a_leftover_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "warm.tmp").mkdir(mode=0o755)
    (tmp_path / "warm.tmp" / "ram").write_bytes(b"half")
    (tmp_path / "warm.tmp" / "disk0.overlay").touch(0o400)
    make_saved(tmp_path / "warm", overlays={})
    assert sorted(os.listdir(tmp_path / "warm")) == ["ram", "state"]
    assert stat.S_IMODE((tmp_path / "warm").stat().st_mode) == 0o700
    open_saved(tmp_path / "warm").close()


def test_a_directory_in_the_making_is_left_alone(tmp_path: Path) -> None:
    with Writer(tmp_path / "warm") as writer:
        os.close(writer.create("ram"))
        assert "another process makes this snapshot" in refusal(tmp_path / "warm")
        assert os.listdir(tmp_path / "warm.tmp") == ["ram"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_another_users_directory_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "warm.tmp").mkdir()
    os.chown(tmp_path / "warm.tmp", 65534, 65534)
    assert "belongs to another user" in refusal(tmp_path / "warm")


@pytest.mark.parametrize(("path", "problem"), [
    ("", "has no name"), ("a\0b", "has a NUL"), ("x" * 300, "File name too long"),
    ("nowhere/warm", "cannot be written: No such file or directory"),
    ("/proc/warm", "cannot be written: No such file or directory"),
    ("/dev/null/warm", "cannot be written: Not a directory"),
    ("warm.tmp", "ends in .tmp"), ("/", "is there already"), (".", "is there already"),
])
def test_names_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert problem in refusal(path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", [
    "../x", "state.txt", "disk8.overlay", "disk-1.overlay", "disk01.overlay", "disk\u0661.overlay",
    "disk.overlay", "",
])
def test_only_files_of_a_snapshot_are_made(tmp_path: Path, name: str) -> None:
    with Writer(tmp_path / "warm") as writer:
        for call in writer.create, writer.path_of, writer.size_of:
            with pytest.raises(SnapshotError, match="is no file of a snapshot"):
                call(name)


def test_what_a_callee_leaves_is_looked_at(tmp_path: Path) -> None:
    for make in (
        lambda path: (path / "disk0.overlay").symlink_to("/etc/passwd"),
        lambda path: os.mkfifo(path / "disk0.overlay"),
        lambda path: (path / "core").touch(),
    ):
        with Writer(tmp_path / "warm") as writer:
            make(Path(writer.temporary_path))
            with pytest.raises(SnapshotError, match=f"^{tmp_path}/warm/"):
                writer.finish({})
        assert os.listdir(tmp_path) == []


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "write", "fchmod", "mkdir", "open", "flock"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_an_error_of_the_host_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    module = fcntl if call == "flock" else os

    def refuse(*_args: object, **_named: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(module, call, refuse)
        with pytest.raises(SnapshotError) as caught:
            make_saved(tmp_path / "warm")
    assert str(caught.value).startswith(f"{tmp_path}/warm")
    assert str(caught.value).endswith(f": cannot be written: {os.strerror(code)}")
    assert os.listdir(tmp_path) == []
    make_saved(tmp_path / "warm")  # a leftover, if any, is taken over


def test_a_file_system_that_is_full_is_told_in_one_line(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with Writer(tmp_path / "warm") as writer:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
            with pytest.raises(SnapshotError, match="warm/state: cannot be written: File too lar"):
                writer.finish({"machine": bytes(8192)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert os.listdir(tmp_path) == []


def test_too_much_state_leaves_nothing(tmp_path: Path) -> None:
    with Writer(tmp_path / "warm") as writer, pytest.raises(SnapshotError, match="would have"):
        writer.finish({"machine": [0] * 200_000})
    assert os.listdir(tmp_path) == []
    with Writer(tmp_path / "warm") as writer, pytest.raises(TypeError):
        writer.finish({"machine": 1.5})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, None])
def test_without_renameat2_nothing_is_overwritten_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    class Library:
        """A C library whose renameat2 is not there, or not of use on this file system."""

        def __init__(self, *_args: object, **_named: object) -> None:
            if code is not None:
                self.renameat2 = lambda *_args: -1

    monkeypatch.setattr(ctypes, "CDLL", Library)
    monkeypatch.setattr(ctypes, "get_errno", lambda: code)
    make_saved(tmp_path / "warm")
    open_saved(tmp_path / "warm").close()
    (tmp_path / "other").mkdir()
    with pytest.raises(FileExistsError):
        rename_new(str(tmp_path / "other"), str(tmp_path / "warm"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileExistsError):
        rename_new(str(tmp_path / "other"), str(tmp_path / "empty"))


# Others, and the end of the process ---------------------------------------------------------------


def test_of_many_writers_one_succeeds(tmp_path: Path) -> None:
    outcomes: list[str] = []
    barrier = threading.Barrier(8)

    def save(mark: int) -> None:
        barrier.wait()
        try:
            make_saved(tmp_path / "warm", mark=mark)
            outcomes.append("made")
        except SnapshotError as error:
            outcomes.append(error.problem)

    threads = [threading.Thread(target=save, args=(mark,)) for mark in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patient(60))
    assert outcomes.count("made") == 1, outcomes
    assert len(outcomes) == 8
    assert all("another process makes" in one or "is there already" in one or one == "made"
               for one in outcomes), outcomes
    assert os.listdir(tmp_path) == ["warm"]
    open_saved(tmp_path / "warm").close()


@pytest.mark.parametrize("is_leftover", [False, True])
def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_leftover: bool
) -> None:
    def refuse(*_args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    if is_leftover:
        (tmp_path / "warm.tmp").mkdir()
        assert "its file system has no locks; remove it if" in refusal(tmp_path / "warm")
    else:
        make_saved(tmp_path / "warm")
        open_saved(tmp_path / "warm").close()


def save_in_a_child(path: Path, mark: int) -> int:
    """Save into ``path`` in another process, and return its number."""
    pid = os.fork()
    if not pid:
        try:
            make_saved(path, mark=mark, overlays={0: b"overlay" * 50_000})
        finally:
            os._exit(0)
    return pid


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory, if the host has such a place: fsync takes no time there."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=parent) as name:
        yield Path(name)


def test_killed_at_any_moment_there_is_a_whole_snapshot_or_none(quick: Path) -> None:
    begin = time.monotonic()
    os.waitpid(save_in_a_child(quick / "old", 0), 0)
    took_s = time.monotonic() - begin
    old = {file.name: file.read_bytes() for file in (quick / "old").iterdir()}
    generator = random.Random(9)
    seen: Counter[str] = Counter()
    for mark in range(KILLS):
        target, half = quick / "new", quick / "new.tmp"
        pid = save_in_a_child(target, mark)
        time.sleep(generator.random() * took_s * 1.3)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if target.exists():
            seen["whole"] += 1
            assert not half.exists()
        else:
            if half.exists():
                seen["half"] += 1
                seen["with state"] += (half / "state").exists()
                with pytest.raises(SnapshotError, match="is an unfinished snapshot; the process"):
                    open_saved(half)
            else:
                seen["none"] += 1
            make_saved(target, mark=mark)  # takes a leftover over
        with open_saved(target) as saved:
            machine = saved.record("machine")
            assert isinstance(machine, dict)
            assert machine["vcpus"]["vcpu0"]["mark"] == mark
            assert list(problems(saved, {}, report=print)) == []
        shutil.rmtree(target)
        assert os.listdir(quick) == ["old"]
    assert {file.name: file.read_bytes() for file in (quick / "old").iterdir()} == old
    print(f"of {KILLS} kills: {dict(seen)}")
    assert seen["half"] >= KILLS // 5, seen
