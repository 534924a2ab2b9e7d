"""What is found out about a kernel file without booting it."""

from __future__ import annotations

import gzip
import lzma
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.errors import ConfigError
from pyvmm.linux.compression import Compression
from pyvmm.linux.config import KernelConfig
from pyvmm.x86.image import EntryKind, KernelKind
from pyvmm.x86.inspect import IN_KERNEL, describe_guest, inspect, missing_options
from tests.support.kernels import MIB, ElfSegment, bzimage, elf, note_segment, pvh_note
from tests.support.loading import MakeFile

CONFIG = b"CONFIG_64BIT=y\nCONFIG_VIRTIO_BLK=m\n"
VMLINUX = bytes(elf(ElfSegment(
    data=b"Linux version 6.1.0-inside (who@where) #1\n\0IKCFG_ST" + gzip.compress(CONFIG)
    + b"IKCFG_ED" + bytes(5000)
), note_segment(pvh_note(2 * MIB))))
SIZE = len(VMLINUX).to_bytes(4, "little")
MISSING_EVERYTHING = "# CONFIG_64BIT is not set\n"


def bz_with(payload: bytes, **fields: int) -> bytearray:
    """A bzImage of ``payload``."""
    return bzimage({"payload_offset": 0x400, "payload_length": len(payload)} | fields,
                   code=bytes(0x400) + payload)


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


@pytest.fixture
def ext4() -> bytes:
    """The start of a disk of ext4."""
    head = bytearray(0x1000)
    head[0x438:0x43A] = b"\x53\xef"
    head[0x460] = 0x40
    return bytes(head)


def test_run_learns_what_is_missing(image: MakeFile, tmp_path: Path, ext4: bytes) -> None:
    path = image(bzimage())
    assert missing_options(path, initrd=None, disk_head=ext4) == []
    (tmp_path / "config-6.1.0-synthetic").write_text(MISSING_EVERYTHING)
    options = {problem.option for problem in missing_options(path, initrd=None, disk_head=ext4)}
    assert {"SERIAL_8250_CONSOLE", "VIRTIO_BLK", "EXT4_FS", "DEVTMPFS"} <= options
    assert "BLK_DEV_INITRD" not in options


def test_run_without_a_disk_or_with_an_initrd(
    image: MakeFile, initrd_file: MakeFile, tmp_path: Path, ext4: bytes
) -> None:
    path, initrd = image(bzimage()), initrd_file(lzma.compress(b"initrd"))
    (tmp_path / "config-6.1.0-synthetic").write_text(MISSING_EVERYTHING)
    options = {problem.option for problem in missing_options(path, initrd=initrd, disk_head=None)}
    assert {"BLK_DEV_INITRD", "RD_XZ"} <= options
    assert not options & {"VIRTIO_BLK", "EXT4_FS", "DEVTMPFS_MOUNT"}
    options = {problem.option for problem in missing_options(path, initrd=initrd, disk_head=ext4)}
    assert "VIRTIO_BLK" in options
    assert "EXT4_FS" not in options, "the initrd knows what it mounts"
    options = {problem.option for problem in missing_options(path, initrd=None, disk_head=b"")}
    assert "VIRTIO_BLK" in options
    assert "EXT4_FS" not in options


def test_the_config_inside_is_looked_at_only_when_asked(image: MakeFile, ext4: bytes) -> None:
    path = image(bz_with(gzip.compress(VMLINUX)))
    assert missing_options(path, initrd=None, disk_head=ext4) == []
    problems = missing_options(path, initrd=None, disk_head=ext4, unpack=True)
    assert ("VIRTIO_BLK", "m") in {(problem.option, problem.state) for problem in problems}


def test_an_explanation_never_fails(image: MakeFile, tmp_path: Path) -> None:
    assert missing_options(tmp_path / "missing", initrd=None, disk_head=None) == []
    assert missing_options(image(b"hello"), initrd=None, disk_head=None, unpack=True) == []
    path = image(bz_with(b"no magic number here"))
    assert missing_options(path, initrd=tmp_path, disk_head=None, unpack=True) == []
    assert missing_options(path, initrd=None, disk_head=None, unpack=True) == []


def test_a_guest_from_its_files(initrd_file: MakeFile, ext4: bytes) -> None:
    guest = describe_guest(None, ext4)
    assert (guest.has_disk, guest.initrd_compression, guest.file_system) == (True, None, "ext4")
    guest = describe_guest(initrd_file(b"07070100"), None)
    assert (guest.has_disk, guest.initrd_compression) == (False, Compression.NONE)
    with pytest.raises(ConfigError, match="cannot open"):
        describe_guest("/nowhere", None)


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
