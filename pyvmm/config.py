"""What the user asked for: frozen, validated once, each error naming option, value and limit."""

from __future__ import annotations

from pyvmm.command_line import consoles_of, words_of
from pyvmm.errors import ConfigError
from pyvmm.lean import TYPE_CHECKING, Record
from pyvmm.numerals import decimal_number, shown, whole_number
from pyvmm.virtio.rate_limit import RateLimit
from pyvmm.x86 import layout
from pyvmm.x86.cpu_model import CpuModel

if TYPE_CHECKING:
    from os import PathLike
    from typing import ClassVar

    from pyvmm.storage.open import DiskSource
    from pyvmm.virtio.block.config import BlockConfig

SERIAL_MAX_BYTES = 20  # virtio 1.2, 5.2.6 Device Operation: the GET_ID string
MAX_QUEUES = 8  # a disk's
MAX_CPUS = 8
MMIO_MODES = ("mapped", "trapped")
RTC_KINDS = ("utc", "none")
DISCOVERY_WAYS = ("both", "acpi", "cmdline")
SERVE_PLACES = ("thread", "exit")
VHOST_USER = "vhost-user="  # what a disk's location then begins with
_NEARLY_VHOST_USER = ("vhostuser=", "vhostuser:", "vhostuserblk=", "vhostuserblk:")
MAX_DISKS = 8
DEFAULT_CONSOLE = "console=ttyS0"
DEFAULT_CMDLINE = f"{DEFAULT_CONSOLE} reboot=k panic=-1"
MAX_TIMEOUT_S = 10 * 365 * 86400.0
MAX_SIZE_BYTES = 1 << 60
"""Of any size in a text; more than any option takes."""
_SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class DiskConfig(Record):
    """One ``--disk``.

    ``serial`` is what the guest reads by GET_ID (/sys/block/vda/serial), at most 20 bytes.
    ``writeback`` is the cache mode the guest finds: with False every write is stable when it
    completes.
    """

    source: DiskSource
    serial: str = ""
    queues: int = 1
    writeback: bool = True
    rate_limit: RateLimit = RateLimit()

    @property
    def read_only(self) -> bool:
        """Whether the guest cannot write."""
        return self.source.read_only

    @property
    def location(self) -> str:
        """Where the disk is, as the user wrote it."""
        return self.source.location

    @property
    def is_shared(self) -> bool:
        """Whether there may be two of it."""
        return self.source.is_shared

    @property
    def block(self) -> BlockConfig:
        """What the block device is to be, whatever its backend."""
        from pyvmm.virtio.block.config import BlockConfig

        return BlockConfig(
            read_only=self.read_only, serial=self.serial, queues=self.queues,
            writeback=self.writeback, rate_limit=self.rate_limit,
        )

    how_to_share: ClassVar[str] = "that needs ,ro on both"

    @property
    def files(self) -> tuple[str, ...]:
        """The paths and URIs the disk is made of; some may be empty."""
        return (self.source.location, self.source.overlay, self.source.faults)


class VhostUserDiskConfig(Record):
    """One ``--disk vhost-user=SOCKET``: served by the vhost-user-blk back end that listens on
    the Unix socket ``socket``, which decides all but the number of ``queues``."""

    socket: str
    queues: int = 1
    read_only: ClassVar[bool] = False
    is_shared: ClassVar[bool] = False
    how_to_share: ClassVar[str] = "a back end serves one disk of one guest"

    @property
    def location(self) -> str:
        """Where the disk is, as the user wrote it."""
        return f"{VHOST_USER}{self.socket}"

    @property
    def files(self) -> tuple[str, ...]:
        """The one path there is."""
        return (self.socket,)


AnyDiskConfig = DiskConfig | VhostUserDiskConfig


