"""Files that are no raw disk: named, refused or mentioned, and attached on demand."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shlex
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.cli.main import main
from pyvmm.cli.parse import parse_disk
from pyvmm.config import DiskConfig
from pyvmm.errors import ConfigError
from pyvmm.linux.cpio import pack_cpio
from pyvmm.storage.image_kinds import HEAD_BYTES, kind_of_head, kind_of_tail
from pyvmm.storage.open import DiskSource, open_backend
from tests.support.disk_heads import MAGICS, file_system, gpt_disk
from tests.support.kernels import bzimage, elf

RAW = file_system("ext4")


def by_qemu_img(kind: str, *options: str) -> Callable[[Path, Path], None]:
    def make(raw: Path, image: Path) -> None:
        subprocess.run(["qemu-img", "convert", "-q", "-f", "raw", "-O", kind, *options, raw, image],
                       check=True)
    return make


def by_program(*command: str) -> Callable[[Path, Path], None]:
    def make(raw: Path, image: Path) -> None:
        image.write_bytes(
            subprocess.run(command, input=raw.read_bytes(), capture_output=True, check=True).stdout
        )
    return make


def by_library(pack: Callable[[bytes], bytes]) -> Callable[[Path, Path], None]:
    def make(raw: Path, image: Path) -> None:
        image.write_bytes(pack(raw.read_bytes()))
    return make


def zipped(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("root.img", data)
    return file.getvalue()


def tarred(data: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo("root.img")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return file.getvalue()


# What makes an image of a raw one, and what the refusal must say.
REFUSED = {
    "qcow2": (by_qemu_img("qcow2"), "a qcow2 image"),
    "qcow": (by_qemu_img("qcow"), "a qcow image"),
    "vmdk": (by_qemu_img("vmdk"), "a VMDK image"),
    "vmdk-flat": (by_qemu_img("vmdk", "-o", "subformat=monolithicFlat"), "a VMDK"),
    "vhdx": (by_qemu_img("vhdx"), "a VHDX image"),
    "vdi": (by_qemu_img("vdi"), "a VDI image"),
    "vpc": (by_qemu_img("vpc"), "a VHD"),
    "qed": (by_qemu_img("qed"), "a QED image"),
    "parallels": (by_qemu_img("parallels"), "a Parallels image"),
    "gzip": (by_library(gzip.compress), "compressed with gzip"),
    "xz": (by_library(lzma.compress), "compressed with xz"),
    "lzma": (by_library(lambda data: lzma.compress(data, lzma.FORMAT_ALONE)),
             "compressed with lzma"),
    "bzip2": (by_library(bz2.compress), "compressed with bzip2"),
    "zstd": (by_program("zstd", "-c"), "compressed with zstd"),
    "lz4": (by_program("lz4", "-c"), "compressed with lz4"),
    "lz4-legacy": (by_program("lz4", "-l", "-c"), "compressed with lz4"),
    "zip": (by_library(zipped), "a zip archive"),
}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "raw"
    path.write_bytes(RAW.ljust(2 << 20, b"\0"))
    return path


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "bzImage"
    path.write_bytes(bzimage())
    return path


def opened(text: str) -> tuple[bytes, list[str]]:
    """The first sectors of the disk that ``--disk text`` is, and what is said of it."""
    config = parse_disk(text)
    assert isinstance(config, DiskConfig)
    lines: list[str] = []
    with closing(config.source.open(report=lines.append, until_s=None, made=ExitStack())) as disk:
        head = bytearray(min(4096, disk.size_bytes))
        disk.readv([memoryview(head)], 0)
    return bytes(head), lines


@pytest.mark.parametrize("kind", REFUSED)
def test_fault_22_what_is_no_raw_image_is_refused_with_the_command_that_makes_one(
    kind: str, raw: Path, tmp_path: Path
) -> None:
    make, name = REFUSED[kind]
    image = tmp_path / "an image"
    make(raw, image)
    size_bytes = image.stat().st_size
    image.write_bytes(image.read_bytes().ljust(-(-max(size_bytes, 512) // 512) * 512, b"\0"))
    for options in ("", ",ro", ",snapshot", f",overlay={tmp_path / 'new.overlay'}"):
        with pytest.raises(ConfigError) as caught:
            opened(f"{image}{options}")
        assert caught.value.subject == str(image)
        assert f"is {name}" in caught.value.problem
        assert ",format=raw" in caught.value.problem
    assert not (tmp_path / "new.overlay").exists()
    head, lines = opened(f"{image},format=raw")
    assert head == image.read_bytes()[:4096]
    assert lines == []
    # The command does what it is said to do.
    command = caught.value.problem.partition("convert it: ")[2].partition(" (to attach")[0]
    if kind != "zip":
        image.write_bytes(image.read_bytes()[:size_bytes])
        subprocess.run(["bash", "-c", command], check=True, capture_output=True)
        assert Path(shlex.split(command)[-1]).read_bytes()[: 2 << 20] == raw.read_bytes()
    else:
        assert command == f"unzip '{image}'"


@pytest.mark.parametrize("command", [
    ["run", "--kernel", "{kernel}", "--timeout", "5"],
    ["export", "--socket", "{socket}"],
])
def test_fault_22_both_commands_refuse_a_qcow2_image(
    raw: Path, kernel: Path, tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "root.qcow2"
    by_qemu_img("qcow2")(raw, image)
    words = [word.format(kernel=kernel, socket=tmp_path / "s") for word in command]
    assert main([*words, "--disk", str(image)]) == 125
    line = capsys.readouterr().err
    assert line == (
        f"pyvmm: {image}: is a qcow2 image, and a disk must be a raw image; convert it: qemu-img "
        f"convert -O raw {image} {image}.raw (to attach these very bytes add ,format=raw)\n"
    )


@pytest.mark.parametrize(("content", "name"), [
    (tarred(b"data"), "a tar archive"),
    (pack_cpio([("init", 0o100755, b"#!/bin/sh\n")]), "an initramfs"),
    (bytes(bzimage()), "a Linux kernel"),
    (bytes(elf()), "an ELF file"),
    (b"!<arch>\ndebian-binary", "an ar archive"),
    (RAW + b"conectix" + bytes(504), "a VHD"),
])
def test_fault_22_bytes_that_a_guest_may_well_want_are_mentioned_only(
    tmp_path: Path, content: bytes, name: str
) -> None:
    path = tmp_path / "data"
    path.write_bytes(content.ljust(-(-len(content) // 512) * 512, b"\0"))
    _, lines = opened(f"{path},ro")
    assert len(lines) == 1
    assert lines[0].startswith(f"{path}: is {name}")
    assert opened(f"{path},ro,format=raw")[1] == []


@pytest.mark.parametrize("content", [
    *(file_system(name) for name in ("ext2", "ext4", *MAGICS)), gpt_disk(1, 2048), bytes(512),
    b"\xeb\x63\x90".ljust(510, b"\0") + b"\x55\xaa", b"LUKS\xba\xbe".ljust(4096, b"\0"),
    b"QED, said the guest, in a disk of text.".ljust(512),
])
def test_raw_disks_are_not_spoken_of(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "disk"
    path.write_bytes(content)
    assert opened(str(path)) == (content[:4096], [])


def test_an_overlay_is_no_disk(raw: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "mine.overlay"
    opened(f"{raw},overlay={overlay}")
    with pytest.raises(ConfigError, match=f"overlay of pyvmm.*--disk BASE,overlay={overlay}"):
        opened(str(overlay))
    assert opened(f"{raw},overlay={overlay}")[0] == raw.read_bytes()[:4096]


def test_other_formats_are_not_served(raw: Path) -> None:
    for word in ("qcow2", "RAW", "auto"):
        with pytest.raises(ConfigError, match=f"format={word} is not raw; .*qemu-img convert"):
            parse_disk(f"{raw},format={word}")
    with pytest.raises(ConfigError, match="format is for the back end to decide"):
        parse_disk("vhost-user=s,format=raw")


def test_a_disk_that_fails_is_left_to_the_guest(raw: Path, tmp_path: Path) -> None:
    """The look at a disk goes past its faults: they count the guest's operations."""
    (tmp_path / "faults").write_text("read 1: EIO\n")
    source = DiskSource(location=str(raw), faults=str(tmp_path / "faults"))
    with closing(open_backend(source, report=print)) as disk, pytest.raises(OSError, match="Input"):
        disk.readv([memoryview(bytearray(512))], 0)


