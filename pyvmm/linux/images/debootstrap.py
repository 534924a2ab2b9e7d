"""Debian or Ubuntu as the archive of a root, installed by mmdebstrap; no root needed where it
needs none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pyvmm.errors import HostError
from pyvmm.linux import packages
from pyvmm.linux.host import find_tool, run_tool

PACKAGES = ("systemd-sysv", "udev", "kmod")
"""Beside the essential ones, which have a shell and login: what it takes to boot."""
UNUSED = ("usr/share/doc/*", "usr/share/man/*", "usr/share/locale/*", "usr/share/info/*")
FILES = {
    "etc/hostname": "pyvmm\n",
    "etc/fstab": "",
    # Without one systemd takes every boot for the first.
    "etc/machine-id": "707976696d6d40008000000000000001\n",
}


def bootstrap(suite: str, archive: Path, include: Sequence[str] = (), mirror: str = "") -> None:
    """Install ``suite``, such as bookworm, and the packages ``include`` into the file ``archive``.

    The mirror is ``mirror``, else the one that this host's apt has for the suite, else
    mmdebstrap's.  HostError with the tool's last words.
    """
    tool = find_tool("mmdebstrap", "mmdebstrap", "--debootstrap installs by it")
    options = [f"--dpkgopt=path-exclude=/{pattern}" for pattern in UNUSED]
    names = ",".join(dict.fromkeys([*PACKAGES, *include]))
    command = [tool, "--quiet", "--variant=essential", f"--include={names}", "--format=tar",
               *options, suite, str(archive)]
    if source := mirror or _mirror_of(suite):
        command.append(source)
    run_tool(command, f"mmdebstrap {suite} failed")


def configure(root: Path) -> list[str]:
    """Give the unpacked ``root`` a name, and its user root no password; return what changed."""
    for name, text in FILES.items():
        (root / name).unlink(missing_ok=True)
        (root / name).write_text(text)
    shadow = root / "etc/shadow"
    mode = shadow.stat().st_mode
    shadow.chmod(0o600)
    shadow.write_text(shadow.read_text().replace("root:*:", "root::", 1))
    shadow.chmod(mode)
    return list(FILES)


def _mirror_of(suite: str) -> str:
    """Return the mirror that this host's apt has for ``suite``; "" if none."""
    try:
        return packages.known_mirror(suite)
    except HostError:  # no apt here
        return ""
