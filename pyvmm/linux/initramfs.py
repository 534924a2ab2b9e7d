"""An initramfs for a distribution's kernel: its modules, busybox and ``stock_init.sh``."""

from __future__ import annotations

import gzip
import stat
from collections.abc import Iterable
from pathlib import Path

from pyvmm.linux.cpio import pack_cpio

INIT = Path(__file__).with_name("stock_init.sh")
"""The archive's ``/init``."""

MODULES = (
    "virtio_mmio", "virtio_blk", "virtio_rng", "virtio_console",
    # Tells the host of a panic, whatever the console is.
    "pvpanic_mmio",
    # ext4 finds its checksum by name, not by symbol, so that it is in no module's "depends".
    "crc32c_generic", "crc32c_intel", "ext4",
)  # fmt: skip
"""The drivers of pyvmm's devices and of its root's file system, in load order."""

DIRECTORIES = ("bin", "dev", "proc", "sys", "modules", "root")
APPLETS = ("findfs", "grep", "insmod", "ls", "mount", "sleep", "switch_root", "tr", "umount")
"""The commands of ``stock_init.sh`` that its shell has not built in."""


def pack(busybox: bytes, modules: Iterable[tuple[str, bytes]]) -> bytes:
    """The archive, gzip-compressed; ``modules`` are ``(name, contents)`` in load order."""
    # The kernel opens /dev/console before /init has mounted anything: devtmpfs is in time, since
    # /init then opens it again.
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in DIRECTORIES]
    entries += [(f"bin/{name}", stat.S_IFLNK | 0o777, b"busybox") for name in APPLETS]
    entries += [
        ("init", stat.S_IFREG | 0o755, INIT.read_bytes()),
        ("bin/busybox", stat.S_IFREG | 0o755, busybox),
    ]
    entries += [
        (f"modules/{index:02}-{name}.ko", stat.S_IFREG | 0o644, data)
        for index, (name, data) in enumerate(modules)
    ]
    return gzip.compress(pack_cpio(entries), 6, mtime=0)
