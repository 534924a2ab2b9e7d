"""Entries of the cache: what is kept of a configuration, and when it holds no more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.linux.config_cache import MAX_ENTRIES, covers, recall, remember
from pyvmm.linux.guest import Guest
from pyvmm.linux.options import KernelConfig
from pyvmm.linux.requirements import known_options, problems
from pyvmm.linux.scan import IN_KERNEL
from tests.support.planted import give_away

CONFIG = KernelConfig({"64BIT": "y", "VIRTIO_BLK": "m", "NR_CPUS": "4", "UNASKED": "y"}, IN_KERNEL)


@pytest.fixture
def entry(tmp_path: Path) -> str:
    """Where an entry would be; its directory is not there yet."""
    return str(tmp_path / "cache" / "configs" / "1-2-3-4")


def test_what_is_remembered_is_judged_the_same(entry: str) -> None:
    assert recall(entry) is None
    remember(entry, CONFIG)
    found = recall(entry)
    assert found is not None
    assert found.source == IN_KERNEL
    assert found.options.keys() == known_options(), "those that are not set too, and no others"
    for guest in (Guest(), Guest(cpus=8), Guest(console="hvc0", acpi=False)):
        assert covers(found, guest)
        assert problems(found, guest) == problems(CONFIG, guest)


def test_a_file_that_has_changed_is_not_remembered(entry: str, tmp_path: Path) -> None:
    source = tmp_path / "config-6.1"
    source.write_text("CONFIG_64BIT=y\n")
    remember(entry, KernelConfig({"64BIT": "y"}, str(source)))
    found = recall(entry)
    assert found is not None
    assert found.source == str(source)
    source.write_text("# CONFIG_64BIT is not set\n")
    assert recall(entry) is None
    remember(entry, KernelConfig({}, str(source)))
    source.unlink()
    assert recall(entry) is None


def test_what_an_older_version_did_not_ask_does_not_count_as_missing(entry: str) -> None:
    remember(entry, CONFIG)
    path = Path(entry)
    path.write_text("".join(
        line for line in path.read_text().splitlines(keepends=True) if "SMP" not in line
    ))
    found = recall(entry)
    assert found is not None
    assert covers(found, Guest())
    assert not covers(found, Guest(cpus=2))


@pytest.mark.parametrize("content", [
    b"", b"\n", b"\n\n\n", b"another title\nsource\n-\n64BIT=y\n", b"\xff\xfe", bytes(1 << 20),
    b"pyvmm: a kernel's configuration\n", b"pyvmm: a kernel's configuration\nx\n0-0-0\nA=y\n",
    b"pyvmm: a kernel's configuration\nx\n-\n" + b"A=y\n" * 20_000,
    b"pyvmm: a kernel's configuration\na\0b\n0-0-0\nA=y\n",
])
def test_what_is_no_entry(entry: str, content: bytes) -> None:
    Path(entry).parent.mkdir(parents=True)
    Path(entry).write_bytes(content)
    assert recall(entry) is None


def test_an_entry_that_is_no_file(entry: str) -> None:
    Path(entry).mkdir(parents=True)
    assert recall(entry) is None
    remember(entry, CONFIG)
    assert recall(entry) is None
    Path(entry).rmdir()
    os.mkfifo(entry)
    assert recall(entry) is None


@pytest.mark.parametrize("config", [
    KernelConfig({"CMDLINE": '"a\nb"'}, IN_KERNEL),
    KernelConfig({"CMDLINE": "x" * 100_000}, IN_KERNEL),
    KernelConfig({}, "two\nlines"),
    KernelConfig({"CMDLINE": "\udcff"}, IN_KERNEL),
    KernelConfig({}, "/nowhere/config"),
])
def test_what_cannot_be_an_entry_is_none(entry: str, config: KernelConfig) -> None:
    remember(entry, config)
    assert recall(entry) is None


def test_nothing_is_left_unfinished_and_no_more_than_a_hundred(entry: str) -> None:
    folder = Path(entry).parent
    for index in range(MAX_ENTRIES + 3):
        remember(str(folder / f"{index}"), CONFIG)
        os.utime(folder / f"{index}", ns=(index, index))
    remember(entry, CONFIG)
    names = {path.name for path in folder.iterdir()}
    assert len(names) == MAX_ENTRIES
    assert {"1-2-3-4", str(MAX_ENTRIES + 2)} <= names
    assert "0" not in names


def test_a_cache_that_cannot_be_written_is_no_failure() -> None:
    remember("/proc/nowhere/entry", CONFIG)
    assert recall("/proc/nowhere/entry") is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(
    st.sampled_from(sorted(known_options())), st.text(max_size=20), max_size=5
))
def test_any_values_come_back_or_none(entry: str, options: dict[str, str]) -> None:
    Path(entry).unlink(missing_ok=True)
    remember(entry, KernelConfig(options, IN_KERNEL))
    found = recall(entry)
    if found is not None:
        assert {name: found.state(name) for name in options} == options


@pytest.mark.parametrize("what", ["entry", "folder", "cache"])
@pytest.mark.parametrize("how", ["another's", "others may write"])
def test_fault_9_what_another_user_may_have_written_is_not_believed(
    what: str, how: str, entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember(entry, CONFIG)
    assert recall(entry) is not None
    path = {"entry": Path(entry), "folder": Path(entry).parent}.get(what, Path(entry).parents[1])
    if how == "another's":
        give_away(monkeypatch, path)
    else:
        path.chmod(0o777)
    assert recall(entry) is None
    if what != "entry":
        remember(entry + "5", CONFIG)
        assert not Path(entry + "5").exists()


@pytest.mark.parametrize("planted", ["symlink", "fifo"])
def test_fault_9_an_entry_is_neither_read_nor_written_through_what_is_planted(
    planted: str, entry: str, tmp_path: Path
) -> None:
    other = str(tmp_path / "other" / "1-2-3-4")
    remember(other, CONFIG)
    Path(entry).parent.mkdir(parents=True)
    if planted == "symlink":
        Path(entry).symlink_to(other)
    else:
        os.mkfifo(entry)
    assert recall(entry) is None
    remember(entry, KernelConfig({"64BIT": "n"}, IN_KERNEL))
    assert Path(entry).is_file()
    assert not Path(entry).is_symlink()
    found = recall(other)
    assert found is not None
    assert found.options["64BIT"] == "y"
