"""A busybox without libraries: this host's, or the one of Debian's package."""

from __future__ import annotations

import shutil
from pathlib import Path

from pyvmm.errors import HostError
from pyvmm.linux import packages
from pyvmm.linux.cache import Say
from pyvmm.linux.host import MissingToolError, install_command, static_busybox


def find_busybox(work: Path, say: Say) -> bytes:
    """Return the program; a package is unpacked below ``work`` for a while.

    HostError, with the command that installs it, if this host has neither the program nor apt.
    """
    if found := static_busybox():
        return found.read_bytes()
    apt = packages.host_apt()

    def attempt() -> Path:
        package = apt.find("busybox-static")
        root = work / "busybox"
        packages.unpack(apt.download(package, work, say), root)
        # /bin, or /usr/bin if both are the same directory.
        found = next(root.glob("**/bin/busybox"), None)
        if found is None:
            raise HostError(f"{package.name} holds no bin/busybox")
        return found

    try:
        data = apt.retrying(attempt, say).read_bytes()
    except MissingToolError as error:
        raise MissingToolError(
            "a busybox without libraries is missing; run: "
            f"{install_command(['busybox-static'])} (Fedora, Arch: the package busybox)"
        ) from error
    shutil.rmtree(work / "busybox")
    return data
