"""What a person is told before and after a boot that cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.cli import explain
from pyvmm.config import RunConfig, parse_disk
from pyvmm.outcome import Kind, Outcome
from tests.support.kernels import COMPLETE_CONFIG as COMPLETE
from tests.support.kernels import bzimage

NO_ROOT = Outcome(Kind.PANIC, detail="VFS: Unable to mount root fs on unknown-block(254,0)")
# Options without which a disk of ext4 is not booted from, when there is no initramfs.
NEEDED = ("64BIT", "PRINTK", "TTY", "SERIAL_8250", "SERIAL_8250_CONSOLE", "SERIAL_8250_PNP",
          "BLOCK", "VIRTIO_MMIO", "PCI", "VIRTIO_BLK", "EXT4_FS", "DEVTMPFS", "DEVTMPFS_MOUNT",
          "BINFMT_ELF")


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """A kernel with a complete configuration beside it, for tests to change."""
    path = tmp_path / "bzImage"
    path.write_bytes(bzimage())
    configure(path, COMPLETE)
    return path


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """The start of a disk of ext4."""
    path = tmp_path / "root.img"
    head = bytearray(0x1000)
    head[0x438:0x43A], head[0x460] = b"\x53\xef", 0x40
    path.write_bytes(head)
    return path


def configure(kernel: Path, text: str) -> None:
    (kernel.parent / "config-6.1.0-synthetic").write_text(text)


def run_of(kernel: Path, *disks: Path, append: str = "", initrd: Path | None = None) -> RunConfig:
    return RunConfig(
        kernel=kernel, disks=tuple(parse_disk(str(disk)) for disk in disks), append=append,
        initrd=initrd,
    )


def after(config: RunConfig, outcome: Outcome, *, has_printed: bool = True) -> str:
    return "\n".join(explain.after(config, outcome, has_printed=has_printed))


def test_nothing_is_said_of_a_kernel_that_can(kernel: Path, disk: Path) -> None:
    assert explain.before(run_of(kernel, disk)) == []


@pytest.mark.parametrize("option", NEEDED)
def test_each_missing_option_is_named_before_the_boot_and_after_a_panic(
    kernel: Path, disk: Path, option: str
) -> None:
    configure(kernel, COMPLETE.replace(f"CONFIG_{option}=y\n", ""))
    config = run_of(kernel, disk)
    (line,) = explain.before(config)
    assert line.startswith(f"{kernel}: the kernel lacks CONFIG_{option} ("), line
    assert explain.after(config, NO_ROOT, has_printed=True) == [line]


def test_a_kernel_that_finds_no_devices_is_named_too(kernel: Path, disk: Path) -> None:
    by_command_line, acpi = "CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES", "CONFIG_ACPI"
    configure(kernel, COMPLETE.replace(f"{by_command_line}=y\n", ""))
    assert explain.before(run_of(kernel, disk)) == []
    (line,) = explain.before(run_of(kernel, disk, append="acpi=off"))
    assert f"the kernel lacks {by_command_line} (virtio-mmio discovery with acpi=off)" in line
    no_acpi = RunConfig(kernel=kernel, disks=(parse_disk(str(disk)),), discovery="cmdline")
    assert explain.before(no_acpi) == [line]
    configure(kernel, COMPLETE.replace(f"{by_command_line}=y\n", "").replace(f"{acpi}=y\n", ""))
    (line,) = explain.before(run_of(kernel, disk))
    assert f"the kernel has neither {by_command_line} nor {acpi}" in line


def test_modules_want_an_initramfs(kernel: Path, disk: Path, tmp_path: Path) -> None:
    configure(kernel, COMPLETE.replace("VIRTIO_BLK=y", "VIRTIO_BLK=m"))
    (line,) = explain.before(run_of(kernel, disk))
    assert "CONFIG_VIRTIO_BLK=m" in line
    assert "--initrd" in line
    initrd = tmp_path / "initramfs"
    initrd.write_bytes(b"\x1f\x8b" + bytes(100))
    assert explain.before(run_of(kernel, disk, initrd=initrd)) == []


@pytest.mark.parametrize("detail", [
    NO_ROOT.detail, "No working init found.",
    "Attempted to kill init! exitcode=0x00000100 (cannot mount the root: no /dev/vda after 10 s)",
])
def test_a_root_that_is_not_mounted_has_a_remedy(
    kernel: Path, disk: Path, detail: str
) -> None:
    said = after(run_of(kernel, disk), Outcome(Kind.PANIC, detail=detail))
    assert "root= and --disk must name it" in said
    assert "pyvmm kernel inspect" in said


def test_another_panic_needs_no_remedy(kernel: Path, disk: Path) -> None:
    assert after(run_of(kernel, disk), Outcome(Kind.PANIC, detail="sysrq triggered crash")) == ""


@pytest.mark.parametrize("kind", [
    Kind.TIMEOUT, Kind.TRIPLE_FAULT, Kind.RESET, Kind.SHUTDOWN, Kind.QUIT, Kind.PANIC,
])
def test_a_silent_kernel_is_told_which_console_to_use(
    kernel: Path, disk: Path, kind: Kind
) -> None:
    config = run_of(kernel, disk, append="console=ttyS1")
    said = after(config, Outcome(kind), has_printed=False)
    assert "its consoles are console=ttyS0 console=ttyS1; console=ttyS0 is the serial port" in said
    assert after(config, Outcome(kind)) == ""


def test_a_silent_kernel_without_a_serial_console_is_told_so(kernel: Path, disk: Path) -> None:
    configure(kernel, COMPLETE.replace("CONFIG_SERIAL_8250_CONSOLE=y\n", ""))
    said = after(run_of(kernel, disk), Outcome(Kind.TIMEOUT), has_printed=False)
    assert "the kernel printed nothing" in said
    assert "lacks CONFIG_SERIAL_8250_CONSOLE" in said


def test_a_guest_that_gave_a_status_owes_no_output(kernel: Path, disk: Path) -> None:
    config = run_of(kernel, disk)
    assert after(config, Outcome(Kind.GUEST_STATUS, 0), has_printed=False) == ""


@pytest.mark.parametrize("text", ["missing", "nbd://127.0.0.1:1", "vhost-user=nowhere", "."])
def test_a_disk_that_cannot_be_looked_into_is_no_failure(
    kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    configure(kernel, COMPLETE.replace("CONFIG_EXT4_FS=y\n", ""))
    config = RunConfig(kernel=kernel, disks=(parse_disk(text),))
    assert explain.before(config) == [], "what is on the disk is not known"
