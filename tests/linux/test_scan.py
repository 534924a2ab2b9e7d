"""Looking through kernels: what is found, however it comes, and what is never waited for."""

from __future__ import annotations

import gzip
import itertools
import lzma
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.linux import config
from pyvmm.linux.compression import Compression, UnpackError
from pyvmm.linux.scan import (
    IN_KERNEL,
    MAX_PACKED_BYTES,
    MAX_SLOW_BYTES,
    Scan,
    check_packed,
    scan,
    unpack_and_scan,
)

TEXT = b"CONFIG_64BIT=y\n# CONFIG_ACPI is not set\n"
BLOB = b"IKCFG_ST" + gzip.compress(TEXT, mtime=0) + b"IKCFG_ED"
BANNER = b"Linux version 6.1.0-x (who@where) #1"
KERNEL = b"\x7fELF" + bytes(100) + BANNER + b"\n\0" + bytes(700) + BLOB + bytes(900)


def packed(kernel: bytes = KERNEL) -> bytes:
    """As in a bzImage: with the unpacked size at the end."""
    return lzma.compress(kernel) + len(kernel).to_bytes(4, "little")


def assert_found(found: Scan) -> None:
    assert found.version == "6.1.0-x (who@where) #1"
    assert found.config == config.KernelConfig({"64BIT": "y"}, IN_KERNEL)
    assert found.is_elf


@given(st.lists(st.integers(0, len(KERNEL)), max_size=30))
def test_it_does_not_matter_where_the_pieces_end(ends: list[int]) -> None:
    cuts = [0, *sorted(ends), len(KERNEL)]
    found = scan(KERNEL[a:b] for a, b in itertools.pairwise(cuts))
    assert_found(found)
    assert found.size_bytes == len(KERNEL)


def test_byte_by_byte() -> None:
    assert_found(scan(KERNEL[at : at + 1] for at in range(len(KERNEL))))


@pytest.mark.parametrize("image", [
    b"", b"IKCFG_ST", b"IKCFG_STIKCFG_ED", b"IKCFG_ED IKCFG_ST", b"IKCFG_ST\x1f\x8bxIKCFG_ED",
    b"IKCFG_ST" + gzip.compress(b"nothing", mtime=0) + b"IKCFG_ED", BLOB[:-1], BLOB[1:],
])
def test_what_is_no_configuration(image: bytes) -> None:
    assert scan([image]).config is None


def test_a_banner_at_the_very_end() -> None:
    assert scan([b"x" + BANNER]).version == "6.1.0-x (who@where) #1"


def endless(pieces_taken: list[int], piece: bytes) -> Iterator[bytes]:
    while True:
        pieces_taken.append(1)
        yield piece


def test_no_farther_than_need_be() -> None:
    taken: list[int] = []

    def parts() -> Iterator[bytes]:
        yield KERNEL
        yield from endless(taken, bytes(1000))

    assert_found(scan(parts(), whole=False))
    assert taken == []


def test_a_configuration_without_an_end_is_given_up() -> None:
    taken: list[int] = []

    def parts() -> Iterator[bytes]:
        yield BANNER + b"\0IKCFG_ST"
        yield from endless(taken, bytes(1 << 20))

    assert scan(parts(), whole=False).config is None
    assert len(taken) <= (config.MAX_CONFIG_BYTES >> 20) + 1


def test_a_payload() -> None:
    found = unpack_and_scan(packed())
    assert_found(found)
    assert found.size_bytes == len(KERNEL)
    assert_found(unpack_and_scan(packed(), whole=False))


@pytest.mark.parametrize(("payload", "problem"), [
    (b"", "by no method known here"),
    (b"no magic number", "by no method known here"),
    (packed(b"#!/bin/sh\n" + bytes(5000)), "holds no ELF image"),
    (packed(b"\x7fE"), "holds no ELF image"),
    (lzma.compress(KERNEL) + b"\xff\xff\xff\x7f", "unpacks to 2147483647 bytes; the limit is"),
])
def test_what_is_no_kernel(payload: bytes, problem: str) -> None:
    for whole in (True, False):
        with pytest.raises(UnpackError, match=problem):
            unpack_and_scan(payload, whole=whole)


def test_a_payload_that_is_cut_off() -> None:
    payload = lzma.compress(KERNEL) + (len(KERNEL) + 1).to_bytes(4, "little")
    with pytest.raises(UnpackError, match="its payload is cut off: "):
        unpack_and_scan(payload)
    assert_found(unpack_and_scan(payload, whole=False))


@pytest.mark.parametrize(("kind", "limit"), [
    (Compression.GZIP, MAX_PACKED_BYTES), (Compression.ZSTD, MAX_PACKED_BYTES),
    (Compression.XZ, MAX_SLOW_BYTES), (Compression.LZ4, MAX_SLOW_BYTES),
])
def test_what_takes_too_long_to_unpack(kind: Compression, limit: int) -> None:
    check_packed(kind, limit)
    with pytest.raises(UnpackError, match=f"{limit + 1} bytes of {kind.value}; up to {limit} are"):
        check_packed(kind, limit + 1)


def test_what_is_no_kernel_is_not_unpacked_to_its_end() -> None:
    """Half a gigabyte of zeros, which this would otherwise be."""
    bomb = packed(b"#!/bin/sh\n")[:-4]
    with pytest.raises(UnpackError, match="holds no ELF image"):
        unpack_and_scan(bomb + (512 << 20).to_bytes(4, "little"))


@given(st.binary(max_size=300))
def test_no_image_raises(data: bytes) -> None:
    assert scan([b"IKCFG_ST" + data + b"IKCFG_ED"]).size_bytes == len(data) + 16
