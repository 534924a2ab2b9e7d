"""A ``MachineConfig`` as the command line of ``pyvmm run``, which another process reads."""

from __future__ import annotations

import contextlib
import os

from pyvmm.api.config import MachineConfig, disk_of
from pyvmm.api.disks import FaultyDisk, NbdDisk, Overlay, RawDisk
from pyvmm.config import DiskConfig, VhostUserDiskConfig, format_size
from pyvmm.errors import ConfigError
from pyvmm.startup.types import TYPE_CHECKING
from pyvmm.storage.open import DiskSource

if TYPE_CHECKING:
    from os import PathLike

    from pyvmm.virtio.rate_limit import RateLimit

_DEFAULTS = {"cpus": 1, "cpu": "host", "mmio": "mapped", "serve": "thread", "rtc": "utc",
             "discovery": "both"}


class Arguments:
    """The words behind ``pyvmm run``, and the descriptors that the process must inherit.

    The descriptors are files in memory (scripts of faults): ``close`` closes them.
    """

    def __init__(self) -> None:
        self.words: list[str] = []
        self.fds: list[int] = []

    def add(self, option: str, value: object) -> None:
        """Add ``--option=value``; ConfigError for text that no command line can have."""
        text = str(value)
        if "\0" in text:
            raise ConfigError(f"{option} {text!r}", "has a NUL, which no command line can have")
        self.words.append(f"{option}={text}")

    def add_log(self, log: str | PathLike[str] | int) -> str:
        """Return the path, valid in the process that inherits ``fds``, of a file to append to.

        A file of that name is emptied; a descriptor is used as it is.  ConfigError.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC | os.O_CLOEXEC | os.O_NOCTTY
        try:
            fd = os.dup(log) if isinstance(log, int) else os.open(log, flags, 0o666)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"console_log {log!r}", f"cannot be written: {reason}") from error
        self.fds.append(fd)
        return f"/proc/self/fd/{fd}"

    def add_file(self, content: str) -> str:
        """Return the path, valid in the process that inherits ``fds``, of a file in memory."""
        fd = os.memfd_create("pyvmm-launch", os.MFD_CLOEXEC)
        self.fds.append(fd)
        data = content.encode()
        while data:
            data = data[os.write(fd, data) :]
        return f"/proc/self/fd/{fd}"

    def close(self) -> None:
        """Close the descriptors here; idempotent."""
        while self.fds:
            os.close(self.fds.pop())


def arguments_of(
    config: MachineConfig,
    *,
    console_log: str | PathLike[str] | int | None = None,
    control: str | PathLike[str] | None = None,
) -> Arguments:
    """Return the command line that makes the machine of ``config``; the caller closes it.

    ``console_log`` is the file for the console, or its descriptor.  ``control`` is the socket for
    other programs.
    ConfigError and TypeError are those of ``MachineConfig.run_config``.  Also TypeError for a disk
    that only this process has.
    """
    with contextlib.ExitStack() as stack:
        arguments = Arguments()
        stack.callback(arguments.close)
        run = config.run_config()
        arguments.add("--kernel", os.fsdecode(run.kernel))
        for disk in run.disks:
            arguments.add("--disk", _disk_text(disk, arguments))
        if run.initrd is not None:
            arguments.add("--initrd", os.fsdecode(run.initrd))
        if run.cmdline is not None:
            arguments.add("--cmdline", run.cmdline)
        if run.append:
            arguments.add("--append", run.append)
        arguments.add("--memory", format_size(run.memory_bytes))
        for name, default in _DEFAULTS.items():
            if (value := getattr(config, name)) != default:
                arguments.add(f"--{name}", value)
        # The socket that launch adds gives the machine a port for an agent in any case.
        arguments.words += ["--agent"] * (run.agent == "inject")
        if run.timeout_s is not None:
            arguments.add("--timeout", repr(float(run.timeout_s)))
        if control is not None:
            arguments.add("--control", os.fsdecode(control))
        # Last: it is not emptied for a configuration that is refused.
        console = "none" if console_log is None else arguments.add_log(console_log)
        arguments.add("--console", console)
        stack.pop_all()
        return arguments


def _disk_text(disk: DiskConfig | VhostUserDiskConfig, arguments: Arguments) -> str:
    """Return the value of ``--disk`` for ``disk``."""
    if isinstance(disk, VhostUserDiskConfig):
        parts = [disk.location.replace(",", ",,")]
        return ",".join(parts + _queues(disk.queues))
    source = disk.source
    if isinstance(source, DiskSource):
        plain, script = source, ""
    else:
        plain, script = _plain(disk_of(source))
    parts = [_place(plain.location)]
    parts += ["ro"] * plain.read_only
    if plain.overlay:
        parts.append(f"overlay={_escaped(plain.overlay)}")
    elif plain.snapshot:
        parts.append("snapshot")
    if faults := plain.faults or (arguments.add_file(script) if script else ""):
        parts.append(f"faults={_escaped(faults)}")
    if plain.is_raw:
        parts.append("format=raw")
    if disk.serial:
        parts.append(f"serial={_escaped(disk.serial)}")
    parts += _queues(disk.queues)
    parts += ["writeback=off"] * (not disk.writeback)
    parts += _rates(disk.rate_limit)
    return ",".join(parts)


def _plain(disk: object) -> tuple[DiskSource, str]:
    """Return ``disk`` as ``--disk`` can say it, and its script of faults ("": none); TypeError."""
    script = disk.script if isinstance(disk, FaultyDisk) else ""
    inner = disk.disk if isinstance(disk, FaultyDisk) else disk
    if isinstance(inner, Overlay) and isinstance(inner.base, (RawDisk, NbdDisk)):
        return inner.base.source.replace(
            read_only=False, snapshot=True, overlay=inner.path
        ), script
    if isinstance(inner, (RawDisk, NbdDisk)):
        return inner.source, script
    raise TypeError(
        f"{disk!r} lives in this process, and launch() starts another: use a path, RawDisk, "
        "NbdDisk, VhostUserDisk, Overlay of one or FaultyDisk of one of these, or pyvmm.Machine, "
        "which runs here"
    )


def _place(location: str) -> str:
    """Return a disk's path or URI so that it is read as such, not as an option or a URI."""
    from pyvmm.storage.nbd_uri import is_nbd_uri

    if not is_nbd_uri(location):
        location = _file(location)
    return _escaped(location)


def _file(path: str | PathLike[str]) -> str:
    """Return ``path`` so that it is not taken for a word with a meaning, such as ``none``."""
    text = os.fsdecode(path)
    return text if text.startswith(("/", "./", "../")) else f"./{text}"


def _escaped(text: str) -> str:
    return text.replace(",", ",,")


def _queues(queues: int) -> list[str]:
    return [f"queues={queues}"] if queues != 1 else []


def _rates(limit: RateLimit) -> list[str]:
    return [
        f"{name}={rate}{f':{burst}' if burst else ''}"
        for name, rate, burst in (
            ("iops", limit.ops_per_s, limit.ops_burst),
            ("bps", limit.bytes_per_s, limit.bytes_burst),
        )
        if rate
    ]
