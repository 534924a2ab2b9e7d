"""The lab's first file system: a cpio archive made anew, in memory, for every run.

It holds busybox, the kernel modules, ``init.sh`` as ``/init``, and two files about this run:
``/lab/run`` (shell settings that ``/init`` sources) and ``/lab/command`` (the script that becomes
CMD, inside the host's file system).
"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from pyvmm.linux.cpio import pack_cpio

DIRECTORIES = ("bin", "dev", "proc", "sys", "modules", "lab", "lower", "upper", "new")
APPLETS = (
    "cat", "chmod", "chroot", "cp", "hostname", "ifconfig", "insmod", "ln", "mkdir", "mkfifo",
    "mount", "poweroff", "setsid", "sleep", "stty", "sync",
)  # fmt: skip
"""The commands of ``init.sh`` that are not built into its shell."""
BUSYBOX_IN_HOST = "/run/lab/busybox"
"""The place to which ``init.sh`` copies busybox in the file system that CMD sees."""


def command_script(
    command: Sequence[str], cwd: Path, environment: Mapping[bytes, bytes]
) -> bytes:
    """Return the shell script that turns its process into ``command``, there in ``cwd``.

    It writes its process id, which is CMD's, to a file: ``/init`` sends signals to it.  ``env``
    takes any bytes for a name, as an exported bash function has; shell assignments do not.
    """
    pairs = [os.fsdecode(name + b"=" + value) for name, value in environment.items()]
    words = [BUSYBOX_IN_HOST, "env", "-i", *pairs, *command]
    directory = shlex.quote(str(cwd))
    lines = (
        "echo $$ >/run/lab/pid",
        f"cd {directory} || exit 125",
        f"exec {shlex.join(words)}",
    )
    return os.fsencode("\n".join(lines) + "\n")


def run_settings(
    writable: Sequence[Path], end_mark: str, terminal: tuple[int, int] | None,
    stderr_on_terminal: bool,
) -> bytes:
    """Return the shell fragment that ``/init`` sources; ``terminal`` is (rows, columns)."""
    rows, columns = terminal or (0, 0)
    mounts = [f"mount_writable w{i} {shlex.quote(str(path))}" for i, path in enumerate(writable)]
    lines = (
        f"END={shlex.quote(end_mark)}",
        f"TERMINAL={int(terminal is not None)} ROWS={rows} COLUMNS={columns}",
        f"STDERR_ON_TERMINAL={int(stderr_on_terminal)}",
        "mount_all_writable() {",
        ":",
        *mounts,
        "}",
    )
    return os.fsencode("\n".join(lines) + "\n")


def pack_initramfs(
    busybox: Path, modules: Sequence[Path], settings: bytes, script: bytes
) -> bytes:
    """Return the whole archive for one run."""
    init = resources.files("pyvmm.lab").joinpath("init.sh").read_bytes()
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in DIRECTORIES]
    entries += [(f"bin/{name}", stat.S_IFLNK | 0o777, b"busybox") for name in APPLETS]
    entries += [
        ("init", stat.S_IFREG | 0o755, init),
        ("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes()),
        ("lab/run", stat.S_IFREG | 0o644, settings),
        ("lab/command", stat.S_IFREG | 0o644, script),
    ]
    entries += [
        (f"modules/{path.name}", stat.S_IFREG | 0o644, path.read_bytes()) for path in modules
    ]
    return pack_cpio(entries)
