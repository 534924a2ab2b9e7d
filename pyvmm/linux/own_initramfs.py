"""An initramfs for a kernel that brings none: busybox, ``stock_init.sh`` and the kernel's modules.

Once made it is kept in the cache, until the modules or our own files change.  The code that makes
it is imported only then.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from pyvmm.errors import ConfigError, HostError
from pyvmm.linux.cache import Say, build_once, cache_directory, source_key
from pyvmm.startup.types import configuration_paths

_HERE = Path(__file__).parent
_SOURCES = ("own_initramfs.py", "initramfs.py", "stock_init.sh", "cpio.py", "modules.py",
            "busybox.py")
_HOST = Path("/")
_NEEDED = ("VIRTIO_MMIO", "VIRTIO_BLK", "VIRTIO_CONSOLE")
"""Without the modules of these, where they are modules, neither root nor agent is found."""


def own_initramfs(
    kernel: str | os.PathLike[str], version: str, releases: list[str], say: Say
) -> Path:
    """Return an initramfs for ``kernel``, which is of the first of ``releases`` that has modules.

    ``version`` is the kernel's own text.  ConfigError if the kernel needs modules that are nowhere;
    HostError if no initramfs can be made.
    """
    for release in releases:
        if root := _modules_root(kernel, release):
            return _cached(root, release, say)
    if option := _missing_module(kernel, version):
        release = releases[0] if releases else "its release"
        raise ConfigError(
            f"--kernel {os.fspath(kernel)}",
            f"has CONFIG_{option}=m, and --agent finds no modules of {release}: they must be in "
            f"../lib/modules/{release} beside it, or in /lib/modules here (or give --initrd)",
        )
    return _cached(None, "", say)


def _modules_root(kernel: str | os.PathLike[str], release: str) -> Path | None:
    """Return the directory that has ``lib/modules/RELEASE`` of ``kernel``, None if there is none.

    The nearest comes first: a package unpacked somewhere, an image's tree, this host.
    """
    paths = (Path(os.path.abspath(kernel)), Path(os.path.realpath(kernel)))
    beside = [folder for path in paths for folder in (path.parent.parent, path.parent)]
    for root in (*beside, _HOST):
        for place in (root, root / "usr"):
            if (place / "lib/modules" / release / "kernel").is_dir():
                return place
    return None


def _missing_module(kernel: str | os.PathLike[str], version: str) -> str:
    """Return an option that is a module by a configuration beside ``kernel``, "" if none is."""
    from pyvmm.linux import config as linux_config
    from pyvmm.linux.compression import UnpackError

    for path in configuration_paths(kernel, version):
        try:
            config = linux_config.read(Path(path))
        except (OSError, UnpackError):
            continue
        if config is not None:
            return next((option for option in _NEEDED if config.state(option) == "m"), "")
    return ""


def _cached(root: Path | None, release: str, say: Say) -> Path:
    """Return the initramfs with the modules of ``release`` under ``root``, or with none."""
    key = source_key(*(_HERE / name for name in _SOURCES))
    name = f"initramfs-{key}-builtin_"
    if root is not None:
        folder = root / "lib/modules" / release
        # A kernel that is built and installed again has modules of the same release.
        stamps = [os.fspath(folder)]
        for path in (folder, folder / "kernel", folder / "modules.dep"):
            if path.exists():
                stamps.append(str(path.stat().st_mtime_ns))
        identity = hashlib.sha256("\0".join(stamps).encode()).hexdigest()[:12]
        name = f"initramfs-{key}-{release}-{identity}_"

    def build(work: Path, tell: Say) -> str:
        tell("making an initramfs for the agent (once; kept in the cache)...")
        _build(root, release, work, tell)
        return "amd64"

    return build_once(cache_directory(), "initramfs", name, build, say) / "initramfs.cpio.gz"


def _build(root: Path | None, release: str, work: Path, say: Say) -> None:
    """Leave ``initramfs.cpio.gz`` in ``work``."""
    from pyvmm.linux import busybox, initramfs, modules
    from pyvmm.linux.compression import UnpackError

    program = busybox.find_busybox(work, say)
    loaded: list[tuple[str, bytes]] = []
    file_systems: dict[str, list[tuple[str, bytes]]] = {}
    if root is not None:
        try:
            loaded = list(modules.load_order(root, initramfs.MODULES, release))
            file_systems = {
                kind: list(modules.load_order(root, [name], release))
                for kind, name in initramfs.FILE_SYSTEMS.items()
            }
        except UnpackError as error:
            raise HostError(f"a module of {release} in {root / 'lib/modules'}: {error}") from error
    (work / "initramfs.cpio.gz").write_bytes(initramfs.pack(program, loaded, file_systems))
