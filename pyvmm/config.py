"""The user's choices: frozen, validated once, each error naming option, value and limit."""

from __future__ import annotations

import os

from pyvmm.errors import ConfigError
from pyvmm.linux.command_line import consoles_of, words_of
from pyvmm.numerals import SIZE_UNITS
from pyvmm.startup.types import TYPE_CHECKING, Protocol, Record
from pyvmm.virtio.rate_limit import RateLimit
from pyvmm.x86 import layout
from pyvmm.x86.cpu_mask import CpuModel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import ExitStack
    from os import PathLike
    from typing import ClassVar

    from pyvmm.storage.backend import BlockBackend
    from pyvmm.virtio.block.config import BlockConfig

SERIAL_MAX_BYTES = 20  # virtio 1.2, 5.2.6 Device Operation: the GET_ID string
MAX_QUEUES = 8  # a disk's
MAX_CPUS = 8
MMIO_MODES = ("mapped", "trapped")
RTC_KINDS = ("utc", "none")
DISCOVERY_WAYS = ("both", "acpi", "cmdline")
SERVE_PLACES = ("thread", "exit")
AGENT_WAYS = ("none", "image", "inject")
AGENT_INIT = "/pyvmm-agent"
"""The agent in an initramfs, which starts the /init there when it is set up."""
VHOST_USER = "vhost-user="  # the start of such a disk's location
MAX_DISKS = 8
DEFAULT_CONSOLE = "console=ttyS0"
DEFAULT_CMDLINE = f"{DEFAULT_CONSOLE} reboot=k panic=-1"
MAX_TIMEOUT_S = 10 * 365 * 86400.0
MAX_SIZE_BYTES = 1 << 60
"""The limit of any size in a text, above the limit of any option."""


class Source(Protocol):
    """The bytes of a disk: ``storage.open.DiskSource``, or an object from a script."""

    @property
    def location(self) -> str:
        """The disk in messages: a path, a URI or a description."""

    @property
    def read_only(self) -> bool:
        """True if the guest cannot write."""

    @property
    def snapshot(self) -> bool:
        """True if the guest's writes go elsewhere."""

    @property
    def overlay(self) -> str:
        """The file for those writes; "" for a file without a name."""

    @property
    def is_shared(self) -> bool:
        """True if other disks may use the source too, because nothing here writes it."""

    @property
    def files(self) -> tuple[str, ...]:
        """The paths and URIs the disk is made of; some may be empty."""

    def open(
        self, *, report: Callable[[str], None], until_s: float | None, made: ExitStack
    ) -> BlockBackend:
        """Return the backend, for the caller to close: see ``storage.open.open_backend``."""


class DiskConfig(Record):
    """One ``--disk``.

    ``serial`` is what the guest reads by GET_ID (/sys/block/vda/serial), at most 20 bytes.
    ``writeback`` is the cache mode the guest finds: with False every write is stable when it
    completes.
    """

    source: Source
    serial: str = ""
    queues: int = 1
    writeback: bool = True
    rate_limit: RateLimit = RateLimit()

    @property
    def read_only(self) -> bool:
        """True if the guest cannot write."""
        return self.source.read_only

    @property
    def location(self) -> str:
        """The disk's path, URI or socket, as the user wrote it."""
        return self.source.location

    @property
    def is_shared(self) -> bool:
        """True if two disks may share the source."""
        return self.source.is_shared

    @property
    def block(self) -> BlockConfig:
        """The configuration of the block device, whatever its backend."""
        from pyvmm.virtio.block.config import BlockConfig

        return BlockConfig(
            read_only=self.read_only, serial=self.serial, queues=self.queues,
            writeback=self.writeback, rate_limit=self.rate_limit,
        )

    how_to_share: ClassVar[str] = "that needs ,ro on both"

    @property
    def files(self) -> tuple[str, ...]:
        """The paths and URIs the disk is made of; some may be empty."""
        return self.source.files


class VhostUserDiskConfig(Record):
    """One ``--disk vhost-user=SOCKET``.

    The vhost-user-blk back end that listens on the Unix socket ``socket`` serves the disk, and
    decides all but the number of ``queues``.
    """

    socket: str
    queues: int = 1
    read_only: ClassVar[bool] = False
    is_shared: ClassVar[bool] = False
    how_to_share: ClassVar[str] = "a back end serves one disk of one guest"

    @property
    def location(self) -> str:
        """The disk's path, URI or socket, as the user wrote it."""
        return f"{VHOST_USER}{self.socket}"

    @property
    def files(self) -> tuple[str, ...]:
        """The one path of the disk: its socket."""
        return (self.socket,)


AnyDiskConfig = DiskConfig | VhostUserDiskConfig


