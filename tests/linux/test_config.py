"""Where a kernel's configuration is found, and what is none."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.linux import config
from pyvmm.linux.compression import UnpackError

TEXT = """\
#
# Linux/x86 6.1.0 Kernel Configuration
#
CONFIG_64BIT=y
CONFIG_VIRTIO_BLK=m
# CONFIG_ACPI is not set
CONFIG_LOCALVERSION="-x"
CONFIG_NR_CPUS=8
"""


def put(path: Path, content: str | bytes = TEXT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_read(tmp_path: Path, pack: type[bytes]) -> None:
    found = config.read(put(tmp_path / "c", pack(TEXT.encode())))
    assert found is not None
    assert found.source == str(tmp_path / "c")
    states = {name: found.state(name) for name in ("64BIT", "VIRTIO_BLK", "ACPI", "X", "NR_CPUS")}
    assert states == {"64BIT": "y", "VIRTIO_BLK": "m", "ACPI": "n", "X": "n", "NR_CPUS": "8"}


@pytest.mark.parametrize("content", [b"", b"hello\n", b"\x7fELF", b"\xff" * 100, b"CONFIG_\n"])
def test_what_is_no_configuration(tmp_path: Path, content: bytes) -> None:
    assert config.read(put(tmp_path / "c", content)) is None


def test_nothing_but_unset_options_is_a_configuration(tmp_path: Path) -> None:
    found = config.read(put(tmp_path / "c", "# CONFIG_ACPI is not set\n"))
    assert found is not None
    assert found.options == {}


def test_too_much_is_refused(tmp_path: Path) -> None:
    big = bytes(config.MAX_CONFIG_BYTES + 1)
    with pytest.raises(UnpackError, match="larger than the limit of 8388608 bytes"):
        config.read(put(tmp_path / "c", big))
    with pytest.raises(UnpackError, match="more than the limit of 8388608"):
        config.read(put(tmp_path / "c", gzip.compress(big)))
    with pytest.raises(UnpackError, match="larger than the limit"):
        config.read(Path("/dev/zero"))


def test_unpack() -> None:
    found = config.unpack(gzip.compress(TEXT.encode()), "inside")
    assert found is not None
    assert (found.state("64BIT"), found.source) == ("y", "inside")
    assert found.text("LOCALVERSION") == "-x"
    assert (found.text("NR_CPUS"), found.text("ACPI")) == ("", "")


@pytest.mark.parametrize("packed", [b"", b"\x1f\x8bx", gzip.compress(b"nothing", mtime=0)])
def test_what_cannot_be_unpacked(packed: bytes) -> None:
    assert config.unpack(packed, "inside") is None


def test_a_bomb_is_cut() -> None:
    found = config.unpack(gzip.compress(b"CONFIG_A=y\n" + bytes(50 << 20)), "inside")
    assert found is not None
    assert found.options == {"A": "y"}


@given(st.binary(max_size=300))
def test_no_bytes_raise(data: bytes) -> None:
    config.unpack(data, "inside")
    config.unpack(b"\x1f\x8b\x08" + data, "inside")


@pytest.mark.parametrize(
    ("kernel", "version", "place"),
    [
        ("boot/vmlinuz-6.1.0-9-amd64", "", "boot/config-6.1.0-9-amd64"),
        ("boot/bzImage", "6.1.0-x (who@where) #1", "boot/config-6.1.0-x"),
        ("linux/vmlinux", "", "linux/.config"),
        ("linux/arch/x86/boot/bzImage", "", "linux/.config"),
    ],
)
def test_beside(tmp_path: Path, kernel: str, version: str, place: str) -> None:
    path = put(tmp_path / kernel, b"kernel")
    assert config.beside(path, version) is None
    put(tmp_path / place)
    found = config.beside(path, version)
    assert found is not None
    assert found.source == str(tmp_path / place)


def test_beside_what_a_link_points_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = put(tmp_path / "boot/vmlinuz-6.1", b"kernel")
    put(tmp_path / "boot/config-6.1")
    (tmp_path / "vmlinuz").symlink_to(target)
    monkeypatch.chdir(tmp_path)
    assert config.beside(Path("vmlinuz"), "") is not None


def test_beside_passes_over_what_is_none(tmp_path: Path) -> None:
    kernel = put(tmp_path / "vmlinuz-6.1", b"kernel")
    (tmp_path / "config-6.1").mkdir()
    assert config.beside(kernel, "6.1-a") is None
    put(tmp_path / "config-6.1-a", b"\x1f\x8bnothing")
    assert config.beside(kernel, "6.1-a") is None
    assert config.beside(kernel, "../../etc/passwd x") is None
    assert config.beside(kernel, "a\0b") is None