class RunConfig(Record):
    """One run of one machine.

    ``cmdline`` replaces the default command line, ``append`` is added behind it.  ``timeout_s``
    None means no limit.  ``console`` is ``stdio``, ``none`` or a file.  ``mmio`` and ``serve`` are
    among MMIO_MODES and SERVE_PLACES (``pyvmm.slot`` says what they mean); ``discovery``, among
    DISCOVERY_WAYS, is how the guest is told of its virtio devices: ``cmdline`` means no ACPI.
    """

    kernel: str | PathLike[str]
    disks: tuple[AnyDiskConfig, ...] = ()
    initrd: str | PathLike[str] | None = None
    cmdline: str | None = None
    append: str = ""
    memory_bytes: int = 256 * layout.MIB
    cpu: CpuModel = CpuModel()
    cpus: int = 1
    timeout_s: float | None = None
    console: str = "stdio"
    mmio: str = "mapped"
    serve: str = "thread"
    rtc: str = "utc"
    timing: bool = False
    discovery: str = "both"

    def __post_init__(self) -> None:
        for option, path in (("--kernel", self.kernel), ("--initrd", self.initrd)):
            if path == "":
                raise ConfigError(option, "names no file")
        if not self.console:
            raise ConfigError("--console", "names no file; write stdio, none or a file's name")
        for option, text in (("--cmdline", self.cmdline or ""), ("--append", self.append)):
            if not text.isascii() or "\0" in text:
                position = next(
                    at for at, one in enumerate(text) if one == "\0" or not one.isascii()
                )
                raise ConfigError(option, f"has {text[position]!a} at position {position}; "
                                  "only ASCII without NUL can be passed to a kernel")
        for option, value, choices in (
            ("--mmio", self.mmio, MMIO_MODES), ("--serve", self.serve, SERVE_PLACES),
            ("--rtc", self.rtc, RTC_KINDS), ("--discovery", self.discovery, DISCOVERY_WAYS),
        ):
            if value not in choices:
                raise ConfigError(f"{option} {value}", f"is none of {', '.join(choices)}")
        if not 1 <= self.cpus <= MAX_CPUS:
            raise ConfigError(f"--cpus {self.cpus}", f"must be from 1 to {MAX_CPUS}")
        if not layout.MIN_MEMORY <= self.memory_bytes <= layout.MAX_MEMORY:
            hint = " (without a unit it counts bytes)" if self.memory_bytes < layout.MIB else ""
            raise ConfigError(
                f"--memory {format_size(self.memory_bytes)}",
                f"must be between {format_size(layout.MIN_MEMORY)} "
                f"and {format_size(layout.MAX_MEMORY)}{hint}",
            )
        if self.memory_bytes % layout.MIB:
            raise ConfigError(
                f"--memory {self.memory_bytes}", "must be a whole number of MiB, such as 256M"
            )
        if len(self.disks) > MAX_DISKS:
            raise ConfigError(
                "--disk", f"{len(self.disks)} disks; this machine has lines for {MAX_DISKS}"
            )
        locations = [disk.location for disk in self.disks]
        for disk in self.disks:
            if not disk.is_shared and locations.count(disk.location) > 1:
                raise ConfigError(
                    f"--disk {disk.location}", f"is given twice; {disk.how_to_share}"
                )
        if self.timeout_s is not None and not 0 < self.timeout_s <= MAX_TIMEOUT_S:
            raise ConfigError(
                f"--timeout {self.timeout_s:g}",
                f"must be a number of seconds above 0, at most {MAX_TIMEOUT_S:.0f}",
            )

    @property
    def virtio_devices(self) -> int:
        """How many virtio-mmio devices the machine has: disks, a console, an entropy device."""
        return len(self.disks) + self.has_virtio_console + 1

    @property
    def has_virtio_console(self) -> bool:
        """True if the command line names hvc0.

        Else the device is not there: systemd starts a login on every hvc0 it finds.
        """
        return "hvc0" in consoles_of(words_of(self._guest_words))

    @property
    def console_is_virtio(self) -> bool:
        """Whether the guest's console is the virtio one: the last of ours is hvc0."""
        return consoles_of(words_of(self._guest_words))[-1:] == ["hvc0"]

    def kernel_command_line(self, limit: int | None = None) -> str:
        """The whole command line: devices, the base (default or ``cmdline``), then ``append``.

        Devices come first because what is behind ``pyvmm.run=`` or ``--`` belongs to the guest.
        ConfigError, naming the longer option, if it has more than ``limit`` bytes.
        """
        parts = []
        if self.timing:
            parts.append("pyvmm_timing=1")
        for index in range(self.virtio_devices if self.discovery != "acpi" else 0):
            base, gsi = layout.virtio_slot(index)
            parts.append(f"virtio_mmio.device=4K@{base:#x}:{gsi}")
        parts.append(self._guest_words)
        line = " ".join(part for part in parts if part)
        if limit is not None and len(line) > limit:
            own = len(self.append)
            option = "--append"
            if self.cmdline is not None and len(self.cmdline) > own:
                option, own = "--cmdline", len(self.cmdline)
            raise ConfigError(
                option, f"has {own} bytes, which are {len(line)} with all that belongs to the "
                f"command line: the limit of kernel {self.kernel} is {limit}"
            )
        return line

    @property
    def _guest_words(self) -> str:
        """The base and ``append``."""
        if self.cmdline is not None:
            parts = [self.cmdline]
        else:
            base = DEFAULT_CMDLINE
            if consoles_of(words_of(self.append)):
                base = base.removeprefix(DEFAULT_CONSOLE).strip()
            parts = [base]
            if self.disks and self.initrd is None:
                parts.append(f"root=/dev/vda {'ro' if self.disks[0].read_only else 'rw'}")
        parts.append(self.append)
        return " ".join(part for part in parts if part)


