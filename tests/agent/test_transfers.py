"""The agent's own program, on this host: trees in and out, files read and written."""

from __future__ import annotations

import io
import os
import resource
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.agent.link import JobEnd, RunRequest
from pyvmm.agent.protocol import WINDOW
from tests.support.agent_rig import AgentRig, Events, agent_rig, member, tar_of

LONG = "long-" * 30
DEEP = "/".join(["directory-of-a-long-name"] * 12)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[AgentRig]:
    with agent_rig(cwd=tmp_path) as rig:
        yield rig


def reason_of(events: Events) -> str:
    """Return why a transfer failed, "" if it did not."""
    assert events.result is not None
    return events.result.reason


def make_tree(root: Path) -> None:
    """Make one of everything that a tree can have, below ``root``."""
    root.mkdir()
    (root / "empty").touch()
    (root / "plain").write_bytes(os.urandom(100_000))
    (root / "sector").write_bytes(b"x" * 512)
    (root / "program").write_text("#!/bin/sh\n")
    (root / "program").chmod(0o4755)
    (root / "secret").write_text("s")
    (root / "secret").chmod(0o600)
    (root / LONG).write_text("long name")
    (root / DEEP).mkdir(parents=True)
    (root / DEEP / "file").write_text("deep")
    (root / "link").symlink_to("plain")
    (root / "far").symlink_to("/nowhere/" + LONG)
    (root / "ünïcode").write_text("u")
    Path(os.fsdecode(os.fsencode(root) + b"/bytes-\xff\n")).write_text("b")
    os.mkfifo(root / "fifo", 0o640)
    (root / "closed").mkdir()
    (root / "closed" / "inside").write_text("i")
    (root / "closed").chmod(0o500)
    with (root / "sparse").open("wb") as file:
        file.truncate(3 << 20)
    for number, folder in enumerate((root, *root.rglob("*"))):
        os.utime(folder, (1_000_000 + number, 1_000_000 + number), follow_symlinks=False)


def description(root: Path, *, links_have_times: bool = True) -> dict[bytes, tuple[object, ...]]:
    """Return all of a tree that a copy must have too; tarfile sets no times of links."""
    found: dict[bytes, tuple[object, ...]] = {}
    for path in sorted((root, *root.rglob("*"))):
        status = path.lstat()
        content: object = None
        if path.is_symlink():
            content = path.readlink()
        elif path.is_file():
            content = path.read_bytes()
        time_s = int(status.st_mtime) if links_have_times or not path.is_symlink() else 0
        found[os.fsencode(path.relative_to(root))] = (
            stat.filemode(status.st_mode), status.st_uid, status.st_gid, time_s, content,
        )
    return found


