"""Bring the agent into a guest, whatever its image is: by an initramfs that starts it.

The agent is the first program there (``rdinit=``).  It leaves a daemon behind and starts the
initramfs's own ``/init``, which mounts the root and hands over to the image's init, as it would
have without.

The initramfs is the user's, the one that ``pyvmm kernel fetch`` has made for the kernel, or one
made here: busybox, ``stock_init.sh`` and the kernel's modules, kept in the cache.  The agent comes
in an archive of its own in front of it.  Linux unpacks one archive after the other
(Documentation/driver-api/early-userspace/buffer-format.rst), and in this order it need not find the
end of a compressed one, which not every compression tells.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from pyvmm.agent import binary
from pyvmm.errors import ConfigError, HostError
from pyvmm.linux import busybox, cpio, initramfs, modules
from pyvmm.linux import config as linux_config
from pyvmm.linux.cache import Say, build_once, cache_directory, source_key
from pyvmm.linux.compression import UnpackError
from pyvmm.linux.cpio import pack_cpio
from pyvmm.linux.formats import Compression, detect
from pyvmm.linux.options import KernelConfig
from pyvmm.startup.types import Record, configuration_paths

ALIGNMENT = 512
"""Linux needs 4; cpio's own padding is 512."""
_HOST = Path("/")
_NEEDED = ("virtio_mmio", "virtio_blk", "virtio_console")
"""Without these modules, where they are modules, neither the root nor the port is found."""
_CPIO_MAGICS = (b"070701", b"070702")


class Injection(Record):
    """What the guest gets for an initrd: ``front``, and behind it the file ``initrd``."""

    initrd: str | os.PathLike[str]
    front: bytes


def inject(
    kernel: str | os.PathLike[str],
    version: str,
    initrd: str | os.PathLike[str] | None,
    say: Say,
) -> Injection:
    """Return what brings the agent into a guest of ``kernel``, whose own text is ``version``.

    ``initrd`` is the user's, None if there is none.  ConfigError if the agent cannot be added to
    it, or if the kernel needs modules that are nowhere; HostError if no initramfs can be made.
    """
    front = pack_cpio([(binary.NAME_IN_INITRAMFS, stat.S_IFREG | 0o755, _agent())])
    front += bytes(-len(front) % ALIGNMENT)
    if initrd is not None:
        _check_is_archive(initrd)
        return Injection(initrd=initrd, front=front)
    return Injection(initrd=_own_initramfs(kernel, version, say), front=front)


def _agent() -> bytes:
    try:
        return binary.PROGRAM.read_bytes()
    except OSError as error:
        raise HostError(f"{binary.PROGRAM}: the agent's program is missing ({error.strerror}): "
                        "this installation of pyvmm is not complete") from error


def _check_is_archive(path: str | os.PathLike[str]) -> None:
    """ConfigError if an archive in front would not do: ``path`` is a file system, or nothing."""
    try:
        with Path(path).open("rb") as file:
            head = file.read(16)
    except (OSError, ValueError):
        return  # whoever loads it says so
    is_archive = head.startswith(_CPIO_MAGICS) or detect(head) is not Compression.NONE
    if head and not is_archive:
        raise ConfigError(
            f"--initrd {os.fspath(path)}",
            "is no initramfs (a cpio archive, compressed or not): --agent cannot add its program",
        )


# Our own initramfs


def _own_initramfs(kernel: str | os.PathLike[str], version: str, say: Say) -> Path:
    """Return the initramfs of ``kernel``: the one beside it, or one from the cache."""
    for release in _releases(kernel, version):
        for path in _spellings(kernel):
            beside = path.with_name(f"initramfs-{release}.cpio.gz")
            if beside.is_file():
                return beside
    for release in _releases(kernel, version):
        if root := _modules_root(kernel, release):
            return _cached(root, release, say)
    if missing := _missing_module(kernel, version):
        option, release = missing
        raise ConfigError(
            f"--kernel {os.fspath(kernel)}",
            f"has CONFIG_{option}=m, and --agent finds no modules of {release}: they must be in "
            f"../lib/modules/{release} beside it, or in /lib/modules here (or give --initrd)",
        )
    return _cached(None, "", say)


def _spellings(kernel: str | os.PathLike[str]) -> list[Path]:
    """Return the kernel's path as it is given, and as the links in it lead."""
    return list(dict.fromkeys((Path(os.path.abspath(kernel)), Path(os.path.realpath(kernel)))))


def _releases(kernel: str | os.PathLike[str], version: str) -> list[str]:
    """Return the releases that ``kernel`` may be of: the one it says, and that of its name."""
    names = [path.name.partition("-")[2] for path in _spellings(kernel)]
    found = dict.fromkeys([version.partition(" ")[0], *names])
    return [name for name in found if name and "/" not in name and name not in (".", "..")]


def _modules_root(kernel: str | os.PathLike[str], release: str) -> Path | None:
    """Return the directory that has ``lib/modules/RELEASE`` of ``kernel``, None if there is none.

    The nearest comes first: a package unpacked somewhere, an image's tree, this host.
    """
    beside = [folder for path in _spellings(kernel) for folder in (path.parent.parent, path.parent)]
    for root in (*beside, _HOST):
        for place in (root, root / "usr"):
            if (place / "lib/modules" / release / "kernel").is_dir():
                return place
    return None


def _missing_module(kernel: str | os.PathLike[str], version: str) -> tuple[str, str] | None:
    """Return an option that is a module, and the release; None if none is known to be one."""
    for path in configuration_paths(kernel, version):
        if (config := _read_config(path)) is None:
            continue
        for name in _NEEDED:
            if config.state(name.upper()) == "m":
                releases = _releases(kernel, version)
                return name.upper(), releases[0] if releases else "its release"
    return None


def _read_config(path: str) -> KernelConfig | None:
    try:
        return linux_config.read(Path(path))
    except (OSError, UnpackError):
        return None


def _cached(root: Path | None, release: str, say: Say) -> Path:
    """Return the initramfs with the modules of ``release`` under ``root``, or with none."""
    key = source_key(
        __file__, initramfs.__file__, initramfs.INIT, cpio.__file__, modules.__file__,
        busybox.__file__,
    )
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
