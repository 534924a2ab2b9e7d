"""A distribution's kernel in the cache, made of the files of its unpacked packages."""

from __future__ import annotations

import contextlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from pyvmm.errors import HostError
from pyvmm.linux import cpio, initramfs, modules, payload
from pyvmm.linux.busybox import find_busybox
from pyvmm.linux.cache import Say, source_key
from pyvmm.linux.compression import UnpackError, decompress
from pyvmm.linux.host import find_tool, run_tool
from pyvmm.linux.work import PATIENT_CPU_S, Budget

_IMAGES = ("boot/vmlinuz-*", "usr/lib/modules/*/vmlinuz", "lib/modules/*/vmlinuz")
"""The places of a kernel: Debian's and Ubuntu's, and Fedora's."""
_PACKED_MODULE = re.compile(r"\.ko\.(?:zst|xz|gz)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class StockKernel:
    """A distribution's kernel in the cache, with all that it takes to boot it here.

    ``vmlinux`` is the same kernel as ``vmlinuz``, uncompressed.  The names end with ``release``,
    its ``uname -r``; ``version`` is its package's, "" if it came from a directory.  ``modules`` is
    the directory of all its modules, if they were asked for.
    """

    release: str
    version: str
    vmlinuz: Path
    vmlinux: Path
    config: Path
    initramfs: Path
    modules: Path | None = None


class MissingPartError(HostError):
    """The packages lack a file; ``part`` says which: kernel, config or modules."""

    def __init__(self, part: str, text: str) -> None:
        super().__init__(text)
        self.part = part


def key_of(*files: str | Path) -> str:
    """Return the hash of the code that makes a kernel in the cache, and of ``files``."""
    return source_key(
        __file__, modules.__file__, payload.__file__, initramfs.__file__, initramfs.INIT,
        cpio.__file__, *files,
    )


def releases(root: Path) -> list[str]:
    """Return the release of every kernel below ``root``."""
    found: dict[str, None] = {}
    for pattern in _IMAGES:
        for path in root.glob(pattern):
            with contextlib.suppress(OSError):
                if path.is_file():
                    found[_release_of(path)] = None
    return sorted(found)


def _release_of(image: Path) -> str:
    if image.name == "vmlinuz":
        return image.parent.name
    return image.name.removeprefix("vmlinuz-")


def has_modules(root: Path, release: str) -> bool:
    """Return True if there are modules for ``release`` below ``root``."""
    return any((root / folder / release).is_dir() for folder in modules.DIRECTORIES)


def assemble(
    root: Path, name: str, work: Path, say: Say, *, release: str = "", with_modules: bool = False
) -> None:
    """Leave vmlinuz, vmlinux, config and initramfs in ``work``, of what is unpacked in ``root``.

    ``name`` is the package's, for errors.  ``with_modules`` leaves all modules too, unpacked.
    MissingPartError if there is no kernel or no configuration, UnpackError if it is damaged.
    """
    busybox = find_busybox(work, say)
    known = releases(root)
    if not known or (release and release not in known):
        raise MissingPartError("kernel", f"{name} holds no boot/vmlinuz-{release or '*'}")
    release = release or known[0]
    image = next(
        path for pattern in _IMAGES for path in sorted(root.glob(pattern))
        if _release_of(path) == release
    )
    config = _config_of(root, release, name)
    try:
        data = image.read_bytes()
        shutil.copyfile(config, work / f"config-{release}")
    except OSError as error:
        raise HostError(f"{error.filename}: {error.strerror}") from error
    (work / f"vmlinuz-{release}").write_bytes(data)
    (work / f"vmlinux-{release}").write_bytes(payload.extract_vmlinux(data))
    loaded = modules.load_order(root, initramfs.MODULES, release)
    file_systems = {
        kind: modules.load_order(root, [module], release)
        for kind, module in initramfs.FILE_SYSTEMS.items()
    }
    archive = initramfs.pack(busybox, loaded, file_systems)
    (work / f"initramfs-{release}.cpio.gz").write_bytes(archive)
    if with_modules:
        _keep_modules(root, release, name, work, say)


def _config_of(root: Path, release: str, name: str) -> Path:
    places = [root / f"boot/config-{release}"]
    places += [root / folder / release / "config" for folder in modules.DIRECTORIES]
    for place in places:
        if place.is_file():
            return place
    raise MissingPartError("config", f"{name} holds no boot/config-{release}")


def _keep_modules(root: Path, release: str, name: str, work: Path, say: Say) -> None:
    """Copy the whole tree of modules to ``work``, each unpacked, with the tables of depmod."""
    depmod = find_tool("depmod", "kmod", "--modules needs its tables")
    source = next(
        (root / folder / release for folder in modules.DIRECTORIES
         if (root / folder / release).is_dir()), None,
    )
    if source is None:
        raise MissingPartError("modules", f"{name} holds no lib/modules/{release}")
    say("unpacking all modules...")
    target = work / "lib/modules" / release
    for path in sorted(source.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue  # build and source, which lead to headers
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if _PACKED_MODULE.search(path.name):
            data = decompress(path.read_bytes(), limit=modules.MAX_MODULE_BYTES,
                              budget=Budget(cpu_s=PATIENT_CPU_S))
            place.with_suffix("").write_bytes(data)
        else:
            shutil.copyfile(path, place)
    run_tool([depmod, "-b", str(work), release], "depmod failed")


def opened(directory: Path, version: str) -> StockKernel:
    """Return the kernel that ``assemble`` left in ``directory``."""
    release = next(directory.glob("vmlinuz-*")).name.removeprefix("vmlinuz-")
    all_modules = directory / "lib/modules" / release
    return StockKernel(
        release=release,
        version=version,
        vmlinuz=directory / f"vmlinuz-{release}",
        vmlinux=directory / f"vmlinux-{release}",
        config=directory / f"config-{release}",
        initramfs=directory / f"initramfs-{release}.cpio.gz",
        modules=all_modules if all_modules.is_dir() else None,
    )


def damaged(name: str, error: UnpackError) -> HostError:
    """Return the error for a kernel or module of ``name`` that cannot be unpacked."""
    return HostError(f"{name}: {error}")
