"""The kinds of image, and the sizes they need."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from pyvmm.errors import ConfigError
from pyvmm.linux.images.tree import Tree

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A file system, or the archive ``initramfs``: the tool that makes it and Debian's package.

    ``least_bytes`` is the smallest size; 0 if an image is as large as its contents.
    ``label_bytes`` is the longest label; 0 if it has none.
    """

    tool: str
    package: str
    least_bytes: int = 0
    label_bytes: int = 0

    @property
    def is_read_only(self) -> bool:
        """True if the guest cannot write to it."""
        return not self.least_bytes


KINDS = MappingProxyType({
    "ext4": Kind(tool="mke2fs", package="e2fsprogs", least_bytes=8 * MIB, label_bytes=16),
    "ext3": Kind(tool="mke2fs", package="e2fsprogs", least_bytes=8 * MIB, label_bytes=16),
    "ext2": Kind(tool="mke2fs", package="e2fsprogs", least_bytes=8 * MIB, label_bytes=16),
    "xfs": Kind(tool="mkfs.xfs", package="xfsprogs", least_bytes=320 * MIB, label_bytes=12),
    "btrfs": Kind(
        tool="mkfs.btrfs", package="btrfs-progs", least_bytes=128 * MIB, label_bytes=255
    ),
    "squashfs": Kind(tool="mksquashfs", package="squashfs-tools"),
    "erofs": Kind(tool="mkfs.erofs", package="erofs-utils"),
    "initramfs": Kind(tool="", package=""),
})


def kind_of(name: str) -> Kind:
    """Return the kind ``name``; ConfigError with those that there are."""
    if name not in KINDS:
        raise ConfigError(f"--fs {name}", f"is not known; there are {', '.join(KINDS)}")
    return KINDS[name]


def check_label(name: str, label: str) -> None:
    """Raise ConfigError if a file system ``name`` cannot have ``label``."""
    longest = kind_of(name).label_bytes
    if label and not longest:
        raise ConfigError("--label", f"{name} has none; leave it away")
    if len(label.encode("utf-8", "surrogateescape")) > longest:
        raise ConfigError(f"--label {label}", f"is longer than the {longest} bytes of {name}")


def size_of(name: str, tree: Tree, wanted_bytes: int | None) -> int:
    """Return the size for an image of ``tree``: as wanted, else chosen from its contents.

    Chosen are the contents and their inodes, a quarter more, and 32 MiB for the journal and new
    files, in whole MiB.  ConfigError for a wanted size that makes no sense; the tool itself says if
    the contents do not fit.
    """
    kind = kind_of(name)
    if kind.is_read_only:
        if wanted_bytes is not None:
            raise ConfigError("--size", f"{name} is as large as its contents; leave it away")
        return 0
    if wanted_bytes is None:
        contents = tree.content_bytes() + 4096 * len(tree.entries)
        return max(kind.least_bytes, -(-(contents * 5 // 4 + 32 * MIB) // MIB) * MIB)
    if wanted_bytes < kind.least_bytes or wanted_bytes % 4096:
        raise ConfigError(
            "--size", f"must be at least {kind.least_bytes >> 20}M for {name}, and a multiple of "
            f"4096 bytes; it is {wanted_bytes}"
        )
    return wanted_bytes
