"""Programs of the host, and the command to type if one is missing."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pyvmm.errors import HostError


class MissingToolError(HostError):
    """A program is not installed."""


def install_command(packages: Sequence[str]) -> str:
    """Return the exact command that installs ``packages``, with sudo if this user needs it."""
    sudo = "" if os.geteuid() == 0 else "sudo "
    return f"{sudo}apt-get install -y --no-install-recommends {' '.join(packages)}"


TOOL_DIRECTORIES = ("/usr/local/sbin", "/usr/sbin", "/sbin")
"""A user's PATH often lacks the directories where mke2fs and its like live."""


def tool_path() -> str:
    """Return PATH with the directories of system programs at its end."""
    return os.pathsep.join([os.environ.get("PATH", ""), *TOOL_DIRECTORIES])


def find_tool(name: str, package: str, why: str = "") -> str:
    """Return the path of the program ``name``; MissingToolError tells how to install it.

    ``package`` is Debian's name; ``why`` says what needs it.
    """
    if found := shutil.which(name, path=tool_path()):
        return found
    needs = f" ({why})" if why else ""
    raise MissingToolError(f"{name} is missing{needs}; run: {install_command([package])}")


def run_tool(command: Sequence[str], problem: str, cwd: Path | None = None) -> str:
    """Run a host tool and return its output.

    HostError with ``problem`` and the tool's last line; MissingToolError if there is no such tool.
    """
    environment = os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, errors="replace",
        )
    except FileNotFoundError as error:
        hint = (": Debian's kernels come by apt, which other systems lack; a package that you have "
                "downloaded: pyvmm kernel fetch FILE.deb")
        if not command[0].startswith(("apt", "dpkg")):
            hint = ""
        raise MissingToolError(f"{command[0]} is missing{hint}") from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise HostError(f"{problem}: {said[-1]}")
    return done.stdout


def static_busybox() -> Path | None:
    """Return this host's busybox, if it has one that needs no libraries."""
    found = shutil.which("busybox")
    return Path(found) if found and is_static(Path(found).read_bytes()) else None


def is_static(program: bytes) -> bool:
    """True if a 64-bit ELF ``program`` runs without a loader: it has no PT_INTERP segment."""
    if program[:5] != b"\x7fELF\x02" or len(program) < 64:
        return False
    (table,) = struct.unpack_from("<Q", program, 32)
    entry_size, entries = struct.unpack_from("<HH", program, 54)
    pt_interp = 3
    return all(
        struct.unpack_from("<I", program, table + index * entry_size) != (pt_interp,)
        for index in range(entries)
        if table + index * entry_size + 4 <= len(program)
    )
