"""ext2, ext3 and ext4 by mke2fs, which copies a directory; debugfs mends what could not be copied.

mke2fs takes owners from the directory.  A user without root has only files of their own, and no
devices, so debugfs sets owners and modes afterwards, and makes devices.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from pyvmm.errors import ConfigError
from pyvmm.linux.host import find_tool
from pyvmm.linux.images.tool import Details, run
from pyvmm.linux.images.tree import Tree

_TIMES = ("atime", "ctime", "mtime", "crtime")


def write(kind: str, tree: Tree, image: Path, size_bytes: int, details: Details) -> None:
    """Write an image of ``tree`` to ``image``; HostError with the tool's words if it fails."""
    with image.open("wb") as file:
        file.truncate(size_bytes)
    environment = {}
    if details.time_s is not None:
        environment["E2FSPROGS_FAKE_TIME"] = str(details.time_s)
    extended = "root_owner=0:0,lazy_itable_init=0"
    # Nothing lazy: the guest's kernel would start a thread that writes in the background.
    extended += "" if kind == "ext2" else ",lazy_journal_init=0"
    options = ["-L", details.label] if details.label else []
    if details.uuid:
        options += ["-U", details.uuid]
        extended += f",hash_seed={details.uuid}"
    run([find_tool("mke2fs", "e2fsprogs"), "-q", "-F", "-t", kind, "-b", "4096", "-m", "0",
         *options, "-d", str(tree.root), "-E", extended, str(image)], environment)
    commands = list(_commands(tree, details.time_s))
    if not commands:
        return
    script = image.with_name(f"{image.name}.debugfs")
    try:
        script.write_bytes(b"".join(os.fsencode(command) + b"\n" for command in commands))
        # It reports a failed command on stderr, below its banner, and still ends with 0.
        run([find_tool("debugfs", "e2fsprogs"), "-w", "-f", str(script), str(image)], environment,
            fails_by_words=True)
    finally:
        script.unlink(missing_ok=True)


def _commands(tree: Tree, time_s: int | None) -> Iterator[str]:
    """Yield the commands of debugfs for all that mke2fs could not know."""
    here = ""
    for name, entry, found in tree.lost():
        quoted = _quoted(name)
        if found is None:
            folder, _, last = name.rpartition("/")
            if folder != here:
                yield f"cd {_quoted(folder)}"
                here = folder
            letter = "p" if stat.S_ISFIFO(entry.mode) else "b" if stat.S_ISBLK(entry.mode) else "c"
            numbers = "" if letter == "p" else f" {entry.device[0]} {entry.device[1]}"
            yield f'mknod "{last}" {letter}{numbers}'
        if found is None or (found.st_mode != entry.mode and not stat.S_ISLNK(entry.mode)):
            yield f"sif {quoted} mode 0{entry.mode:o}"
        yield f"sif {quoted} uid {entry.uid}"
        yield f"sif {quoted} gid {entry.gid}"
    if time_s is None:
        return
    for name in ("", "lost+found", *tree.entries):
        for field in _TIMES:
            yield f"sif {_quoted(name)} {field} @{time_s}"
            yield f"sif {_quoted(name)} {field}_extra 0"


def _quoted(name: str) -> str:
    """Return the path ``name`` as a word of debugfs."""
    if "\n" in name or '"' in name:
        raise ConfigError(
            name, "debugfs cannot take this name, to give it its owner; rename it, or use "
            "--fs squashfs"
        )
    return f'"/{name}"'
