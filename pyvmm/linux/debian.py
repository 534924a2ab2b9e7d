"""Debian's and Ubuntu's kernels by apt, unpacked into the cache; nothing is installed."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

from pyvmm.errors import HostError
from pyvmm.linux import packages, stock
from pyvmm.linux.cache import Say, build_once
from pyvmm.linux.compression import UnpackError
from pyvmm.linux.packages import Apt, AptError, Package
from pyvmm.linux.stock import StockKernel

__all__ = ["StockKernel", "fetch", "fetch_ubuntu", "find_in", "unpack_image"]

CLOUD_META_PACKAGE = "linux-image-cloud-amd64"
UBUNTU_META_PACKAGE = "linux-image-virtual"


def fetch(
    cache: Path, say: Say, *, backports: bool = False, version: str | None = None,
    with_modules: bool = False,
) -> StockKernel:
    """Return Debian's kernel for virtual machines: the newest, or the package's ``version``.

    It comes from this host's apt or, with ``backports``, from the backports of its release.  Each
    version is built once; several processes may ask for it at the same time.  HostError names the
    missing part.
    """
    apt = packages.backports_apt(cache, say) if backports else packages.host_apt()
    return _fetch(apt, "debian", CLOUD_META_PACKAGE, cache, say, version, with_modules)


def fetch_ubuntu(
    cache: Path, say: Say, *, version: str | None = None, with_modules: bool = False
) -> StockKernel:
    """Return Ubuntu's kernel for virtual machines, which this host's apt must know.

    ``version`` is that of ``linux-image-virtual``.  HostError says what to do on another host.
    """
    apt = packages.host_apt()
    if not _is_ubuntu():
        try:
            apt.find_image(UBUNTU_META_PACKAGE)
        except AptError as error:
            raise HostError(
                f"apt knows no package {UBUNTU_META_PACKAGE}, because this host is not Ubuntu; "
                "download linux-image-RELEASE and linux-modules-RELEASE from "
                "https://packages.ubuntu.com/linux-image-virtual, and run: "
                "pyvmm kernel fetch linux-image-*.deb"
            ) from error
    return _fetch(apt, "ubuntu", UBUNTU_META_PACKAGE, cache, say, version, with_modules)


def _is_ubuntu() -> bool:
    try:
        return platform.freedesktop_os_release().get("ID") == "ubuntu"
    except OSError:
        return False


def _fetch(
    apt: Apt, distribution: str, meta: str, cache: Path, say: Say, version: str | None,
    with_modules: bool,
) -> StockKernel:
    key = stock.key_of(__file__)
    kind = "modules" if with_modules else "kernel"

    def attempt() -> StockKernel:
        package = apt.find_image(meta, version)
        # "_" is in no name and no version, so no prefix is the beginning of another.
        prefix = f"{distribution}-{kind}-{key}-{package.name}_{package.version}_"

        def build(work: Path, tell: Say) -> str:
            root = unpack_image(apt, package, work, tell)
            release = package.name.removeprefix("linux-image-").removeprefix("unsigned-")
            if not stock.has_modules(root, release):
                _add_modules(apt, release, work, tell)
            stock.assemble(root, package.name, work, tell, with_modules=with_modules)
            shutil.rmtree(root)
            return "amd64"

        return stock.opened(build_once(cache, distribution, prefix, build, say), package.version)

    try:
        return apt.retrying(attempt, say)
    except UnpackError as error:
        raise stock.damaged(f"{distribution.capitalize()}'s kernel", error) from error


def _add_modules(apt: Apt, release: str, work: Path, say: Say) -> None:
    """Unpack the package of modules, where a distribution has one: Ubuntu's has the configuration
    too."""
    try:
        package = apt.find(f"linux-modules-{release}")
    except AptError:
        return  # a kernel without modules, or its errors tell
    packages.unpack(apt.download(package, work, say), work / "package")


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
