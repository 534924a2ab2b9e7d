"""What the lab needs of the host, and how it calls QEMU."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from pyvmm.errors import HostError
from pyvmm.lab import qemu


def elf(*segment_types: int) -> bytes:
    """A 64-bit ELF header and a program header of each type."""
    header = bytearray(64)
    header[:5] = b"\x7fELF\x02"
    struct.pack_into("<Q", header, 32, 64)
    struct.pack_into("<HH", header, 54, 56, len(segment_types))
    return bytes(header) + b"".join(struct.pack("<I52x", kind) for kind in segment_types)


def put_program(directory: Path, name: str, contents: bytes) -> None:
    (directory / name).write_bytes(contents)
    (directory / name).chmod(0o755)


@pytest.mark.parametrize(
    ("programs", "message"),
    [
        ({}, "qemu-system-x86 and busybox-static are missing"),
        ({"busybox": elf(1)}, "qemu-system-x86 is missing"),
        ({qemu.BINARY: b""}, "busybox-static is missing"),
        ({qemu.BINARY: b"", "busybox": elf(3)}, "busybox-static is missing"),
    ],
)
@pytest.mark.parametrize("uid", [0, 1000])
def test_missing_packages_are_one_line_with_the_command(
    programs: dict[str, bytes],
    message: str,
    uid: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, contents in programs.items():
        put_program(tmp_path, name, contents)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    with pytest.raises(HostError) as caught:
        qemu.find_busybox()
    packages = message.partition(" are ")[0].partition(" is ")[0].replace(" and ", " ")
    sudo = "sudo " if uid else ""
    assert str(caught.value) == (
        f"lab: {message}; run: {sudo}apt-get install -y --no-install-recommends {packages}"
    )


def test_finds_a_static_busybox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_program(tmp_path, qemu.BINARY, b"")
    put_program(tmp_path, "busybox", elf(1))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert qemu.find_busybox() == tmp_path / "busybox"


def arguments(ports: dict[str, int], writable: list[Path]) -> list[str]:
    return qemu.command_line(
        vmlinux=Path("/k/vmlinux"), initramfs_fd=9, cpus=2, memory_bytes=3 << 30,
        writable=writable, ports=ports, quiet=True,
    )  # fmt: skip


def test_directories_are_shared_as_asked() -> None:
    line = " ".join(arguments({"control": 5}, [Path("/a,b c")]))
    assert "local,id=host,path=/,security_model=none,multidevs=remap,readonly=on" in line
    assert "local,id=w0,path=/a,,b c,security_model=none,multidevs=remap -device" in line
    assert "-smp 2 -m 3072" in line
    assert "-initrd /proc/self/fd/9" in line


def test_ports_come_in_ascending_order_on_the_first_virtio_device() -> None:
    found = arguments({"control": 8, "err": 7, "out": 6, "in": 5}, [])
    devices = [found[i + 1] for i, word in enumerate(found) if word == "-device"]
    assert devices[0] == "virtio-serial-pci,id=serial"
    ports = [device for device in devices if device.startswith("virtserialport")]
    assert [port.partition("nr=")[2] for port in ports] == [
        "1,chardev=in", "2,chardev=out", "3,chardev=err", "4,chardev=control"
    ]  # fmt: skip
    assert "socket,id=err,fd=7" in found


def test_a_terminal_is_a_console_port() -> None:
    found = arguments({"terminal": 5, "err": 6, "control": 7}, [])
    assert "virtconsole,bus=serial.0,nr=0,chardev=terminal" in found


def test_qemu_dies_with_its_parent() -> None:
    assert arguments({"control": 5}, [])[:4] == ["setpriv", "--pdeathsig", "KILL", qemu.BINARY]


def test_a_busy_host_is_no_broken_timer_to_the_labs_kernel() -> None:
    """Seen at a load of 8: "Kernel panic - not syncing: IO-APIC + timer doesn't work!"."""
    found = arguments({"control": 5}, [])
    assert "no_timer_check" in found[found.index("-append") + 1].split()


def test_qemu_keeps_little_translated_code() -> None:
    """Else a lab in which guests came and went stands still while memory is cleared."""
    found = arguments({"control": 5}, [])
    assert "tb-size=128" in found[found.index("-accel") + 1].split(",")
