"""What the user asked for: frozen, validated once, each error naming option, value and limit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pyvmm.errors import ConfigError
from pyvmm.x86 import layout
from pyvmm.x86.cpuid import CpuModel, parse_cpu_option

SERIAL_MAX_BYTES = 20  # virtio 1.2, 5.2.6 Device Operation: the GET_ID string
MAX_DISKS = len(layout.VIRTIO_IRQS)
DEFAULT_CMDLINE = "console=ttyS0 reboot=k panic=-1"
MAX_TIMEOUT_S = 10 * 365 * 86400.0
_SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskConfig:
    """One ``--disk``: a raw image or block device at ``path``.

    ``serial`` is what the guest reads by GET_ID (/sys/block/vda/serial), at most 20 bytes.
    """

    path: Path
    read_only: bool = False
    serial: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One run of one machine.

    ``cmdline`` replaces the default command line, ``append`` is added behind it.  ``timeout_s``
    None means no limit.  ``console`` is ``stdio``, ``none`` or a file.
    """

    kernel: Path
    disks: tuple[DiskConfig, ...] = ()
    initrd: Path | None = None
    cmdline: str | None = None
    append: str = ""
    memory_bytes: int = 256 * layout.MIB
    cpu: CpuModel = field(default_factory=lambda: parse_cpu_option("host"))
    timeout_s: float | None = None
    console: str = "stdio"

    def __post_init__(self) -> None:
        if not layout.MIN_MEMORY <= self.memory_bytes <= layout.MAX_MEMORY:
            raise ConfigError(
                f"--memory {format_size(self.memory_bytes)}",
                f"must be between {format_size(layout.MIN_MEMORY)} "
                f"and {format_size(layout.MAX_MEMORY)}",
            )
        if self.memory_bytes % layout.MIB:
            raise ConfigError(
                f"--memory {self.memory_bytes}", "must be a whole number of MiB, such as 256M"
            )
        if len(self.disks) > MAX_DISKS:
            raise ConfigError(
                "--disk", f"{len(self.disks)} disks; this machine has lines for {MAX_DISKS}"
            )
        if self.timeout_s is not None and not 0 < self.timeout_s <= MAX_TIMEOUT_S:
            raise ConfigError(
                f"--timeout {self.timeout_s:g}",
                f"must be a number of seconds above 0, at most {MAX_TIMEOUT_S:.0f}",
            )

    def kernel_command_line(self) -> str:
        """The whole command line: devices, the base (default or ``cmdline``), then ``append``.

        Devices come first because what is behind ``pyvmm.run=`` or ``--`` belongs to the guest.
        """
        parts = []
        for index in range(len(self.disks)):
            base, gsi = layout.virtio_slot(index)
            parts.append(f"virtio_mmio.device=4K@{base:#x}:{gsi}")
        if self.cmdline is not None:
            parts.append(self.cmdline)
        else:
            parts.append(DEFAULT_CMDLINE)
            if self.disks and self.initrd is None:
                parts.append(f"root=/dev/vda {'ro' if self.disks[0].read_only else 'rw'}")
        parts.append(self.append)
        return " ".join(part for part in parts if part)


def parse_size(option: str, text: str) -> int:
    """``256M``, ``1G``, ``1048576`` -> bytes; ConfigError naming ``option``."""
    number = text.strip().upper().removesuffix("IB").removesuffix("B")
    unit = number[-1:] if number[-1:] in ("K", "M", "G", "T") else ""
    digits = number.removesuffix(unit)
    if not digits.isascii() or not digits.isdigit() or len(digits) > 20:
        raise ConfigError(f"{option} {text}", "is not a size; write 256M or 1G")
    return int(digits) * _SIZE_UNITS[unit]


def format_size(size_bytes: int) -> str:
    """Bytes -> the largest unit that divides them: ``256M``."""
    for unit in ("T", "G", "M", "K"):
        if size_bytes and size_bytes % _SIZE_UNITS[unit] == 0:
            return f"{size_bytes // _SIZE_UNITS[unit]}{unit}"
    return str(size_bytes)


def parse_disk(text: str) -> DiskConfig:
    """``PATH[,ro][,serial=ID]`` -> DiskConfig; a comma in the path is written twice."""
    path, *options = (part.replace("\0", ",") for part in text.replace(",,", "\0").split(","))
    if not path:
        raise ConfigError(f"--disk {text}", "names no file; write --disk FILE[,ro][,serial=ID]")
    read_only, serial = False, ""
    for option in options:
        name, _, value = option.partition("=")
        if option == "ro":
            read_only = True
        elif name == "serial":
            if not value or not value.isascii() or not value.isprintable():
                raise ConfigError(f"--disk {text}", "serial= wants printable ASCII characters")
            if len(value) > SERIAL_MAX_BYTES:
                raise ConfigError(
                    f"--disk {text}",
                    f"serial is {len(value)} characters; the limit is {SERIAL_MAX_BYTES}",
                )
            serial = value
        else:
            raise ConfigError(
                f"--disk {text}",
                f"does not know {option!r}; the options are ro and serial=ID "
                "(a comma in the file's name is written ,,)",
            )
    return DiskConfig(path=Path(path), read_only=read_only, serial=serial)
