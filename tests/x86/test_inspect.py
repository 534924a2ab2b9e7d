"""What is found out about a kernel file without booting it."""

from __future__ import annotations

import functools
import gzip
import itertools
import lzma
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.errors import ConfigError
from pyvmm.linux.compression import Compression
from pyvmm.linux.config import KernelConfig
from pyvmm.linux.scan import MAX_PACKED_BYTES
from pyvmm.linux.work import Budget
from pyvmm.x86.image import EntryKind, KernelKind
from pyvmm.x86.inspect import IN_KERNEL, inspect, read_configuration
from tests.support.kernels import MIB, ElfSegment, bz_with, bzimage, elf, note_segment, pvh_note
from tests.support.loading import MakeFile

CONFIG = b"CONFIG_64BIT=y\nCONFIG_VIRTIO_BLK=m\n"
VMLINUX = bytes(elf(ElfSegment(
    data=b"Linux version 6.1.0-inside (who@where) #1\n\0IKCFG_ST" + gzip.compress(CONFIG)
    + b"IKCFG_ED" + bytes(5000)
), note_segment(pvh_note(2 * MIB))))
SIZE = len(VMLINUX).to_bytes(4, "little")


def packed_by(*command: str) -> bytes:
    assert shutil.which(command[0]), f"apt-get install {command[0]}"
    return subprocess.run(command, input=VMLINUX, capture_output=True, check=True).stdout + SIZE


@pytest.mark.parametrize(
    ("payload", "compression"),
    [
        (gzip.compress(VMLINUX), Compression.GZIP),
        (lzma.compress(VMLINUX) + SIZE, Compression.XZ),
        (packed_by("lz4", "-l", "-c"), Compression.LZ4),
        (packed_by("zstd", "-c"), Compression.ZSTD),
    ],
    ids=lambda value: value.value if isinstance(value, Compression) else "",
)
def test_a_bzimage(image: MakeFile, payload: bytes, compression: Compression) -> None:
    found = inspect(image(bz_with(payload)))
    assert (found.kernel.kind, found.kernel.protocol) == (KernelKind.BZIMAGE, 0x20F)
    assert (found.compression, found.unknown) == (compression, "")
    assert (found.packed_bytes, found.unpacked_bytes) == (len(payload), len(VMLINUX))
    assert found.version == "6.1.0-synthetic"
    assert found.config == KernelConfig({"64BIT": "y", "VIRTIO_BLK": "m"}, IN_KERNEL)


def test_a_vmlinux(image: MakeFile) -> None:
    found = inspect(image(VMLINUX))
    assert found.kernel.entry_kind is EntryKind.PVH
    assert (found.compression, found.packed_bytes, found.unpacked_bytes) == (Compression.NONE, 0, 0)
    assert found.version == "6.1.0-inside (who@where) #1"
    assert found.config is not None
    assert found.config.source == IN_KERNEL


def test_any_amount_of_ram_will_do(image: MakeFile) -> None:
    assert inspect(image(bzimage(init_size=1 << 30))).kernel.end == 2 * MIB + (1 << 30)


@pytest.mark.parametrize(
    ("content", "unknown"),
    [
        (bzimage(), "its header says nothing of a payload"),
        (bz_with(b"x", payload_length=0xFFFFFFFF), "its header says nothing of a payload"),
        (bz_with(b"x", payload_offset=0xFFFFFFFF), "its header says nothing of a payload"),
        (bz_with(b"no magic number here"), "compressed by no method known here"),
        (bz_with(gzip.compress(b"no kernel")), "its payload holds no ELF image"),
        (bz_with(gzip.compress(VMLINUX)[:-100]), "GZIP data|its payload unpacks to|more than"),
    ],
)
def test_a_payload_that_cannot_be_unpacked_is_said(
    image: MakeFile, content: bytearray, unknown: str
) -> None:
    found = inspect(image(content))
    assert any(part in found.unknown for part in unknown.split("|"))
    assert found.config is None


def test_the_config_option_has_precedence(image: MakeFile, tmp_path: Path) -> None:
    file = tmp_path / "my.config"
    file.write_text("CONFIG_64BIT=y\n")
    found = inspect(image(VMLINUX), file)
    assert found.config == KernelConfig({"64BIT": "y"}, str(file))


@pytest.mark.parametrize(("content", "problem"), [
    (b"hello", "is no kernel configuration"),
    (b"\x1f\x8b..", "GZIP data is damaged"),
    (None, "cannot read .*: No such file or directory"),
])
def test_a_config_that_is_none(
    image: MakeFile, tmp_path: Path, content: bytes | None, problem: str
) -> None:
    file = tmp_path / "my.config"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^--config: .*{problem}"):
        inspect(image(VMLINUX), file)


def test_a_file_that_is_no_kernel(image: MakeFile) -> None:
    with pytest.raises(ConfigError, match="not a Linux kernel"):
        inspect(image(b"hello"))