@given(st.binary(max_size=HEAD_BYTES), st.text(max_size=20))
def test_any_bytes_are_something_or_nothing(data: bytes, path: str) -> None:
    for kind in (kind_of_head(data), kind_of_tail(data)):
        if kind is not None:
            assert kind.name
            assert kind.remedy(path)


@pytest.mark.parametrize("content", [
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1073741824\n",
    b"version https://git-lfs.github.com/spec/v1\n".ljust(512, b"x"),
])
def test_fault_27_a_git_lfs_pointer_is_no_disk(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "root.img"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"is a Git LFS pointer.*git lfs pull"):
        opened(str(path))


@pytest.mark.parametrize("start", [b"<!DOCTYPE html>", b"<!doctype html>", b"<html>", b"<HTML>"])
def test_fault_27_a_page_that_was_downloaded_instead(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "root.img"
    path.write_bytes(start.ljust(1024, b" "))
    _, lines = opened(f"{path},ro")
    assert lines == [f"{path}: is an HTML page, attached as the raw bytes it is (head {path})"]
    path.write_bytes(start)
    with pytest.raises(ConfigError, match=f"has {len(start)} bytes.* is an HTML page"):
        opened(str(path))


def test_fault_27_an_overlay_that_is_an_image_says_which(raw: Path, tmp_path: Path) -> None:
    image = tmp_path / "mine.qcow2"
    by_qemu_img("qcow2")(raw, image)
    with pytest.raises(ConfigError, match=r"is a qcow2 image, no overlay of pyvmm's"):
        opened(f"{raw},overlay={image}")
