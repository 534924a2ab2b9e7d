"""Debian packages by way of apt, without installing anything: found, downloaded, unpacked.

apt checks what it downloads against the archive's signatures.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pyvmm.errors import HostError
from pyvmm.linux import trust
from pyvmm.linux.cache import Say, locked
from pyvmm.linux.host import MissingToolError, install_command, run_tool
from pyvmm.numerals import whole_number

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
DEFAULT_MIRROR = "http://deb.debian.org/debian/"
_MAX_PACKAGE_BYTES = 1 << 40


T = TypeVar("T")


class AptError(HostError):
    """apt does not know a package or cannot download it; fresh lists may help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One Debian package as apt describes it."""

    name: str
    version: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Apt:
    """apt as this host has it configured, or, with ``options``, with lists of its own.

    ``refreshable`` is True if this process may update the lists.
    """

    options: tuple[str, ...] = ()
    refreshable: bool = False

    def update(self) -> None:
        """Refresh the lists of packages; HostError if that fails."""
        run_tool(["apt-get", *self.options, "update", "-qq"], "apt-get update failed")

    def retrying(self, attempt: Callable[[], T], say: Say) -> T:
        """Return the result of ``attempt``; after an AptError, refresh the lists and try once
        more."""
        try:
            return attempt()
        except AptError as error:
            # Most likely the lists are absent, or old and the mirror has moved on.
            if not self.refreshable:
                hint = "if apt's lists are old, run: sudo apt-get update"
                raise HostError(f"{error}; {hint}") from error
            say(f"{error}; running apt-get update to try again...")
            self.update()
            return attempt()

    def find_image(self, meta: str, version: str | None = None) -> Package:
        """Return the kernel image behind the meta package ``meta``, in ``version`` or the newest.

        AptError names the package that apt does not know.
        """
        # A meta package depends on one image, and on exactly its own version if it names one.
        found = re.search(
            r"^Depends:.*?\b(linux-image-[^\s,]+)(?: \(= (\S+)\))?",
            self._show(meta, version), re.MULTILINE,
        )
        if found is None:
            raise AptError(self._unknown(meta, version))
        return self.find(found[1], found[2])

    def find(self, name: str, version: str | None = None) -> Package:
        """Return the package ``name``, in ``version`` or the newest; AptError if apt knows none."""
        shown = self._show(name, version)
        found = re.search(r"^Version: (.+)$", shown, re.MULTILINE)
        size = re.search(r"^Size: (\d+)$", shown, re.MULTILINE)
        size_bytes = whole_number(size[1], 0, _MAX_PACKAGE_BYTES) if size else None
        if found is None or size_bytes is None:
            raise AptError(self._unknown(name, version))
        return Package(name=name, version=found[1], size_bytes=size_bytes)

    def download(self, package: Package, into: Path, say: Say) -> Path:
        """Fetch ``package``'s archive (without root, and without installing it) to ``into``.

        AptError if that fails.
        """
        say(f"downloading {package.name} {package.version} ({package.size_bytes / 1e6:.1f} MB)...")
        command = ["apt-get", *self.options, "download", "-qq", f"{package.name}={package.version}"]
        try:
            run_tool(command, f"cannot download {package.name}", cwd=into)
        except HostError as error:
            raise AptError(str(error)) from error
        return next(into.glob(f"{package.name}*.deb"))

    def _show(self, name: str, version: str | None) -> str:
        """Return apt-cache's description of a package; "" if it knows none such."""
        wanted = f"{name}={version}" if version else name
        try:
            return run_tool(
                ["apt-cache", *self.options, "show", "--no-all-versions", wanted], "unknown"
            )
        except MissingToolError:
            raise
        except HostError:
            return ""

    def _unknown(self, name: str, version: str | None) -> str:
        """Return the reason why ``name`` cannot be had, and a remedy."""
        if version and self._show(name, None):
            table = run_tool(["apt-cache", *self.options, "madison", name], "unknown")
            rows = [line.split("|") for line in table.splitlines()]
            known = dict.fromkeys(row[1].strip() for row in rows if len(row) > 1)
            return f"apt knows no version {version} of {name}, only {', '.join(known)}"
        return f"apt knows no package {name} (is this Debian, amd64?)"


def host_apt() -> Apt:
    """Return apt as it is: only root may refresh its lists."""
    return Apt(refreshable=os.geteuid() == 0)


def backports_apt(cache: Path, say: Say) -> Apt:
    """Return an apt with only the backports of this host's Debian, its lists in ``cache``.

    It needs no root and changes nothing of the host's apt, whose mirror, proxies and keys it uses.
    The lists are refreshed if there is a network.  HostError if this is not Debian.
    """
    release = codename()
    if not KEYRING.exists():
        raise HostError(f"{KEYRING} is missing; run: {install_command(['debian-archive-keyring'])}")
    suite = f"{release}-backports"
    directory = cache / f"apt-{suite}"
    try:
        for name in ("lists/partial", "cache/archives/partial"):
            trust.make_directory(directory / name)
        trust.check_tree(directory)
        sources = directory / "sources.list"
        with trust.replacing(sources) as unfinished:
            Path(unfinished).write_text(
                f"deb [arch=amd64 signed-by={KEYRING}] {mirror(release)} {suite} main\n"
            )
    except OSError as error:
        raise HostError(f"cannot use the cache {directory}: {error}") from error
    settings = {
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": directory / "lists",
        "Dir::Cache": directory / "cache",
        "APT::Architecture": "amd64",
        # Root's apt would download as another user, who cannot write to root's cache.
        "APT::Sandbox::User": "root",
    }
    apt = Apt(
        options=tuple(word for key, value in settings.items() for word in ("-o", f"{key}={value}")),
        refreshable=True,
    )
    with locked(directory / "lock", say):
        try:
            apt.update()
        except HostError as error:
            if not list((directory / "lists").glob("*_Packages*")):
                raise
            say(f"{error}; going on with the lists of last time")
    return apt


def unpack(archive: Path, into: Path) -> None:
    """Unpack ``archive`` into the directory ``into`` and delete it."""
    run_tool(["dpkg", "-x", str(archive), str(into)], f"cannot unpack {archive.name}")
    archive.unlink()


def codename() -> str:
    """Return this Debian's release, such as bookworm."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    if release.get("ID") != "debian" or not release.get("VERSION_CODENAME"):
        raise HostError(f"this host is {release.get('PRETTY_NAME', 'of no known kind')}, "
                        "and only Debian has its packages")
    return release["VERSION_CODENAME"]


def mirror(release: str) -> str:
    """Return the URL from which this host's apt gets ``release``, such as bookworm."""
    return known_mirror(release) or DEFAULT_MIRROR


def known_mirror(release: str) -> str:
    """Return the URL that this host's apt has for ``release``; "" if it has none."""
    targets = run_tool(
        ["apt-get", "indextargets", "--format", "$(RELEASE) $(REPO_URI)", "Created-By: Packages"],
        "apt-get cannot say where its packages come from",
    )
    pairs = (line.partition(" ") for line in targets.splitlines())
    return next((uri for name, _, uri in pairs if name == release), "")
