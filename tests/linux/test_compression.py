"""Unpacking: each format, cut off, damaged, too large; lz4 against the program of that name."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import random
import shutil
import subprocess
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import HostError
from pyvmm.linux import lz4
from pyvmm.linux.compression import Compression, UnpackError, decompress, detect
from pyvmm.linux.work import Budget

Pack = Callable[[bytes], bytes]
LIMIT = 1 << 20


def program(*command: str) -> Pack:
    """A packer that is a program of this host."""

    def pack(data: bytes) -> bytes:
        assert shutil.which(command[0]), f"apt-get install {command[0]}"
        return subprocess.run(command, input=data, capture_output=True, check=True).stdout

    return pack


def lzma_alone(data: bytes) -> bytes:
    return lzma.compress(data, lzma.FORMAT_ALONE)


PACKERS: dict[Compression, Pack] = {
    Compression.NONE: bytes,
    Compression.GZIP: gzip.compress,
    Compression.XZ: lzma.compress,
    Compression.BZIP2: bz2.compress,
    Compression.LZMA: lzma_alone,
    Compression.LZ4: program("lz4", "-l", "-9", "-c"),
    Compression.ZSTD: program("zstd", "-c"),
}
WORDS = b" ".join(random.Random(3).choices([b"kernel", b"initrd", b"x", b"\0\0\0"], k=20_000))
RUNS = bytes(100_000) + b"ab" * 50_000 + random.Random(4).randbytes(5000)


@pytest.mark.parametrize("kind", PACKERS)
@pytest.mark.parametrize("data", [b"x", WORDS, RUNS], ids=["short", "words", "runs"])
def test_what_was_packed_comes_out(kind: Compression, data: bytes) -> None:
    packed = PACKERS[kind](data)
    assert detect(packed) is kind
    assert decompress(packed, limit=LIMIT) == data
    if kind is not Compression.NONE:  # the kernel's build appends the unpacked size
        assert decompress(packed + len(data).to_bytes(4, "little"), limit=len(data)) == data


@pytest.mark.parametrize("kind", sorted(set(PACKERS) - {Compression.NONE}, key=str))
def test_no_more_comes_out_than_the_limit(kind: Compression) -> None:
    bomb = PACKERS[kind](bytes(50 << 20))
    with pytest.raises(UnpackError, match=f"{kind.value} data unpacks to more than the limit"):
        decompress(bomb, limit=LIMIT)


@pytest.mark.parametrize(
    "kind", sorted(set(PACKERS) - {Compression.NONE, Compression.ZSTD}, key=str)
)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_what_is_cut_off_is_refused(kind: Compression, share: float) -> None:
    packed = PACKERS[kind](WORDS)
    cut = packed[: max(10, int(len(packed) * share))]
    with pytest.raises(UnpackError, match=f"{kind.value} data is damaged"):
        decompress(cut, limit=LIMIT)


def test_what_zstd_cannot_read_is_refused() -> None:
    with pytest.raises(UnpackError, match="ZSTD data is damaged"):
        decompress(b"\x28\xb5\x2f\xfd" + b"\xff" * 20, limit=LIMIT)


@pytest.mark.parametrize(("head", "name"), [(b"\x28\xb5\x2f\xfd", "zstd"),
                                             (b"\x89LZO\0\r\n\x1a\n", "lzop")])
def test_a_program_that_is_missing_is_named(
    head: bytes, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("pyvmm.linux.compression._zstd_module", lambda: None)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(HostError, match=f"^{name} is missing; run: sudo apt-get .* {name}($|, or)"):
        decompress(head + bytes(20), limit=LIMIT)


@settings(deadline=None, max_examples=300)
# Not by programs: a process for each example would take minutes.
@given(st.sampled_from(sorted(set(PACKERS) - {Compression.ZSTD}, key=str)), st.binary(max_size=60))
def test_no_bytes_escape_as_anything_but_an_unpack_error(kind: Compression, data: bytes) -> None:
    head = PACKERS[kind](b"")[:10]
    with contextlib.suppress(UnpackError, HostError):  # the other formats' magics are among these
        assert len(decompress(head + data, limit=500)) <= 500


@given(st.binary(max_size=80))
def test_an_lz4_block_is_unpacked_or_refused(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert len(lz4.decompress_block(data, Budget())) <= 8 << 20


@pytest.mark.parametrize(("block", "problem"), [
    (b"", "ends too early"),
    (b"\xf0", "ends too early"),
    (b"\x50abc", "literals run past"),
    (b"\x10a\x02\0\x00", "a match 2 bytes back"),
    (b"\x10a\0\0\x00", "a match 0 bytes back"),
    (b"\x1fa\x01\0" + b"\xff" * 40_000 + b"\0", "leaves its block"),
])
def test_lz4_blocks_that_break_the_rules(block: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        lz4.decompress_block(block, Budget())