def parse_size(option: str, text: str) -> int:
    """``256M``, ``1G``, ``1048576`` -> bytes; ConfigError naming ``option``."""
    number = text.strip().upper().removesuffix("IB").removesuffix("B")
    unit = number[-1:] if number[-1:] in ("K", "M", "G", "T") else ""
    digits = number.removesuffix(unit)
    count = whole_number(digits, 0, MAX_SIZE_BYTES // _SIZE_UNITS[unit])
    if count is None:
        raise ConfigError(
            f"{option} {shown(text)}",
            f"is not a size up to {format_size(MAX_SIZE_BYTES)}; write 256M or 1G",
        )
    return count * _SIZE_UNITS[unit]


def parse_cpus(text: str) -> int:
    """``4`` -> 4; ConfigError if it is no number.  The range is RunConfig's."""
    count = whole_number(text, 0, 999_999)
    if count is None:
        raise ConfigError(f"--cpus {shown(text)}", f"is not a number from 1 to {MAX_CPUS}")
    return count


def parse_seconds(option: str, text: str) -> float:
    """``2.5`` -> seconds; ConfigError naming ``option``."""
    seconds = decimal_number(text, 0, MAX_TIMEOUT_S)
    if not seconds:
        raise ConfigError(
            f"{option} {shown(text)}",
            f"must be a number of seconds above 0, at most {MAX_TIMEOUT_S:.0f}",
        )
    return seconds


def format_size(size_bytes: int) -> str:
    """Bytes -> the largest unit that divides them: ``256M``."""
    for unit in ("T", "G", "M", "K"):
        if size_bytes and size_bytes % _SIZE_UNITS[unit] == 0:
            return f"{size_bytes // _SIZE_UNITS[unit]}{unit}"
    return str(size_bytes)


_DISK_FLAGS = ("ro", "snapshot")
_DISK_VALUES = {
    "overlay": "FILE",
    "serial": "ID",
    "queues": "N",
    "writeback": "on|off",
    "iops": "RATE[:BURST]",
    "bps": "RATE[:BURST]",
    "faults": "FILE",
    "format": "raw",
}
_DISK_OPTIONS = ", ".join([*_DISK_FLAGS, *(f"{name}={v}" for name, v in _DISK_VALUES.items())])


def parse_disk(text: str) -> AnyDiskConfig:
    """``FILE[,option...]``, ``nbd://...[,option...]`` or ``vhost-user=SOCKET[,queues=N]`` as a
    configuration (docs/disks.md).

    A comma in a name is written twice.  ConfigError quotes ``text``.
    """
    option = f"--disk {text}"
    bare = text.lower().replace("-", "").replace("_", "")
    if bare.startswith(_NEARLY_VHOST_USER) and not text.startswith(VHOST_USER):
        raise ConfigError(
            option, "of another process is written --disk vhost-user=SOCKET (a file: ./NAME)"
        )
    location, *rest = (part.replace("\0", ",") for part in text.replace(",,", "\0").split(","))
    if not location:
        raise ConfigError(option, "names no file; write --disk FILE[,ro][,serial=ID]")
    given: dict[str, str] = {}
    for part in rest:
        name, has_value, value = part.partition("=")
        if not (name in _DISK_VALUES if has_value else name in _DISK_FLAGS):
            raise ConfigError(
                option,
                f"does not know {part!r}; the options are {_DISK_OPTIONS} "
                "(a comma in the file's name is written ,,; another process's disk is "
                "vhost-user=SOCKET)",
            )
        if name in given:
            raise ConfigError(option, f"says {name} twice")
        if has_value and not value:
            raise ConfigError(option, f"{name}= wants a value: {name}={_DISK_VALUES[name]}")
        given[name] = value
    if location.startswith(VHOST_USER):
        return _vhost_user_disk(option, location.removeprefix(VHOST_USER), given)
    if "ro" in given and not given.keys().isdisjoint({"snapshot", "overlay"}):
        raise ConfigError(option, "is either ro or a snapshot, which the guest may write to")
    from pyvmm.storage.open import DiskSource

    source = DiskSource(
        location=location,
        read_only="ro" in given,
        snapshot="snapshot" in given or "overlay" in given,
        overlay=given.get("overlay", ""),
        faults=given.get("faults", ""),
        is_raw=_disk_is_raw(option, given.get("format", "")),
    )
    return DiskConfig(
        source=source,
        serial=_disk_serial(option, given.get("serial", "")),
        queues=_disk_queues(option, given.get("queues", "1")),
        writeback=_disk_writeback(option, given.get("writeback", "on")),
        rate_limit=_disk_rate_limit(option, given.get("iops", ""), given.get("bps", "")),
    )


def _vhost_user_disk(option: str, socket: str, given: dict[str, str]) -> VhostUserDiskConfig:
    if not socket:
        raise ConfigError(option, "names no socket; write --disk vhost-user=SOCKET[,queues=N]")
    for name in given:
        if name != "queues":
            raise ConfigError(option, f"{name} is for the back end to decide; only queues= is ours")
    return VhostUserDiskConfig(socket=socket, queues=_disk_queues(option, given.get("queues", "1")))


def _disk_is_raw(option: str, value: str) -> bool:
    if value not in ("", "raw"):
        raise ConfigError(
            option, f"format={value} is not raw; convert it: qemu-img convert -O raw IN OUT"
        )
    return bool(value)


def _disk_serial(option: str, value: str) -> str:
    if not value.isascii() or not value.isprintable():
        raise ConfigError(option, "serial= wants printable ASCII characters")
    if len(value) > SERIAL_MAX_BYTES:
        raise ConfigError(
            option, f"serial is {len(value)} characters; the limit is {SERIAL_MAX_BYTES}"
        )
    return value


def _disk_queues(option: str, value: str) -> int:
    if value not in map(str, range(1, MAX_QUEUES + 1)):  # 01 neither
        raise ConfigError(option, f"queues={shown(value)} is not a number from 1 to {MAX_QUEUES}")
    return int(value)


def _disk_writeback(option: str, value: str) -> bool:
    if value not in ("on", "off"):
        raise ConfigError(option, f"writeback={value} is neither on nor off")
    return value == "on"


def _disk_rate_limit(option: str, iops: str, bps: str) -> RateLimit:
    ops_per_s, ops_burst = _rate(option, "iops", iops)
    bytes_per_s, bytes_burst = _rate(option, "bps", bps)
    return RateLimit(
        ops_per_s=ops_per_s, ops_burst=ops_burst, bytes_per_s=bytes_per_s, bytes_burst=bytes_burst
    )


def _rate(option: str, name: str, value: str) -> tuple[int, int]:
    """``RATE[:BURST]`` as sizes are written; 0 for what is not there."""
    if not value:
        return 0, 0
    numbers = [parse_size(f"{option}: {name}", part) for part in value.split(":")]
    if len(numbers) > 2 or not all(numbers):
        raise ConfigError(option, f"{name}={value} is not RATE or RATE:BURST, both at least 1")
    return numbers[0], numbers[1] if len(numbers) == 2 else 0