def pack(root: Path, kind: int) -> bytes:
    """Return a directory as an archive of Python's."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as archive:
        archive.add(root, root.name)
    return file.getvalue()


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tree_comes_into_the_guest_as_it_is(rig: AgentRig, tmp_path: Path, kind: int) -> None:
    make_tree(tmp_path / "tree")
    result = rig.put(tmp_path / "a" / "b", pack(tmp_path / "tree", kind))
    assert (result.kind, result.reason) == (JobEnd.EXITED, "")
    assert description(tmp_path / "a/b/tree") == description(tmp_path / "tree")


def test_a_tree_comes_out_of_the_guest_as_it_is(rig: AgentRig, tmp_path: Path) -> None:
    make_tree(tmp_path / "tree")
    events = rig.get(f"{tmp_path}/tree/")
    assert reason_of(events) == ""
    with tarfile.open(fileobj=io.BytesIO(events.stdout)) as archive:
        assert archive.getnames()[0] == "tree"
        archive.extractall(tmp_path / "out", filter="fully_trusted")
    assert description(tmp_path / "out/tree", links_have_times=False) == description(
        tmp_path / "tree", links_have_times=False
    )
    assert rig.put(tmp_path / "again", events.stdout).reason == ""
    assert description(tmp_path / "again/tree") == description(tmp_path / "tree")


def test_fractions_of_seconds_come_with_posix_headers(rig: AgentRig, tmp_path: Path) -> None:
    for name, time_s in (("late", 1_600_000_000.25), ("early", -1.75)):
        info = member(name, mtime=time_s)
        assert rig.put(tmp_path, tar_of((info, b""))).reason == ""
        assert (tmp_path / name).stat().st_mtime == time_s


def test_a_file_comes_out_under_its_name_and_a_link_given_as_the_path_is_followed(
    rig: AgentRig, tmp_path: Path
) -> None:
    (tmp_path / "real").write_text("content")
    (tmp_path / "name").symlink_to("real")
    with tarfile.open(fileobj=io.BytesIO(rig.get(tmp_path / "name").stdout)) as archive:
        (info,) = archive.getmembers()
        file = archive.extractfile(info)
        assert file is not None
        assert (info.name, info.isreg(), file.read()) == ("name", True, b"content")


def test_files_of_the_kernel_come_out_with_what_they_hold(rig: AgentRig) -> None:
    with tarfile.open(fileobj=io.BytesIO(rig.get("/proc/version").stdout)) as archive:
        file = archive.extractfile("version")
        assert file is not None
        assert file.read() == Path("/proc/version").read_bytes()


def test_the_root_of_a_tree_may_be_the_root(rig: AgentRig, tmp_path: Path) -> None:
    events = Events(limit=0)
    rig.begin(lambda e: rig.link.get("/", e), events)
    rig.until(lambda: len(events.stdout) >= 512)
    assert events.stdout.startswith(b"./\0")
    assert events.job is not None
    events.job.kill(15)
    rig.until(lambda: events.result)
    assert events.result is not None
    assert (events.result.kind, events.result.value) == (JobEnd.FAILED, 125)  # ECANCELED
    assert events.result.reason == "the host ended it"


def test_an_existing_directory_keeps_its_mode_and_an_existing_file_is_replaced(
    rig: AgentRig, tmp_path: Path
) -> None:
    (tmp_path / "dir").mkdir(mode=0o711)
    (tmp_path / "dir/old").write_text("old")
    os.link(tmp_path / "dir/old", tmp_path / "other-name")
    (tmp_path / "dir/link").symlink_to("old")
    archive = tar_of(
        (member("dir", tarfile.DIRTYPE, mode=0o777), b""), (member("dir/old"), b"new"),
        (member("dir/link"), b"no link now"),
    )
    assert rig.put(tmp_path, archive).reason == ""
    assert stat.S_IMODE((tmp_path / "dir").stat().st_mode) == 0o711
    assert (tmp_path / "dir/old").read_text() == "new"
    assert (tmp_path / "other-name").read_text() == "old"
    assert not (tmp_path / "dir/link").is_symlink()


def test_hard_links_are_kept(rig: AgentRig, tmp_path: Path) -> None:
    archive = tar_of(
        (member("one"), b"1"), (member("two", tarfile.LNKTYPE, linkname="one"), b""),
        (member("two", tarfile.LNKTYPE, linkname="./two"), b""),
    )
    assert rig.put(tmp_path, archive).reason == ""
    assert (tmp_path / "one").stat().st_ino == (tmp_path / "two").stat().st_ino


@pytest.mark.parametrize(("path", "reason"), [
    ("/no/such", "/no/such: No such file or directory"),
    ("/proc/self/mem", "mem: I/O error"),
])
def test_what_cannot_be_packed_says_why(rig: AgentRig, path: str, reason: str) -> None:
    events = rig.get(path)
    assert reason_of(events) == reason
    assert events.result is not None
    assert events.result.kind is JobEnd.FAILED


@pytest.mark.parametrize(("target", "reason"), [
    ("/proc/self/nothing", "/proc/self/nothing: No such file or directory"),
    ("/etc/passwd", "/etc/passwd: Not a directory"),
])
def test_a_target_that_cannot_be_says_why(rig: AgentRig, target: str, reason: str) -> None:
    assert rig.put(target, tar_of((member("x"), b""))).reason == reason


def test_read_gives_what_there_is(rig: AgentRig, tmp_path: Path) -> None:
    path, data = tmp_path / "file", os.urandom(5 * WINDOW)
    path.write_bytes(data)

    def read(name: str | Path) -> Events:
        return rig.transfer(lambda e: rig.link.read(str(name), e))

    assert read(path).stdout == data
    assert read("/proc/version").stdout == Path("/proc/version").read_bytes()
    assert read("/dev/null").stdout == b""
    os.mkfifo(tmp_path / "fifo")
    assert read(tmp_path / "fifo").stdout == b""
    assert reason_of(read("/no")) == "/no: No such file or directory"
    directory = read(tmp_path).result
    assert directory is not None
    assert directory.value == 21  # EISDIR, which tells a caller that it is one


def test_reading_without_end_waits_for_its_reader_and_can_be_ended(rig: AgentRig) -> None:
    events = Events(limit=0)
    rig.begin(lambda e: rig.link.read("/dev/zero", e), events)
    rig.until(lambda: len(events.stdout) == WINDOW)
    assert rig.run("echo", "hello").stdout == b"hello\n"
    assert events.job is not None
    # Room for what is in the pipe comes with neither credit nor time.
    rig.until(lambda: events.result or events.job.kill(9))  # type: ignore[union-attr]
    assert reason_of(events) == "the host ended it"


def test_write_makes_or_overwrites_a_file(rig: AgentRig, tmp_path: Path) -> None:
    path, data = tmp_path / "file", os.urandom(3 * WINDOW)

    def write(name: Path, mode: int, data: bytes) -> str:
        return reason_of(rig.transfer(lambda e: rig.link.write(str(name), mode, e), data))

    assert write(path, 0o4750, data) == ""
    assert path.read_bytes() == data
    assert stat.S_IMODE(path.stat().st_mode) == 0o4750
    assert write(path, 0o600, b"short") == ""
    assert path.read_bytes() == b"short"
    assert stat.S_IMODE(path.stat().st_mode) & 0o777 == 0o750
    assert write(path, 0o600, b"") == ""
    assert path.read_bytes() == b""
    assert write(tmp_path / "no/file", 0o600, b"x").endswith("/no/file: No such file or directory")
    assert write(tmp_path, 0o600, b"x").endswith(": Is a directory")
    (tmp_path / "dangling").symlink_to("target")
    assert write(tmp_path / "dangling", 0o600, b"x") == ""
    assert (tmp_path / "target").read_bytes() == b"x"


def test_a_full_disk_ends_a_transfer_with_its_reason(rig: AgentRig) -> None:
    events = rig.transfer(lambda e: rig.link.write("/dev/full", 0o600, e), bytes(WINDOW * 2))
    assert reason_of(events) == "/dev/full: No space left on device"


def test_a_transfer_holds_no_pipe_of_a_command_open(rig: AgentRig) -> None:
    """The command sees the end of its input while a transfer that began later still runs."""
    cat = Events()
    cat.job = rig.link.run(_request("cat"), cat)
    endless = Events(limit=0)
    rig.begin(lambda e: rig.link.read("/dev/zero", e), endless)
    rig.until(lambda: endless.stdout)
    cat.job.close_input()
    rig.until(lambda: cat.result)
    assert endless.result is None
    assert endless.job is not None
    endless.job.kill(9)


def _request(name: str) -> RunRequest:
    return RunRequest(argv=(name,), has_input=True)


def test_a_tree_as_deep_as_paths_can_be_is_no_matter_of_the_stack(tmp_path: Path) -> None:
    """2,000 directories within each other, where descriptors suffice."""
    folder = os.open(tmp_path, os.O_RDONLY)
    for _ in range(2000):
        os.mkdir("d", dir_fd=folder)
        inner = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(folder)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, limits[1]))
    try:
        with agent_rig(cwd=tmp_path) as rig:
            events = rig.get(tmp_path / "d")
            assert reason_of(events) == ""
        with tarfile.open(fileobj=io.BytesIO(events.stdout)) as archive:
            assert archive.getnames()[-1] == "d/" * 1999 + "d"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)


def test_a_file_that_grows_past_a_buffer_is_cut(rig: AgentRig, tmp_path: Path) -> None:
    """As a log does: it has another size when it is read than when it was found."""
    (tmp_path / "log").touch()
    script = "import os\nwhile True:\n os.truncate('log', 65000); os.truncate('log', 100000)"
    with subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path) as grower:
        try:
            reasons = {reason_of(rig.get(tmp_path / "log")) for _ in range(200)}
        finally:
            grower.kill()
    assert reasons <= {"", "log: became shorter while it was read"}
