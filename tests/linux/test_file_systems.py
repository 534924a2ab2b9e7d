"""File systems and partition tables told by their first bytes, as the programs that make them
write them, or their documents have them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.linux.file_systems import (
    HEAD_BYTES,
    detect,
    partition_offset,
    partition_table,
    squashfs_compressor,
)
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
    assert partition_table(head) == ""


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


@pytest.mark.parametrize(("make", "kind"), [
    (disk_heads.dos_disk, "dos"), (disk_heads.gpt_disk, "gpt"),
])
def test_partitions(make: Callable[[int, int], bytes], kind: str) -> None:
    head = make(3, 2048)
    assert partition_table(head) == kind
    assert partition_offset(head, 3) == 2048 * 512
    for number in (0, 1, 2, 4, 5, 129, 1 << 40):
        assert partition_offset(head, number) is None
    assert detect(head) is None


def test_a_boot_sector_is_no_partition_table() -> None:
    sector = bytearray(512)
    sector[446:510] = b"NTLDR is missing" * 4
    sector[510:] = b"\x55\xaa"
    assert partition_table(bytes(sector)) == ""
    assert partition_table(bytes(510) + b"\x55\xaa") == "", "nothing is in it"


@given(st.binary(max_size=2000), st.integers(0, 1 << 40))
def test_no_bytes_are_too_bad_for_a_partition_table(data: bytes, number: int) -> None:
    head = bytes(510) + b"\x55\xaaEFI PART" + data
    offset = partition_offset(head, number)
    assert offset is None or 0 < offset < 1 << 73
