"""Bring the agent into a guest, whatever its image is: by an initramfs that starts it.

The agent is the first program there (``rdinit=``).  It leaves a daemon behind and starts the
initramfs's own ``/init``, which mounts the root and hands over to the image's init, as it would
have without.

The initramfs is the user's, the one that ``pyvmm kernel fetch`` has made for the kernel, or one of
our own (``own_initramfs``).  The agent comes in an archive of its own in front of it.  Linux
unpacks one archive after the other (Documentation/driver-api/early-userspace/buffer-format.rst),
and in this order it need not find the end of a compressed one, which not every compression tells.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from pyvmm.agent import binary
from pyvmm.errors import ConfigError, HostError
from pyvmm.linux.cpio import pack_cpio
from pyvmm.linux.formats import Compression, detect
from pyvmm.startup.types import TYPE_CHECKING, Record

if TYPE_CHECKING:
    from collections.abc import Callable

ALIGNMENT = 512
"""Linux needs 4; cpio's own padding is 512."""
_CPIO_MAGICS = (b"070701", b"070702")


class Injection(Record):
    """The guest's initrd: ``front``, and behind it the file ``initrd``."""

    initrd: str | os.PathLike[str]
    front: bytes


def inject(
    kernel: str | os.PathLike[str],
    version: str,
    initrd: str | os.PathLike[str] | None,
    say: Callable[[str], None],
) -> Injection:
    """Return what brings the agent into a guest of ``kernel``, whose own text is ``version``.

    ``initrd`` is the user's, None if there is none.  ConfigError if the agent cannot be added to
    it, or if the kernel needs modules that are nowhere; HostError if no initramfs can be made.
    """
    front = pack_cpio([(binary.NAME_IN_INITRAMFS, stat.S_IFREG | 0o755, _program())])
    front += bytes(-len(front) % ALIGNMENT)
    if initrd is not None:
        _check_is_archive(initrd)
        return Injection(initrd=initrd, front=front)
    releases = _releases(kernel, version)
    for path in _spellings(kernel):
        for release in releases:
            beside = path.with_name(f"initramfs-{release}.cpio.gz")
            if beside.is_file():
                return Injection(initrd=beside, front=front)
    from pyvmm.linux.own_initramfs import own_initramfs

    return Injection(initrd=own_initramfs(kernel, version, releases, say), front=front)


def _program() -> bytes:
    """Return the agent's program; HostError."""
    try:
        return binary.read_program()
    except OSError as error:
        raise HostError(f"{binary.PROGRAM}: the agent's program is missing ({error.strerror}): "
                        "this installation of pyvmm is not complete") from error


def _check_is_archive(path: str | os.PathLike[str]) -> None:
    """Raise ConfigError if ``path`` is a file that no archive may go in front of: a file system."""
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


def _spellings(kernel: str | os.PathLike[str]) -> list[Path]:
    """Return the kernel's path as it is given, and as the links in it lead."""
    return list(dict.fromkeys((Path(os.path.abspath(kernel)), Path(os.path.realpath(kernel)))))


def _releases(kernel: str | os.PathLike[str], version: str) -> list[str]:
    """Return the releases that ``kernel`` may be of: the one it says, and that of its name."""
    names = [path.name.partition("-")[2] for path in _spellings(kernel)]
    found = dict.fromkeys([version.partition(" ")[0], *names])
    return [name for name in found if name and "/" not in name and name not in (".", "..")]