class RunConfig(Record):
    """One run of one machine.

    ``cmdline`` replaces the default command line, ``append`` is added behind it.  ``timeout_s``
    None means no limit.  ``console`` is ``stdio``, ``none`` or a file.  ``mmio`` and ``serve`` are
    among MMIO_MODES and SERVE_PLACES (``pyvmm.board.slot`` explains them).  ``discovery``, among
    DISCOVERY_WAYS, tells the guest of its virtio devices: ``cmdline`` means no ACPI.

    ``agent`` is among AGENT_WAYS: ``image`` gives the machine a port for an agent that the guest's
    image has, ``inject`` brings the agent in with an initramfs.
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
    agent: str = "none"

    def __post_init__(self) -> None:
        for option, path in (
            ("--kernel", self.kernel), ("--initrd", self.initrd), ("--console", self.console),
        ):
            if path == "" and option != "--console":
                raise ConfigError(option, "names no file")
            if path is not None and "\0" in os.fspath(path):
                raise ConfigError(f"{option} {path!r}", "is no file name: it has a NUL")
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
            ("--agent", self.agent, AGENT_WAYS),
        ):
            if value not in choices:
                raise ConfigError(f"{option} {value}", f"is none of {', '.join(choices)}")
        if not 1 <= self.cpus <= MAX_CPUS:
            raise ConfigError(f"--cpus {self.cpus}", f"must be from 1 to {MAX_CPUS}")
        if not layout.MIN_MEMORY <= self.memory_bytes <= layout.MAX_MEMORY:
            raise ConfigError(
                f"--memory {format_size(self.memory_bytes)}",
                f"must be from {format_size(layout.MIN_MEMORY)} "
                f"to {format_size(layout.MAX_MEMORY)}",
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
        self._check_overlays()
        if self.agent == "inject" and "rdinit" in dict(words_of(self._guest_words)):
            raise ConfigError(
                "--agent", "the guest starts the agent by rdinit=, and --append or --cmdline "
                "has an rdinit= of its own: leave out one of them"
            )
        if self.timeout_s is not None and not 0 < self.timeout_s <= MAX_TIMEOUT_S:
            raise ConfigError(
                f"--timeout {self.timeout_s:g}",
                f"must be a number of seconds above 0, at most {MAX_TIMEOUT_S:.0f}",
            )

    def _check_overlays(self) -> None:
        """Raise ConfigError if the overlay of one disk is another disk, or another's overlay."""
        used: dict[str, str] = {}
        for disk in self.disks:
            overlay = disk.source.overlay if isinstance(disk, DiskConfig) else ""
            for path, role in ((disk.location, "a disk"), (overlay, "an overlay")):
                real = os.path.realpath(path) if path else ""
                if real in used and "an overlay" in (role, used[real]):
                    raise ConfigError(
                        f"--disk {disk.location}", f"{path} is {role} here, and {used[real]} of "
                        "this run already; each needs a file of its own"
                    )
                if path:
                    used[real] = role

    @property
    def has_virtio_console(self) -> bool:
        """True if the command line names hvc0.

        Otherwise the machine has no such device: systemd starts a login on every hvc0 it finds.
        """
        return "hvc0" in consoles_of(words_of(self._guest_words))

    @property
    def console_is_virtio(self) -> bool:
        """True if the guest's console is the virtio one: hvc0 is the last of our consoles named."""
        return consoles_of(words_of(self._guest_words))[-1:] == ["hvc0"]

    def kernel_command_line(
        self, places: Sequence[tuple[int, int]] = (), limit: int | None = None
    ) -> str:
        """Return the whole command line: devices, base (default or ``cmdline``), ``append``.

        ``places`` are ``(base address, GSI)`` of the virtio-mmio devices.  Devices come first
        because words behind ``pyvmm.run=`` or ``--`` belong to the guest.  ConfigError, naming the
        longer option, if the line has more than ``limit`` bytes.
        """
        parts = []
        if self.timing:
            parts.append("pyvmm_timing=1")
        if self.discovery != "acpi":
            parts += [f"virtio_mmio.device=4K@{base:#x}:{gsi}" for base, gsi in places]
        if self.agent == "inject":
            parts.append(f"rdinit={AGENT_INIT}")
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
    def _root_is_first_disk(self) -> bool:
        """True if the root is the first disk, unless the command line says otherwise.

        An initrd has its own ideas.  That of ``kernel fetch`` is known, and the agent takes an
        initramfs without a ``root=`` for all there is.
        """
        if self.initrd is None or self.agent != "inject":
            return self.initrd is None
        name = os.path.basename(self.initrd)
        return name.startswith("initramfs-") and name.endswith(".cpio.gz")

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
            if self.disks and self._root_is_first_disk:
                parts.append(f"root=/dev/vda {'ro' if self.disks[0].read_only else 'rw'}")
        parts.append(self.append)
        return " ".join(part for part in parts if part)


def format_size(size_bytes: int) -> str:
    """Return bytes in the largest unit that divides them: ``256M``."""
    for unit in ("T", "G", "M", "K"):
        if size_bytes and size_bytes % SIZE_UNITS[unit] == 0:
            return f"{size_bytes // SIZE_UNITS[unit]}{unit}"
    return str(size_bytes)
