"""File systems told by their first bytes, as the programs that make them write them, or their
documents have them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.linux.file_systems import (
    HEAD_BYTES,
    block_bytes,
    detect,
    identity,
    other_content,
    squashfs_compressor,
    unknown_ext_features,
)
from pyvmm.linux.partitions import table_kind
from pyvmm.linux.requirements import FILE_SYSTEMS
from tests.support import disk_heads


@pytest.mark.parametrize("kind", ["ext2", "ext3", "ext4"])
def test_ext(tmp_path: Path, kind: str) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(8 << 20))
    subprocess.run(["/sbin/mke2fs", "-q", "-F", "-t", kind, image], check=True)
    assert detect(image.read_bytes()[:HEAD_BYTES]) == kind


@pytest.mark.parametrize("kind", disk_heads.MAGICS)
def test_magic_numbers(kind: str) -> None:
    assert detect(disk_heads.file_system(kind)) == kind


@pytest.mark.parametrize("kind", FILE_SYSTEMS)
def test_every_file_system_that_is_asked_for_is_told(kind: str) -> None:
    head = disk_heads.file_system(kind)
    assert detect(head) == kind
    assert table_kind(head) == ""


@pytest.mark.parametrize("name", ["ZLIB", "LZO", "XZ", "LZ4", "ZSTD"])
def test_what_a_squashfs_is_packed_with(name: str) -> None:
    assert squashfs_compressor(disk_heads.file_system("squashfs", name)) == name


@pytest.mark.parametrize("number", [0, 2, 7, 0xFFFF])
def test_a_squashfs_that_linux_does_not_unpack(number: int) -> None:
    head = bytearray(disk_heads.file_system("squashfs"))
    head[20:22] = number.to_bytes(2, "little")
    assert squashfs_compressor(bytes(head)) == ""


@given(st.binary(max_size=3000))
def test_anything_else_is_unknown_or_named(head: bytes) -> None:
    assert detect(head) in {None, *FILE_SYSTEMS}
    assert detect(bytes(0x430) + head) in {None, "ext2", "ext3", "ext4"}


@pytest.mark.parametrize(("content", "name"), [
    (bytes(HEAD_BYTES), "empty"), (bytes(100), ""), (b"LUKS\xba\xbe", "LUKS"),
    (b"\xeb\x58\x90mkfs.fat".ljust(0x52) + b"FAT32   ", "vfat"), (b"\xeb\x52\x90NTFS    ", "ntfs"),
    (bytes(0xFF6) + b"SWAPSPACE2", "swap"),
    (bytes(512) + b"LABELONE".ljust(24, b"\0") + b"LVM2 001", "LVM"),
])
def test_what_else_may_be_there(content: bytes, name: str) -> None:
    assert other_content(content) == name
    assert detect(content) is None


@pytest.mark.parametrize("block_size", [1024, 4096, 65536])
def test_an_ext4_says_its_name_and_its_blocks(tmp_path: Path, block_size: int) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(32 << 20))
    uuid = "0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9"
    subprocess.run(["/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-b", str(block_size), "-U", uuid,
                    "-L", "my root", image], check=True, capture_output=True)
    head = image.read_bytes()[:HEAD_BYTES]
    assert identity(head, "ext4") == (uuid, "my root")
    assert block_bytes(head, "ext4") == block_size
    assert unknown_ext_features(head) == 0


def test_features_that_no_linux_has() -> None:
    head = bytearray(disk_heads.file_system("ext4"))
    head[0x463] = 0x40
    assert unknown_ext_features(bytes(head)) == 0x4000_0000


@given(st.binary(max_size=200), st.integers(0, 0x10200))
def test_no_bytes_are_too_bad(data: bytes, at: int) -> None:
    head = bytes(at) + data
    for kind in (*FILE_SYSTEMS, "none"):
        identity(head, kind)
        assert 0 <= block_bytes(head, kind) < 1 << 35
    other_content(head)
