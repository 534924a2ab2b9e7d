"""Files and programs of this host that are added to an image."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pyvmm.errors import ConfigError, HostError
from pyvmm.linux.images.tree import resolve


def parse_added(text: str, option: str = "--add") -> tuple[Path, str]:
    """Return the two sides of ``SRC:DST``, with DST an absolute path in the image; ConfigError."""
    source, colon, target = text.rpartition(":")
    if not colon or not source or not target.startswith("/") or ".." in Path(target).parts:
        raise ConfigError(f"{option} {text}", "is not SRC:DST with an absolute DST")
    return Path(source), target


def add(
    root: Path, added: Sequence[tuple[Path, str]] = (), programs: Sequence[Path] = ()
) -> list[str]:
    """Copy ``added``, pairs of a source here and an absolute path in the image, and ``programs``
    with the libraries they load; return the image's paths that were written, without a slash.

    ConfigError if a source is missing.
    """
    written = []
    for program in programs:
        if not program.is_file():
            raise ConfigError(f"--with-program {program}", "no such file")
        for path in (program.absolute(), *libraries_of(program)):
            written += _copy(path, root, str(path))
    for source, target in added:
        if not source.exists():
            raise ConfigError(f"--add {source}:{target}", f"{source}: no such file")
        written += _copy(source, root, target)
    return written


def _copy(source: Path, root: Path, name: str) -> list[str]:
    """Copy a file (through symlinks) or a tree (keeping them), replacing what is there."""
    into = resolve(root, name)
    if not source.is_dir() and (name.endswith("/") or (into is not None and into.is_dir())):
        name = f"{name.rstrip('/')}/{source.name}"
    folder = resolve(root, os.path.dirname(name.rstrip("/")))
    if folder is None:
        raise ConfigError(name, "is below a link of the image that leads nowhere")
    target = folder / os.path.basename(name.rstrip("/")) if name.strip("/") else root
    if source.is_dir():
        if target.is_symlink():  # lib -> usr/lib, say: what it means inside the image
            target = resolve(root, name) or target
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
        inside = [target, *(target / path.relative_to(source) for path in source.rglob("*"))]
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        shutil.copy(source, target)
        inside = [target]
    parents = [parent for parent in target.parents if parent != root and root in parent.parents]
    return [str(path.relative_to(root)) for path in (*parents, *inside) if path != root]


def libraries_of(program: Path) -> list[Path]:
    """Return every library a dynamic ELF program loads, and its interpreter; [] if it is static.

    HostError if a library is missing.
    """
    done = subprocess.run(["ldd", program], capture_output=True, text=True, check=False,
                          env={**os.environ, "LC_ALL": "C"})
    if done.returncode:
        if "not a dynamic executable" in done.stdout + done.stderr:
            return []
        raise HostError(f"ldd {program}: {done.stderr.strip()}")
    if missing := re.findall(r"^\s*(\S+) => not found", done.stdout, re.MULTILINE):
        raise HostError(f"{program} needs {', '.join(missing)}, not found on this machine")
    return [Path(path) for path in re.findall(r"(/\S+) \(0x", done.stdout)]
