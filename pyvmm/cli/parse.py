"""Turn texts of the command line into a configuration's values; a mistake names its option."""

from __future__ import annotations

import os

from pyvmm.config import (
    MAX_CPUS,
    MAX_QUEUES,
    MAX_SIZE_BYTES,
    MAX_TIMEOUT_S,
    SERIAL_MAX_BYTES,
    VHOST_USER,
    AnyDiskConfig,
    DiskConfig,
    VhostUserDiskConfig,
    format_size,
)
from pyvmm.errors import ConfigError
from pyvmm.numerals import SIZE_UNITS, decimal_number, shown, size_in_bytes, whole_number
from pyvmm.virtio.rate_limit import RateLimit

_NEARLY_VHOST_USER = ("vhostuser=", "vhostuser:", "vhostuserblk=", "vhostuserblk:")
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


def parse_size(option: str, text: str) -> int:
    """Return the bytes of ``256M``, ``1GiB`` or ``1048576``; ConfigError naming ``option``."""
    size_bytes = size_in_bytes(text, MAX_SIZE_BYTES)
    if size_bytes is None:
        raise ConfigError(
            f"{option} {shown(text)}",
            f"is not a size up to {format_size(MAX_SIZE_BYTES)}; write 256M or 1G",
        )
    return size_bytes


def parse_moved_disks(texts: list[str]) -> dict[int, str]:
    """Return the files of ``N=FILE``, by N; ConfigError."""
    disks: dict[int, str] = {}
    for text in texts:
        number, equals, path = text.partition("=")
        if not (equals and path and number.isascii() and number.isdigit() and len(number) < 4):
            raise ConfigError(
                f"--disk {text}", "is not N=FILE, the number of a disk (0 is /dev/vda) and its file"
            )
        if int(number) in disks:
            raise ConfigError(f"--disk {text}", f"disk {int(number)} has a file already")
        disks[int(number)] = path
    return disks


def parse_memory(option: str, text: str, least_bytes: int, most_bytes: int) -> int:
    """Return the bytes of RAM that ``text`` asks for; ConfigError naming ``option`` and limits.

    A number without a unit counts bytes, but QEMU's users mean MiB: the error for one that is too
    small says so.
    """
    limits = f"from {format_size(least_bytes)} to {format_size(most_bytes)}"
    try:
        size_bytes = parse_size(option, text)
    except ConfigError:
        raise ConfigError(
            f"{option} {shown(text)}", f"is not a size {limits}; write 256M or 1G"
        ) from None
    if least_bytes <= size_bytes <= most_bytes:
        return size_bytes
    hint = ""
    if text.isdigit() and size_bytes:
        units = [unit for unit in "MG" if size_bytes * SIZE_UNITS[unit] <= most_bytes]
        likely = next((u for u in units if size_bytes * SIZE_UNITS[u] >= least_bytes), "")
        hint = f"; a number alone counts bytes: write {text}{likely}" if likely else ""
    raise ConfigError(f"{option} {shown(text)}", f"must be {limits}{hint}")


def parse_cpus(text: str) -> int:
    """Return 4 for ``4``; ConfigError if it is no number.  RunConfig checks the range."""
    count = whole_number(text, 0, 999_999)
    if count is None:
        raise ConfigError(f"--cpus {shown(text)}", f"is not a number from 1 to {MAX_CPUS}")
    return count


def parse_console(text: str) -> str:
    """Return ``text``; ConfigError if it looks like ``stdio`` or ``none`` misspelt, not a file."""
    if text in ("stdio", "none") or "." in text or "/" in text or os.path.exists(text):
        return text
    from pyvmm.startup.mistakes import console_meant

    if meant := console_meant(text):
        raise ConfigError(
            f"--console {text}", f"is no file yet; did you mean {meant}? (a new file: ./{text})"
        )
    return text


def parse_seconds(option: str, text: str) -> float:
    """Return the seconds of ``2.5``; ConfigError naming ``option``."""
    seconds = decimal_number(text, 0, MAX_TIMEOUT_S)
    if not seconds:
        raise ConfigError(
            f"{option} {shown(text)}",
            f"must be a number of seconds above 0, at most {MAX_TIMEOUT_S:.0f}",
        )
    return seconds


def parse_disk(text: str) -> AnyDiskConfig:
    """Return the configuration of one ``--disk`` (docs/disks.md).

    ``text`` is ``FILE[,option...]``, ``nbd://...[,option...]`` or
    ``vhost-user=SOCKET[,queues=N]``; a comma in a name is written twice.  ConfigError quotes
    ``text``.
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
        if not (name in _DISK_VALUES if has_value else name in (*_DISK_FLAGS, *_DISK_VALUES)):
            from pyvmm.startup.mistakes import disk_option_meant

            hint = disk_option_meant(part, tuple(_DISK_FLAGS), tuple(_DISK_VALUES))
            raise ConfigError(
                option,
                f"does not know {part!r}{hint}; the options are {_DISK_OPTIONS} "
                "(a comma in the file's name is written ,,; another process's disk is "
                "vhost-user=SOCKET)",
            )
        if name in given:
            raise ConfigError(option, f"says {name} twice")
        if name in _DISK_VALUES and not value:
            raise ConfigError(option, f"{name}= wants a value: {name}={_DISK_VALUES[name]}")
        given[name] = value
    _check_scheme(option, location)
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


def _check_scheme(option: str, location: str) -> None:
    """Raise ConfigError if ``location`` is a URI of a kind that no disk has."""
    scheme, separator, rest = location.partition("://")
    if not separator or not scheme.isalnum() or scheme.lower() in ("nbd", "nbds"):
        return
    if scheme.lower() == "file":
        raise ConfigError(option, f"is written as a path: --disk {rest}")
    raise ConfigError(
        option,
        f"{scheme}:// is not supported; a disk is a file, a block device, nbd://HOST/EXPORT or "
        "vhost-user=SOCKET (a file of that name: ./NAME)",
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
    """Return rate and burst of ``RATE[:BURST]``, both written as sizes; 0 for a missing one."""
    if not value:
        return 0, 0
    numbers = [parse_size(f"{option}: {name}", part) for part in value.split(":")]
    if len(numbers) > 2 or not all(numbers):
        raise ConfigError(option, f"{name}={value} is not RATE or RATE:BURST, both at least 1")
    return numbers[0], numbers[1] if len(numbers) == 2 else 0
