"""Every start asks here whether anything about its kernel or its root is worth explaining.

If nothing is, a start pays one look at a directory and one small read, and imports nothing.
``explain`` has the explanations.
"""

from __future__ import annotations

import contextlib
import os

from pyvmm.startup.types import TYPE_CHECKING, cache_path, configuration_paths

if TYPE_CHECKING:
    from pyvmm.config import RunConfig


def root_is_special(config: RunConfig) -> bool:
    """Return True unless the root is the whole first disk, and an ext4 that any Linux mounts."""
    if "root=" in f"{config.cmdline or ''} {config.append}":
        return True
    if not config.disks or config.initrd is not None:
        return False
    head = b""
    with contextlib.suppress(OSError, ValueError):
        fd = os.open(config.disks[0].location, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            head = os.pread(fd, 2048, 0)
        finally:
            os.close(fd)
    has_small_blocks = head[0x438:0x43A] == b"\x53\xef" and head[0x418] <= 2
    return bool(head) and not (has_small_blocks and head[510:512] != b"\x55\xaa")


def has_known_configuration(kernel: str | os.PathLike[str], version: str) -> bool:
    """Return True if the configuration of ``kernel`` is available without unpacking the kernel:
    beside the file, or in the cache.  ``version`` is the kernel's own text."""
    with contextlib.suppress(OSError, ValueError):
        return os.path.exists(config_cache_path(kernel)) or any(
            os.path.isfile(path) for path in configuration_paths(kernel, version)
        )
    return False


def config_cache_path(kernel: str | os.PathLike[str]) -> str:
    """Return the path of the entry of ``linux.config_cache`` for the file ``kernel``.

    OSError if the file cannot be looked at.
    """
    status = os.stat(kernel)
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return os.path.join(cache_path(), "configs", "-".join(f"{part:x}" for part in identity))
