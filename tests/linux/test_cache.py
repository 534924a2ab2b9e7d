"""The cache: where it is, and building into it once."""

from __future__ import annotations

import stat
import threading
from pathlib import Path

import pytest

from pyvmm.errors import HostError
from pyvmm.linux.cache import Say, build_once, cache_directory, source_key


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
        assert finish.wait(30)
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
    assert first_is_building.wait(30)
    second.start()
    assert waiting.wait(30)
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
    with pytest.raises(HostError, match=f"cannot build the test kernel in {cache}: "):
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
