"""File systems told by their superblocks, as the programs that make them write them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.linux.file_systems import HEAD_BYTES, detect
from pyvmm.linux.requirements import FILE_SYSTEMS


@pytest.mark.parametrize("kind", ["ext2", "ext3", "ext4"])
def test_ext(tmp_path: Path, kind: str) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(8 << 20))
    subprocess.run(["/sbin/mke2fs", "-q", "-F", "-t", kind, image], check=True)
    assert detect(image.read_bytes()[:HEAD_BYTES]) == kind


@pytest.mark.parametrize(("offset", "magic", "kind"), [
    (0, b"XFSB", "xfs"),
    (0, b"hsqs", "squashfs"),
    (1024, (0xE0F5E1E2).to_bytes(4, "little"), "erofs"),
    (1024, (0xF2F52010).to_bytes(4, "little"), "f2fs"),
    (0x10040, b"_BHRfS_M", "btrfs"),
])
def test_magic_numbers(offset: int, magic: bytes, kind: str) -> None:
    head = bytearray(HEAD_BYTES)
    head[offset : offset + len(magic)] = magic
    assert detect(bytes(head)) == kind
    assert kind in FILE_SYSTEMS


@given(st.binary(max_size=3000))
def test_anything_else_is_unknown_or_named(head: bytes) -> None:
    assert detect(head) in {None, *FILE_SYSTEMS}
    assert detect(bytes(0x430) + head) in {None, "ext2", "ext3", "ext4"}
