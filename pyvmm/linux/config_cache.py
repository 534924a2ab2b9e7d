"""Parts of a kernel's configuration, kept for later runs of the same kernel.

Unpacking a kernel takes seconds, and a start has none to spare.  So a command that has unpacked a
kernel (``pyvmm kernel inspect``, a run that failed) leaves an entry in the cache: a small text file
of the options that ``requirements`` knows.  ``cli.first_look.config_cache_path`` names the entry
after the kernel file's identity, so a kernel built anew has another entry.

The cache may hold anything.  An entry that is not understood is ignored, and so is one that another
user could have written.
"""

from __future__ import annotations

import contextlib
import os

from pyvmm.errors import HostError
from pyvmm.linux import trust
from pyvmm.linux.guest import Guest
from pyvmm.linux.options import KernelConfig
from pyvmm.linux.requirements import BUILT_IN, known_options, requirements

MAX_ENTRIES = 100
_TITLE = "pyvmm: a kernel's configuration"
_MAX_ENTRY_BYTES = 64 << 10
_NO_FILE = "-"


def recall(entry: str) -> KernelConfig | None:
    """Return the configuration in the file ``entry``; None if there is none that still holds.

    It has a value for every option that was known when it was written, ``n`` too (``covers``).
    """
    try:
        trust.check_directory(os.path.dirname(entry))
        trust.check_file(entry)
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW
        fd = os.open(entry, flags)
        try:
            data = os.read(fd, _MAX_ENTRY_BYTES + 1)
        finally:
            os.close(fd)
        title, source, source_identity, *lines = data.decode().removesuffix("\n").split("\n")
        if title != _TITLE or len(data) > _MAX_ENTRY_BYTES:
            return None
        if source_identity != _NO_FILE and source_identity != _identity(source):
            return None
    except (OSError, ValueError, HostError):
        return None
    pairs = [line.partition("=") for line in lines]
    return KernelConfig({name: value for name, _, value in pairs}, source)


def covers(config: KernelConfig, guest: Guest) -> bool:
    """True if ``config``, from ``recall``, has every option by which ``guest`` is judged.

    A later version of pyvmm may judge by more options.
    """
    wanted = set(BUILT_IN).union(*(need.asked_about() for need in requirements(guest)))
    return wanted <= config.options.keys()


def remember(entry: str, config: KernelConfig) -> None:
    """Leave ``config`` in the file ``entry``, if that is possible.

    If ``config`` comes from a file, the entry holds as long as that file does not change.
    """
    with contextlib.suppress(OSError, ValueError, HostError):
        source_identity = _NO_FILE
        if os.path.isabs(config.source):
            source_identity = _identity(config.source)
        settings = [f"{name}={config.state(name)}" for name in sorted(known_options())]
        text = "\n".join([_TITLE, config.source, source_identity, *settings, ""])
        data = text.encode()
        if len(data) > _MAX_ENTRY_BYTES or text.count("\n") != len(settings) + 3:
            return
        folder = os.path.dirname(entry)
        trust.make_directory(folder)
        with trust.replacing(entry) as unfinished, open(unfinished, "wb") as file:  # noqa: PTH123 - there is no pathlib here
            file.write(data)
        _forget_oldest(folder)


def _identity(path: str) -> str:
    status = os.stat(path)
    return f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"


def _forget_oldest(folder: str) -> None:
    """Keep MAX_ENTRIES: a person who builds kernels makes an entry with every build."""
    with os.scandir(folder) as entries:
        found = sorted((entry.stat().st_mtime_ns, entry.path) for entry in entries)
    for _, path in found[:-MAX_ENTRIES]:
        with contextlib.suppress(OSError):
            os.unlink(path)
