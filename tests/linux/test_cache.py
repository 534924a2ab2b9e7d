"""The cache: where it is, and building into it once."""

from __future__ import annotations

import os
import pwd
import stat
import threading
from pathlib import Path

import pytest

from pyvmm.errors import HostError
from pyvmm.linux.cache import Say, build_once, cache_directory, source_key
from tests.support.patience import patient
from tests.support.planted import ANOTHER, give_away


def build(work: Path, say: Say) -> str:
    (work / "file").write_bytes(b"built")
    return "1.0"


def quiet(line: str) -> None:
    """For those who wait for nothing."""


def test_racing_runs_build_once_and_all_succeed(tmp_path: Path) -> None:
    builds: list[str] = []
    first_is_building, finish, waiting = (threading.Event() for _ in range(3))

    def slow_build(work: Path, say: Say) -> str:
        builds.append(work.name)
        first_is_building.set()
        assert finish.wait(patient(30))
        return build(work, say)

    def second_says(line: str) -> None:
        assert "waiting" in line
        waiting.set()

    got: list[Path] = []

    def run(say: Say) -> None:
        got.append(build_once(tmp_path, "test", "made-", slow_build, say))

    first = threading.Thread(target=run, args=(quiet,))
    second = threading.Thread(target=run, args=(second_says,))
    first.start()
    assert first_is_building.wait(patient(30))
    second.start()
    assert waiting.wait(patient(30))
    finish.set()
    first.join()
    second.join()
    assert len(builds) == 1
    assert got == [tmp_path / "made-1.0"] * 2
    assert (got[0] / "file").read_bytes() == b"built"
    assert stat.S_IMODE(got[0].stat().st_mode) == 0o755


def test_a_failed_build_leaves_the_cache_usable_and_clears_what_a_killed_one_left(
    tmp_path: Path,
) -> None:
    (tmp_path / "test-building-killed" / "deep").mkdir(parents=True)

    def fails(work: Path, say: Say) -> str:
        (work / "half").touch()
        raise HostError("no")

    with pytest.raises(HostError, match="no"):
        build_once(tmp_path, "test", "made-", fails, quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["test.lock"]
    assert build_once(tmp_path, "test", "made-", build, quiet).name == "made-1.0"


def test_an_unusable_cache_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "cache"
    with pytest.raises(HostError, match=f"{cache}: Not a directory; set PYVMM_CACHE"):
        build_once(cache, "test", "made-", build, quiet)


def test_the_key_follows_the_files(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("1")
    before = source_key(file)
    file.write_text("2")
    assert source_key(file) != before


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"PYVMM_CACHE": "/c"}, "/c"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/pyvmm"),
        ({"HOME": "/h"}, "/h/.cache/pyvmm"),
    ],
)
def test_cache_directory(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYVMM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_directory() == Path(expected)


def test_fault_9_the_home_of_another_user_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``sudo -E`` leaves it: root would run what the user has put there."""
    for name in ("PYVMM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "pyvmm"
    give_away(monkeypatch, tmp_path)
    account = pwd.struct_passwd(("me", "x", os.geteuid(), os.getegid(), "", "/home/me", ""))
    monkeypatch.setattr(pwd, "getpwuid", lambda _: account)
    assert cache_directory() == Path("/home/me/.cache/pyvmm")


@pytest.mark.parametrize("variable", ["PYVMM_CACHE", "XDG_CACHE_HOME"])
def test_fault_9_a_cache_of_another_user_is_not_built_into(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYVMM_CACHE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "theirs"))
    (cache_directory() / "made-1").mkdir(parents=True)
    give_away(monkeypatch, tmp_path / "theirs")
    with pytest.raises(HostError, match=f"{tmp_path}/theirs.*: belongs to uid {ANOTHER}.*PYVMM"):
        build_once(cache_directory(), "test", "made-", build, quiet)
    assert [path.name for path in cache_directory().iterdir()] == ["made-1"]


@pytest.mark.parametrize("planted", ["made-1", "made-9", "test.lock"])
def test_fault_9_what_is_planted_in_a_sticky_cache(
    planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PYVMM_CACHE=/tmp: whatever has the name that we would look for must be ours."""
    tmp_path.chmod(0o1777)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    if planted == "test.lock":
        (tmp_path / planted).symlink_to(victim)
    else:
        build_once(tmp_path, "test", "made-5", build, quiet)
        (tmp_path / planted).mkdir()
        give_away(monkeypatch, tmp_path / planted)
    with pytest.raises(HostError, match=f"{tmp_path / planted}: "):
        build_once(tmp_path, "test", "made-", build, quiet)
    assert victim.read_text() == "precious"


def test_fault_9_what_is_built_is_ours_alone_under_any_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = build_once(tmp_path / "a" / "b", "test", "made-", build, quiet)
    finally:
        os.umask(before)
    for path in (made, *made.iterdir(), *(tmp_path / "a").rglob("*")):
        assert path.stat().st_mode & 0o022 == 0
