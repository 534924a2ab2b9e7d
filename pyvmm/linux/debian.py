"""Debian's kernels, unpacked from their packages into the cache; nothing is installed."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from pyvmm.errors import HostError
from pyvmm.linux import cpio, initramfs, modules, packages, payload
from pyvmm.linux.busybox import find_busybox
from pyvmm.linux.cache import Say, build_once, source_key
from pyvmm.linux.compression import UnpackError
from pyvmm.linux.packages import Apt, Package

CLOUD_META_PACKAGE = "linux-image-cloud-amd64"


@dataclass(frozen=True, slots=True, kw_only=True)
class StockKernel:
    """A distribution's kernel in the cache, with all that it takes to boot it here.

    ``vmlinux`` is the same kernel as ``vmlinuz``, uncompressed.  The names end with ``release``,
    its ``uname -r``; ``version`` is its package's.
    """

    release: str
    version: str
    vmlinuz: Path
    vmlinux: Path
    config: Path
    initramfs: Path


def fetch(
    cache: Path, say: Say, *, backports: bool = False, version: str | None = None
) -> StockKernel:
    """Return Debian's kernel for virtual machines: the newest, or the package's ``version``.

    It comes from this host's apt or, with ``backports``, from the backports of its release.  Each
    version is built once; several processes may ask for it at the same time.  HostError names the
    missing part.
    """
    apt = packages.backports_apt(cache, say) if backports else packages.host_apt()
    key = source_key(
        __file__, modules.__file__, payload.__file__, initramfs.__file__, initramfs.INIT,
        cpio.__file__,
    )

    def attempt() -> StockKernel:
        package = apt.find_image(CLOUD_META_PACKAGE, version)
        # "_" is in no name and no version, so no prefix is the beginning of another.
        prefix = f"debian-{key}-{package.name}_{package.version}_"
        found = build_once(
            cache, "debian", prefix, lambda work, tell: _build(apt, package, work, tell), say
        )
        return _open(found, package.version)

    try:
        return apt.retrying(attempt, say)
    except UnpackError as error:
        raise HostError(f"Debian's kernel: {error}") from error


def unpack_image(apt: Apt, package: Package, work: Path, say: Say) -> Path:
    """Download ``package`` and unpack it to a directory in ``work``; AptError, HostError."""
    archive = apt.download(package, work, say)
    say("unpacking it (once; kept in the cache)...")
    root = work / "package"
    packages.unpack(archive, root)
    return root


def find_in(root: Path, pattern: str, name: str) -> Path:
    """Return the file ``pattern`` of the unpacked package ``name``; HostError if there is none."""
    found = next(root.glob(pattern), None)
    if found is None:
        raise HostError(f"{name} holds no {pattern}")
    return found


def _build(apt: Apt, package: Package, work: Path, say: Say) -> str:
    """Leave vmlinuz, vmlinux, config and initramfs in ``work``."""
    busybox = find_busybox(work, say)
    root = unpack_image(apt, package, work, say)
    image = find_in(root, "boot/vmlinuz-*", package.name)
    release = image.name.removeprefix("vmlinuz-")
    config = find_in(root, f"boot/config-{release}", package.name)
    shutil.copyfile(image, work / image.name)
    shutil.copyfile(config, work / config.name)
    (work / f"vmlinux-{release}").write_bytes(payload.extract_vmlinux(image.read_bytes()))
    loaded = modules.load_order(root, initramfs.MODULES)
    file_systems = {
        kind: modules.load_order(root, [name]) for kind, name in initramfs.FILE_SYSTEMS.items()
    }
    archive = initramfs.pack(busybox, loaded, file_systems)
    (work / f"initramfs-{release}.cpio.gz").write_bytes(archive)
    shutil.rmtree(root)
    return "amd64"


def _open(directory: Path, version: str) -> StockKernel:
    release = next(directory.glob("vmlinuz-*")).name.removeprefix("vmlinuz-")
    return StockKernel(
        release=release,
        version=version,
        vmlinuz=directory / f"vmlinuz-{release}",
        vmlinux=directory / f"vmlinux-{release}",
        config=directory / f"config-{release}",
        initramfs=directory / f"initramfs-{release}.cpio.gz",
    )
