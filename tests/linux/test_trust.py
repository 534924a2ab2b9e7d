"""What another user could have planted is refused, by name and with a remedy; the rest is not."""

from __future__ import annotations

import fcntl
import grp
import os
import pwd
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.errors import HostError
from pyvmm.linux import trust
from tests.support.planted import ANOTHER, give_away

Plant = Callable[[Path], None]


def refused(check: Callable[[], object], *said: str) -> None:
    with pytest.raises(HostError) as refusal:
        check()
    line = str(refusal.value)
    assert "\n" not in line
    assert trust.REMEDY in line
    for part in said:
        assert part in line


@pytest.mark.parametrize("depth", ["itself", "its parent", "what is not there yet"])
def test_fault_9_a_directory_of_another_user(
    depth: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = tmp_path / "planted"
    planted.mkdir()
    cache = {"itself": planted, "its parent": planted / "cache"}.get(depth, planted / "a" / "b")
    if depth == "its parent":
        cache.mkdir()
    give_away(monkeypatch, planted)
    refused(lambda: trust.check_directory(cache), f"{planted}: belongs to uid {ANOTHER}")
    refused(lambda: trust.make_directory(cache), f"{planted}: belongs to uid {ANOTHER}")
    assert not (planted / "a").exists()


@pytest.mark.parametrize("mode", [0o777, 0o757, 0o707, 0o733])
@pytest.mark.parametrize("below", ["", "cache", "a/b"])
def test_fault_9_a_directory_that_others_may_write(below: str, mode: int, tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(mode)
    refused(
        lambda: trust.make_directory(open_to_all / below),
        f"{open_to_all}: others may write there (mode {mode:04o})", f"chmod go-w {open_to_all}",
    )


def test_fault_9_a_sticky_directory_is_a_good_parent(tmp_path: Path) -> None:
    tmp = tmp_path / "tmp"
    tmp.mkdir()
    tmp.chmod(0o1777)
    trust.make_directory(tmp / "a" / "b")
    trust.check_directory(tmp)
    assert (tmp / "a" / "b").stat().st_mode & 0o022 == 0


def test_fault_9_no_umask_makes_what_others_may_write(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        trust.make_directory(tmp_path / "a" / "b")
        with trust.replacing(tmp_path / "a" / "file") as unfinished:
            Path(unfinished).write_text("all of it")
        os.close(trust.open_lock(tmp_path / "a" / "lock"))
        with trust.writable_by_us_alone():
            (tmp_path / "a" / "c").mkdir()
        assert os.umask(0) == 0
    finally:
        os.umask(before)
    trust.check_tree(tmp_path / "a")
    assert (tmp_path / "a" / "lock").stat().st_mode & 0o077 == 0, "others cannot hold it"


@pytest.mark.parametrize("acl", [False, True])
@pytest.mark.parametrize("members", [[], ["me"], ["me", "other"], ["other"]])
@pytest.mark.parametrize("name", ["me", "staff"])
def test_fault_9_a_group_of_one_is_nobody_else(
    name: str, members: list[str], acl: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """umask 002: the user's own group may write all that the user makes."""
    tmp_path.chmod(0o770)
    account = pwd.struct_passwd(("me", "x", os.geteuid(), os.getegid(), "", "/", ""))
    monkeypatch.setattr(pwd, "getpwuid", lambda _: account)
    group = grp.struct_group((name, "x", os.getegid(), members))
    monkeypatch.setattr(grp, "getgrgid", lambda _: group)
    if acl:
        monkeypatch.setattr(os, "getxattr", lambda *_, **__: b"somebody else is named")
    if name == "me" and "other" not in members and not acl:
        trust.check_directory(tmp_path)
    else:
        refused(lambda: trust.check_directory(tmp_path), "(mode 0770)")


def test_fault_9_a_link_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "precious").mkdir()
    link = tmp_path / "cache"
    link.symlink_to("precious")
    trust.make_directory(link / "mine")
    if os.geteuid() == 0:
        os.chown(link, ANOTHER, ANOTHER, follow_symlinks=False)
        refused(lambda: trust.make_directory(link / "new"), f"{link}: belongs to")
        assert not (tmp_path / "precious" / "new").exists()


def test_fault_9_a_link_leads_to_where_others_may_write(tmp_path: Path) -> None:
    (tmp_path / "open" / "deep").mkdir(parents=True)
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "cache").symlink_to("../open/./deep")
    trust.check_directory(tmp_path / "a" / ".." / "a")
    cache = tmp_path / "a" / "cache" / "x"
    refused(lambda: trust.check_directory(cache), f"{tmp_path}/open: others may write")


def test_fault_9_links_without_an_end(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    refused(lambda: trust.check_directory(tmp_path / "a"), "symbolic links")


def _symlink(path: Path) -> None:
    path.symlink_to(path.with_name("victim"))


def _hard_link(path: Path) -> None:
    path.hardlink_to(path.with_name("victim"))


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


@pytest.mark.parametrize(("plant", "said"), [
    (_symlink, "is a symbolic link"), (_hard_link, "is another file too (2 hard links)"),
    (os.mkfifo, "is a named pipe"), (_socket, "is a socket"), (Path.mkdir, "is a directory"),
])
def test_fault_9_what_is_planted_for_a_lock(plant: Plant, said: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    lock = tmp_path / "lab.lock"
    plant(lock)
    refused(lambda: trust.open_lock(lock), f"{lock}: {said}")
    refused(lambda: trust.check_file(lock), f"{lock}: {said}")
    assert victim.read_text() == "precious"


def test_fault_9_a_lock_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "lab.lock"
    lock.touch()
    give_away(monkeypatch, lock)
    refused(lambda: trust.open_lock(lock), f"{lock}: belongs to uid {ANOTHER}")


def test_fault_9_a_lock_is_never_written(tmp_path: Path) -> None:
    lock = tmp_path / "lab.lock"
    lock.write_text("of an older version")
    fd = trust.open_lock(lock)
    fcntl.flock(fd, fcntl.LOCK_EX)
    os.close(fd)
    assert lock.read_text() == "of an older version"


@pytest.mark.parametrize("where", [".", "modules", "modules/kvm.ko", "vmlinux"])
@pytest.mark.parametrize("how", ["another's", "others may write"])
def test_fault_9_a_tree_with_one_thing_planted(
    how: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "lab-1"
    (tree / "modules").mkdir(parents=True)
    (tree / "modules" / "kvm.ko").touch()
    (tree / "vmlinux").touch()
    trust.check_tree(tree)
    if how == "another's":
        give_away(monkeypatch, tree / where)
        refused(lambda: trust.check_tree(tree), f"{tree / where}: belongs to")
    else:
        (tree / where).chmod(0o666 if (tree / where).is_file() else 0o777)
        refused(lambda: trust.check_tree(tree), f"{tree / where}: others may write")


def test_fault_9_a_tree_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "lab-1").symlink_to(tmp_path)
    refused(lambda: trust.check_tree(tmp_path / "lab-1"), "is a symbolic link")


def test_fault_9_names_of_unfinished_files_cannot_be_planted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even guessed, a name that is taken is an error, and what it leads to stays as it is."""
    victim, target = tmp_path / "victim", tmp_path / "file"
    victim.write_text("precious")
    monkeypatch.setattr(os, "urandom", bytes)
    (tmp_path / f".file.{bytes(8).hex()}").symlink_to(victim)
    with pytest.raises(FileExistsError), trust.replacing(target):
        pytest.fail("the planted link was taken")
    assert victim.read_text() == "precious"


def test_an_exception_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("before")
    with pytest.raises(UnicodeError), trust.replacing(target) as unfinished:
        Path(unfinished).write_text("half\ud800", encoding="utf-8")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]
