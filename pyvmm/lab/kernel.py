"""The lab's Linux: Debian's generic kernel, unpacked once into the cache, never installed.

Two parts of the 400 MB package are kept: an uncompressed ``vmlinux``, and the few modules that the
lab loads, in load order.  ``vmlinux`` is entered by PVH, so nothing is decompressed under
emulation.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyvmm.errors import HostError
from pyvmm.linux import debian, modules, packages, payload
from pyvmm.linux.cache import Say, build_once, source_key
from pyvmm.linux.compression import UnpackError
from pyvmm.linux.packages import Package

META_PACKAGE = "linux-image-amd64"
MODULES = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay", "kvm_amd")
"""The modules that the lab loads.  The modules themselves name their dependencies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """An unpacked kernel in the cache: ``modules`` are uncompressed files in load order."""

    vmlinux: Path
    modules: tuple[Path, ...]


def obtain(cache: Path, say: Say, build: Callable[[Path, Say], str] | None = None) -> Kernel:
    """Return the cached kernel, built first if this version of the source never built one.

    ``build`` fills an empty directory and returns the version that names it.  Several processes may
    do the same: one builds, the rest wait for it.  HostError if it cannot be built.
    """
    prefix = f"lab-{source_key(__file__, modules.__file__, payload.__file__)}-"
    try:
        found = build_once(cache, "lab", prefix, build or build_from_debian, say)
    except (HostError, UnpackError) as error:
        raise HostError(f"lab: {error}") from error
    return Kernel(vmlinux=found / "vmlinux", modules=tuple(sorted((found / "modules").iterdir())))


def build_from_debian(work: Path, say: Say, wanted: Sequence[str] = MODULES) -> str:
    """Download and unpack Debian's kernel, and leave ``vmlinux`` and ``modules/`` in ``work``.

    The modules are those ``wanted`` and their dependencies.
    """
    apt = packages.host_apt()

    def attempt() -> tuple[Package, Path]:
        package = apt.find_image(META_PACKAGE)
        return package, debian.unpack_image(apt, package, work, say)

    package, root = apt.retrying(attempt, say)
    image = debian.find_in(root, "boot/vmlinuz-*", package.name)
    (work / "vmlinux").write_bytes(payload.extract_vmlinux(image.read_bytes()))
    (work / "modules").mkdir()
    for index, (name, data) in enumerate(modules.load_order(root, wanted)):
        (work / "modules" / f"{index:02}-{name}.ko").write_bytes(data)
    shutil.rmtree(root)
    return package.version.replace("/", "_")
