"""A kernel's source as a tarball: Debian's package, or a file of the user's."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from pyvmm.errors import ConfigError
from pyvmm.linux import trust
from pyvmm.linux.build.progress import BuildError, tell
from pyvmm.linux.build.tools import output_of
from pyvmm.linux.host import install_command

PACKAGE = "linux-source-6.1"
TARBALL = Path("/usr/src") / f"{PACKAGE}.tar.xz"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A kernel's source: ``tarball`` is None until Debian's package is downloaded."""

    name: str = PACKAGE
    version: str
    tarball: Path | None


def own_source(tarball: Path) -> Source:
    """Return the user's ``tarball`` as a source, its version its hash; ConfigError."""
    try:
        return Source(name=tarball.name, version=sha256_of(tarball), tarball=tarball.absolute())
    except OSError as error:
        raise ConfigError(str(tarball), str(error.strerror)) from error


def find_source(cache: Path) -> Source:
    """Return Debian's source: installed, else downloaded before, else what apt would download."""
    trust.check_directory(cache)
    if TARBALL.exists():
        version = output_of("dpkg-query", "-W", "-f", "${Version}", PACKAGE)
        return Source(version=version or sha256_of(TARBALL), tarball=TARBALL)
    show = output_of("apt-cache", "show", "--no-all-versions", PACKAGE) or ""
    if match := re.search(r"^Version: (\S+)$", show, re.MULTILINE):
        downloaded = cache / f"{PACKAGE}_{match[1]}.tar.xz"
        return Source(version=match[1], tarball=_own_file(downloaded))
    if kept := sorted(cache.glob(f"{PACKAGE}_*.tar.xz")):
        version = kept[-1].name.removeprefix(f"{PACKAGE}_").removesuffix(".tar.xz")
        return Source(version=version, tarball=_own_file(kept[-1]))
    raise BuildError(
        f"no kernel source: {TARBALL} is missing; run: {install_command([PACKAGE])}"
    )


def _own_file(path: Path) -> Path | None:
    """Return ``path`` of the cache, None if it is missing; HostError if another user may write
    it."""
    if not os.path.lexists(path):
        return None
    trust.check_file(path)
    return path


def download_source(version: str, cache: Path, work: Path) -> Path:
    """Fetch Debian's package with apt, as any user, and keep its tarball in the cache."""
    tell(f"downloading {PACKAGE} {version} (130 MB)")
    scratch = work / "package"
    scratch.mkdir()
    command = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root",
               f"{PACKAGE}={version}"]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    packages = list(scratch.glob("*.deb"))
    if done.returncode or len(packages) != 1:
        reason = (done.stderr.strip().splitlines() or ["no file"])[-1]
        raise BuildError(f"apt-get download {PACKAGE}: {reason}; "
                         f"run: {install_command([PACKAGE])}")
    subprocess.run(["dpkg-deb", "-x", packages[0], scratch / "x"], check=True, capture_output=True)
    target = cache / f"{PACKAGE}_{version}.tar.xz"
    os.replace(scratch / "x/usr/src" / TARBALL.name, target)
    shutil.rmtree(scratch)
    return target


def sha256_of(data: bytes | Path) -> str:
    """Return the SHA-256 of bytes or of a file, in hexadecimal."""
    if isinstance(data, Path):
        with data.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(data).hexdigest()
