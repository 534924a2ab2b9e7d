"""Values that a newcomer gives: the line says what is meant, in words that are not Python's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyvmm.cli.main import main
from pyvmm.cli.parse import parse_memory
from tests.support.kernels import bzimage, elf


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a kernel and two disks in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "k").write_bytes(bzimage())
    for name in ("d", "e"):
        (tmp_path / name).write_bytes(bytes(4096))
    return tmp_path


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that ``pyvmm argv`` is refused with."""
    assert main(list(argv)) == 125
    line = capsys.readouterr().err
    assert line.count("\n") == 1, line
    return line


@pytest.mark.parametrize(("text", "words"), [
    ("512", "--memory 512: must be from 16M to 512G; a number alone counts bytes: write 512M"),
    ("2", "a number alone counts bytes: write 2G"),
    ("1024", "write 1024M"),
    ("8000000", "--memory 8000000: must be from 16M to 512G\n"),
    ("512K", "--memory 512K: must be from 16M to 512G\n"),
    ("-1", "--memory -1: is not a size from 16M to 512G; write 256M or 1G"),
    ("512.5M", "is not a size from 16M to 512G"),
    ("0", "must be from 16M to 512G\n"),
    ("1P", "is not a size from 16M to 512G"),
])
def test_fault_39_memory_names_its_unit_and_limits(
    text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(capsys, "run", "--kernel", "k", "--memory", text)


def test_fault_39_a_number_alone_is_a_size_in_bytes_if_that_makes_sense() -> None:
    assert parse_memory("--memory", str(64 << 20), 16 << 20, 1 << 30) == 64 << 20


def test_fault_39_the_labs_memory_too(capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "lab", "--memory", "2048", "true")
    assert "must be from 512M to 1T; a number alone counts bytes: write 2048M" in line


@pytest.mark.parametrize(("disk", "words"), [
    ("d,overlay=d", "d: overlay= names the disk itself"),
    ("d,overlay=./x/../d", "overlay= names the disk itself"),
    ("http://host/x.img", "http:// is not supported; a disk is a file, a block device, nbd://"),
    ("HTTPS://host/x.img", "HTTPS:// is not supported"),
    ("iscsi://host/x", "iscsi:// is not supported"),
    ("file:///tmp/d", "is written as a path: --disk /tmp/d"),
    ("d,snapsot", "does not know 'snapsot' (snapshot?); the options are ro, "),
    ("d,serial", "serial= wants a value: serial=ID"),
])
@pytest.mark.parametrize("command", ["run", "export"])
def test_fault_39_a_disk_that_is_none(
    command: str, disk: str, words: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "x").mkdir()
    rest = {"run": ["--kernel", "k"], "export": ["--socket", "s"]}[command]
    assert words in refusal(capsys, command, "--disk", disk, *rest)
    assert (place / "d").read_bytes() == bytes(4096)


@pytest.mark.parametrize(("disks", "words"), [
    (["d", "e,overlay=d"], "--disk e: d is an overlay here, and a disk of this run already"),
    (["d,overlay=o", "e,overlay=./o"], "./o is an overlay here, and an overlay of this run"),
    (["d,overlay=o", "o"], "--disk o: o is a disk here, and an overlay of this run already"),
])
def test_fault_39_an_overlay_that_is_anothers(
    disks: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [word for disk in disks for word in ("--disk", disk)]
    assert words in refusal(capsys, "run", "--kernel", "k", *options)


def test_two_snapshots_of_one_disk_have_overlays_of_their_own(
    capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, "run", "--kernel", "none", "--disk", "d,overlay=o", "--disk",
                   "d,overlay=p")
    assert line.startswith("pyvmm: none: ")


@pytest.mark.parametrize(("kind", "words"), [
    (1, "an object file or a kernel module"), (3, "a program or shared library"),
    (4, "a core dump"), (0xFE00, "e_type is 65024, must be 2"),
])
def test_fault_39_an_elf_that_is_no_kernel(
    kind: int, words: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "ls").write_bytes(elf(e_type=kind))
    line = refusal(capsys, "run", "--kernel", "ls")
    assert line.startswith("pyvmm: ls: ")
    assert words in line


@pytest.mark.parametrize(("cpu", "words"), [
    ("host,-AVX", "unknown feature 'AVX'; did you mean avx?"),
    ("host,-sse4.1", "did you mean sse4_1?"),
    ("host,-xyzzy", "unknown feature 'xyzzy' (names are those of /proc/cpuinfo"),
])
def test_fault_39_a_feature_has_its_nearest_name_and_no_list(
    cpu: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, "run", "--kernel", "k", "--cpu", cpu)
    assert words in line
    assert len(line) < 200


FILES = {
    "kernel": ["--kernel", "{}"], "initrd": ["--kernel", "k", "--initrd", "{}"],
    "disk": ["--kernel", "k", "--disk", "{}"],
    "overlay": ["--kernel", "k", "--disk", "d,overlay={}/x"],
    "faults": ["--kernel", "k", "--disk", "d,faults={}"],
    "cpu": ["--kernel", "k", "--cpu", "{}.json"],
    "console": ["--kernel", "k", "--console", "{}/x"],
    "vhost-user": ["--kernel", "k", "--disk", "vhost-user={}"],
}


@pytest.mark.parametrize("options", FILES.values(), ids=FILES)
@pytest.mark.parametrize("state", ["missing", "directory", "NUL", "long"])
def test_fault_39_no_file_is_complained_of_in_pythons_words(
    options: list[str], state: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = {"missing": "/nowhere/at/all", "directory": "folder", "NUL": "a\0b"}.get(
        state, "x" * 300
    )
    os.mkdir(place / "folder")
    os.mkdir(place / "folder.json")
    argv = [option.format(name) for option in options]
    if state == "directory" and argv[-1].endswith("folder/x"):
        return  # a new file in a directory is fine
    line = refusal(capsys, "run", *argv)
    for word in ("[Errno", "Traceback", "Error:", "embedded null"):
        assert word not in line