# ---- for pyvmm run -------------------------------------------------------------------------------


def test_what_lies_beside_a_kernel_costs_no_unpacking(image: MakeFile, tmp_path: Path) -> None:
    path = image(bz_with(gzip.compress(VMLINUX)))
    assert read_configuration(path, unpack=False) is None
    inside = read_configuration(path, unpack=True)
    assert inside == KernelConfig({"64BIT": "y", "VIRTIO_BLK": "m"}, IN_KERNEL)
    beside = tmp_path / "config-6.1.0-synthetic"
    beside.write_text("CONFIG_64BIT=y\n")
    assert read_configuration(path, unpack=False) == KernelConfig({"64BIT": "y"}, str(beside))
    assert read_configuration(path, unpack=True) == inside, "the kernel knows better"
    path.write_bytes(bzimage())
    assert read_configuration(path, unpack=True) == KernelConfig({"64BIT": "y"}, str(beside))


def test_an_explanation_never_fails(image: MakeFile, tmp_path: Path) -> None:
    for unpack in (True, False):
        assert read_configuration(tmp_path / "missing", unpack=unpack) is None
        assert read_configuration(tmp_path, unpack=unpack) is None
        assert read_configuration(image(b"hello"), unpack=unpack) is None
        path = image(bz_with(b"no magic number here"))
        assert read_configuration(path, unpack=unpack) is None


def test_a_kernel_that_takes_too_much_to_unpack_is_known_by_the_file_beside_it(
    image: MakeFile, tmp_path: Path
) -> None:
    path = image(bz_with(gzip.compress(VMLINUX)))
    beside = tmp_path / "config-6.1.0-synthetic"
    beside.write_text("CONFIG_64BIT=y\n")
    sources = []
    for steps in range(2000):
        found = read_configuration(path, unpack=True, budget=Budget(steps=steps))
        sources.append("" if found is None else found.source)
    changes = [sources[0], *(now for old, now in itertools.pairwise(sources) if now != old)]
    assert changes == ["", str(beside), IN_KERNEL]


@pytest.mark.parametrize("size_bytes", [MAX_PACKED_BYTES + 1, 1 << 31])
def test_a_payload_too_large_to_look_into_is_not_read(image: MakeFile, size_bytes: int) -> None:
    head = bz_with(b"\x1f\x8b" + bytes(600), payload_length=size_bytes)
    path = image(head)
    with path.open("r+b") as file:
        file.truncate(size_bytes + len(head))  # a hole
    found = inspect(path)
    assert found.unknown == (
        f"its payload is {size_bytes} bytes of GZIP; up to {MAX_PACKED_BYTES} are looked into"
    )


@pytest.mark.parametrize("pack", [
    ["lz4", "-l", "-c"], ["gzip", "-1", "-c"], ["zstd", "-c"], ["xz", "-0", "-c"],
], ids=lambda command: command[0])
def test_a_bomb_is_unpacked_in_little_memory(
    image: MakeFile, tmp_path: Path, pack: list[str]
) -> None:
    """Half a gigabyte, in half as much address space for all of Python."""
    size_bytes = 512 << 20
    bomb = tmp_path / "bomb"
    with bomb.open("wb") as file:
        file.write(VMLINUX)
        file.truncate(size_bytes)
    with bomb.open("rb") as file:
        packed = subprocess.run(pack, stdin=file, capture_output=True, check=True).stdout
    path = image(bz_with(packed + size_bytes.to_bytes(4, "little"), init_size=1 << 30))
    limit = 300 << 20
    done = subprocess.run(
        [sys.executable, "-m", "pyvmm", "kernel", "inspect", path], capture_output=True,
        text=True, check=False, env={**os.environ, "PYVMM_CACHE": str(tmp_path / "cache")},
        preexec_fn=functools.partial(resource.setrlimit, resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.stderr == ""
    assert "512.0 MiB" in done.stdout
    assert "in the kernel (IKCONFIG)" in done.stdout


@settings(max_examples=100, deadline=None, suppress_health_check=[
    HealthCheck.function_scoped_fixture,  # one file that every example overwrites
])
@given(
    payload=st.sampled_from([gzip.compress(VMLINUX), lzma.compress(VMLINUX) + SIZE, b"BZh9"]),
    noise=st.dictionaries(st.integers(0, 400), st.integers(0, 255), max_size=5),
    fields=st.fixed_dictionaries({}, optional={
        "payload_offset": st.integers(0, 0xFFFFFFFF), "payload_length": st.integers(0, 0xFFFFFFFF),
    }),
)
def test_no_payload_escapes_as_anything_but_unknown(
    image: MakeFile, payload: bytes, noise: dict[int, int], fields: dict[str, int]
) -> None:
    bent = bytearray(payload)
    for offset, byte in noise.items():
        if offset < len(bent):
            bent[offset] = byte
    found = inspect(image(bz_with(bytes(bent), **fields)))
    assert bool(found.unknown) == (found.unpacked_bytes == 0)
