"""xfs, btrfs, squashfs and erofs, each by its own tool.

Those that copy a directory take owners from it.  If owners on disk are not those of the image,
because this user is not root, fakeroot shows the tool the right ones.  mkfs.xfs reads a list.
"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from pyvmm.errors import ConfigError
from pyvmm.linux.host import find_tool
from pyvmm.linux.images.kinds import KINDS
from pyvmm.linux.images.tool import Details, run
from pyvmm.linux.images.tree import Entry, Tree

_KIND_LETTERS = {stat.S_IFREG: "-", stat.S_IFDIR: "d", stat.S_IFLNK: "l", stat.S_IFCHR: "c",
                 stat.S_IFBLK: "b", stat.S_IFIFO: "p"}


def write(kind: str, tree: Tree, image: Path, size_bytes: int, details: Details) -> None:
    """Write an image of ``tree`` to ``image``; HostError with the tool's words if it fails."""
    tool = find_tool(KINDS[kind].tool, KINDS[kind].package)
    if size_bytes:
        with image.open("wb") as file:
            file.truncate(size_bytes)
    else:
        image.unlink(missing_ok=True)
    root, label = str(tree.root), ["-L", details.label] if details.label else []
    match kind:
        case "xfs":
            _write_xfs(tool, tree, image, label)
        case "btrfs":
            _run_on(tree, [tool, "-q", *label, "--rootdir", root, str(image)])
        case "squashfs":
            _run_on(tree, [tool, root, str(image), "-noappend", "-quiet", "-no-progress"],
                    all_root=("-all-root",))
        case "erofs":
            _run_on(tree, [tool, "--quiet", str(image), root], all_root=("--all-root",))


def _run_on(tree: Tree, command: Sequence[str], all_root: tuple[str, ...] = ()) -> None:
    """Run ``command`` so that it sees the owners and devices of ``tree``.

    ``all_root`` are the tool's own words for a tree that is root's.
    """
    lost = list(tree.lost())
    all_is_roots = not any(entry.uid or entry.gid for entry in tree.entries.values())
    only_owners = all(found and found.st_mode == entry.mode for _, entry, found in lost)
    if not lost and os.geteuid() == 0:
        run(command)
    elif all_root and all_is_roots and only_owners:
        run([*command[:1], *all_root, *command[1:]] if all_root[0][1] == "-"
            else [*command, *all_root])
    else:
        find_tool("fakeroot", "fakeroot", "to give files other owners without root")
        script = tree.root.with_name(f"{tree.root.name}.owners")
        try:
            script.write_bytes(os.fsencode("\n".join([
                "set -e", *_restoring(tree.root, lost), f"exec {shlex.join(command)}", ""
            ])))
            run(["fakeroot", "--unknown-is-real", "--", "sh", str(script)])
        finally:
            script.unlink(missing_ok=True)


def _restoring(root: Path, lost: Sequence[tuple[str, Entry, os.stat_result | None]]
               ) -> Iterator[str]:
    """Yield the commands that mend what is ``lost``, for a shell under fakeroot."""
    yield f"chown -h 0:0 {shlex.quote(str(root))}"
    for name, entry, found in lost:
        place = shlex.quote(str(root / name))
        if found is None and stat.S_ISFIFO(entry.mode):
            yield f"mkfifo {place}"
        elif found is None:
            letter = _KIND_LETTERS[stat.S_IFMT(entry.mode)]
            yield f"mknod {place} {letter} {entry.device[0]} {entry.device[1]}"
        yield f"chown -h {entry.uid}:{entry.gid} {place}"
        if not stat.S_ISLNK(entry.mode):
            yield f"chmod {stat.S_IMODE(entry.mode):04o} {place}"


def _write_xfs(tool: str, tree: Tree, image: Path, label: list[str]) -> None:
    prototype = image.with_name(f"{image.name}.prototype")
    try:
        prototype.write_bytes(os.fsencode("\n".join(_prototype(tree)) + "\n"))
        run([tool, "-q", *label, "-p", str(prototype), str(image)])
    finally:
        prototype.unlink(missing_ok=True)
    # A prototype's modes have no sticky bit, as /tmp needs it.
    commands = []
    for name, entry in tree.entries.items():
        if entry.mode & stat.S_ISVTX and not stat.S_ISLNK(entry.mode):
            commands += ["-c", f"path /{name}", "-c", f"write core.mode 0{entry.mode:o}"]
    if commands:
        run([find_tool("xfs_db", "xfsprogs"), "-x", *commands, str(image)])


def _prototype(tree: Tree) -> Iterator[str]:
    """Yield the lines of mkfs.xfs(8)'s prototype; ConfigError for a name that it cannot take."""
    yield from ("/", "0 0", "d--755 0 0")
    depth = 0
    for name, entry in tree.entries.items():
        if any(character.isspace() for character in name):
            raise ConfigError(name, "mkfs.xfs takes no name with a space; use another --fs")
        parts = name.split("/")
        for _ in range(depth - len(parts) + 1):
            yield "$"
        depth = len(parts) - 1
        letter = _KIND_LETTERS[stat.S_IFMT(entry.mode)]
        setuid = "u" if entry.mode & stat.S_ISUID else "-"
        setgid = "g" if entry.mode & stat.S_ISGID else "-"
        words = [parts[-1], f"{letter}{setuid}{setgid}{entry.mode & 0o777:03o}",
                 str(entry.uid), str(entry.gid)]
        place = tree.root / name
        if letter == "-":
            words.append(str(place))
        elif letter == "l":
            words.append(os.readlink(place))
        elif entry.is_device:
            words += map(str, entry.device)
        yield " ".join(words)
        if letter == "d":
            depth += 1
    for _ in range(depth + 1):
        yield "$"
