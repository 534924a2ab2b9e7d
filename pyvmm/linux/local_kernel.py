"""A kernel from files that are here: packages of Debian or Ubuntu, or an unpacked tree.

It needs neither apt nor dpkg, and so works on any Linux.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from pyvmm.errors import ConfigError
from pyvmm.linux import deb, modules, stock
from pyvmm.linux.cache import Say, build_once
from pyvmm.linux.compression import UnpackError
from pyvmm.linux.stock import MissingPartError, StockKernel


def fetch_files(path: Path, cache: Path, say: Say, *, with_modules: bool = False) -> StockKernel:
    """Return the kernel of the package file ``path``, in the cache.

    The modules come from the same package, or from the file of linux-modules-RELEASE beside it.
    ConfigError names a missing file.
    """
    package = deb.read(path)
    if package.architecture not in ("amd64", "all"):
        raise ConfigError(str(path), f"is for {package.architecture}, and guests here are amd64")
    digest = _hash(path)
    companions: list[Path] = []
    release = package.name.removeprefix("linux-image-").removeprefix("unsigned-")
    if package.name.startswith("linux-image-"):
        companions = sorted(path.parent.glob(f"linux-modules-{release}_*.deb"))[-1:]
    for companion in companions:
        digest += _hash(companion)
    kind = "modules" if with_modules else "kernel"
    key = f"{stock.key_of(__file__, deb.__file__)}-{hashlib.sha256(digest.encode()).hexdigest()}"

    def build(work: Path, tell: Say) -> str:
        tell(f"unpacking {path.name} (once; kept in the cache)...")
        root = work / "package"
        root.mkdir()
        deb.unpack(package, root)
        if not stock.releases(root):
            raise _no_kernel(package)
        for companion in companions:
            tell(f"and {companion.name}, which is beside it")
            deb.unpack(deb.read(companion), root)
        (found,) = stock.releases(root)[:1]
        if not companions and not stock.has_modules(root, found):
            raise ConfigError(
                str(path), f"has no modules; put linux-modules-{found}_VERSION_amd64.deb beside it"
            )
        _assemble(root, package.name, work, tell, found, with_modules)
        shutil.rmtree(root)
        return "amd64"

    found = build_once(cache, "package", f"package-{kind}-{key[:40]}_", build, say)
    return stock.opened(found, package.version)


def fetch_tree(
    root: Path, cache: Path, say: Say, *, release: str = "", with_modules: bool = False
) -> StockKernel:
    """Return the kernel of an unpacked tree, with boot/ and lib/modules/, in the cache.

    ``release`` chooses among several.  ``/`` is such a tree: this host's own kernels.
    """
    known = stock.releases(root)
    if not known:
        hint = ""
        if (root / "arch/x86").is_dir():
            hint = f"; it is a kernel's source: pyvmm kernel build {root}"
        raise ConfigError(str(root), f"has no boot/vmlinuz-* or lib/modules/*/vmlinuz{hint}")
    if release and release not in known:
        raise ConfigError(f"--version {release}", f"{root} has {', '.join(known)}")
    if not release and len(known) > 1:
        raise ConfigError(
            str(root), f"has several kernels; choose one: --version {' or '.join(known)}"
        )
    release = release or known[0]
    kind = "modules" if with_modules else "kernel"
    key = f"{stock.key_of(__file__)}-{_state_of(root, release)}"

    def build(work: Path, tell: Say) -> str:
        _assemble(root, str(root), work, tell, release, with_modules)
        return "amd64"

    found = build_once(cache, "tree", f"tree-{kind}-{key}_", build, say)
    return stock.opened(found, "")


def _assemble(
    root: Path, name: str, work: Path, say: Say, release: str, with_modules: bool
) -> None:
    try:
        stock.assemble(root, name, work, say, release=release, with_modules=with_modules)
    except MissingPartError as error:
        raise ConfigError(name, str(error).removeprefix(f"{name} ")) from error
    except UnpackError as error:
        raise stock.damaged(name, error) from error


def _no_kernel(package: deb.Deb) -> ConfigError:
    """Return the error for a package without a kernel, with the package that likely has it."""
    needed = [word for word in package.depends.replace(",", " ").split()
              if word.startswith("linux-image-")]
    hint = f"; it needs {needed[0]}: fetch that file" if needed else (
        "; a kernel's package is called linux-image-RELEASE"
    )
    return ConfigError(str(package.path), f"({package.name}) has no boot/vmlinuz-*{hint}")


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state_of(root: Path, release: str) -> str:
    """Return a hash of names, sizes and times of the files that a kernel is made of."""
    digest = hashlib.sha256(release.encode())
    for folder in ("boot", *modules.DIRECTORIES):
        place = root / folder
        files = sorted(place.glob(f"*{release}")) if folder == "boot" else sorted(
            (place / release).rglob("*")
        )
        for path in files:
            status = path.lstat()
            digest.update(os.fsencode(path))
            digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]
