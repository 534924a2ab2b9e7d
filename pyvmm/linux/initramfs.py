"""An initramfs for a distribution's kernel: its modules, busybox and ``stock_init.sh``."""

from __future__ import annotations

import gzip
import stat
from collections.abc import Iterable, Mapping
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

FILE_SYSTEMS = {
    "btrfs": "btrfs", "erofs": "erofs", "f2fs": "f2fs", "iso9660": "isofs", "squashfs": "squashfs",
    "xfs": "xfs",
}
"""Their modules by the name of the file system: each is loaded only if the root is one."""

DIRECTORIES = ("bin", "dev", "proc", "sys", "modules", "file-systems", "root")
APPLETS = (
    "dd", "findfs", "grep", "gunzip", "hexdump", "insmod", "ls", "mount", "sleep", "switch_root",
    "tr", "umount",
)  # fmt: skip
"""The commands of ``stock_init.sh`` that are not built into its shell."""

Modules = Iterable[tuple[str, bytes]]
"""``(name, contents)`` in load order."""


def pack(busybox: bytes, modules: Modules, file_systems: Mapping[str, Modules]) -> bytes:
    """Return the gzipped archive: ``modules`` for every boot, and those of ``file_systems``."""
    # The kernel opens /dev/console before /init has mounted anything.  devtmpfs is in time, because
    # /init then opens the console again.
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
    for kind, drivers in file_systems.items():
        entries.append((f"file-systems/{kind}", stat.S_IFDIR | 0o755, b""))
        # Compressed once more: the kernel need not unpack megabytes for a root that is ext4.
        entries += [
            (f"file-systems/{kind}/{index:02}-{name}.ko.gz", stat.S_IFREG | 0o644,
             gzip.compress(data, 6, mtime=0))
            for index, (name, data) in enumerate(drivers)
        ]
    return gzip.compress(pack_cpio(entries), 6, mtime=0)
