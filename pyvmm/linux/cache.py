"""The cache directory, and building a part of it once, however many processes want it."""

from __future__ import annotations

import contextlib
import fcntl
import filecmp
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from pyvmm.errors import HostError
from pyvmm.linux import trust
from pyvmm.startup.types import cache_path

Say = Callable[[str], None]
"""Takes a line for the person who waits."""


def cache_directory() -> Path:
    """Return ``startup.types.cache_path``: ``$PYVMM_CACHE``, or the user's usual cache."""
    return Path(cache_path())


def source_key(*files: str | Path) -> str:
    """Return a short hash of source files: their product changes only when they do."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()[:12]


def build_once(
    cache: Path, name: str, prefix: str, build: Callable[[Path, Say], str], say: Say
) -> Path:
    """Return the newest directory ``prefix*`` in ``cache``; if there is none, ``build`` makes it.

    ``build`` fills an empty directory and returns the end of its name.  Several processes may do
    the same at once: one builds and the rest wait for it.  They share ``name``; ``prefix`` does not
    begin with ``name-building-``.  HostError if the cache cannot be used, or if another user may
    change it (``trust``), and every error of ``build``.
    """
    trust.check_directory(cache)
    if found := _newest(cache, prefix):
        return found
    try:
        trust.make_directory(cache)
        with locked(cache / f"{name}.lock", say), trust.writable_by_us_alone():
            if found := _newest(cache, prefix):
                return found
            # Under the lock, a directory that still has this name is left over from a killed build.
            for stale in cache.glob(f"{name}-building-*"):
                shutil.rmtree(stale, ignore_errors=True)
            work = Path(tempfile.mkdtemp(prefix=f"{name}-building-", dir=cache))
            try:
                # mkdtemp is 0700; a cache shared by PYVMM_CACHE may have other readers.
                work.chmod(0o755)
                target = cache / (prefix + build(work, say))
                work.rename(target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise HostError(f"cannot build the {name} kernel in {cache}: {error}") from error
    return target


def install(source: Path, target: Path) -> None:
    """Copy a file out of the cache, atomically; an identical one is left alone, with its time."""
    if target.exists() and filecmp.cmp(source, target, shallow=False):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with trust.replacing(target) as unfinished:
        shutil.copyfile(source, unfinished)


def _newest(cache: Path, prefix: str) -> Path | None:
    built = sorted(cache.glob(f"{prefix}*"), key=lambda path: path.lstat().st_mtime)
    for found in built:  # each of them, because a planted one may be touched to be any age
        trust.check_tree(found)
    return built[-1] if built else None


@contextlib.contextmanager
def locked(path: Path, say: Say) -> Iterator[None]:
    """Hold an exclusive lock on ``path``; the kernel drops it if we are killed.

    HostError if the file is not one of ours (``trust.open_lock``).
    """
    with os.fdopen(trust.open_lock(path)) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another pyvmm is at it already: waiting for it...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
