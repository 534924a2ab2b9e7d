"""Kernels built from a tarball, kept in the cache by what they are made of.

A second build with the same options, source and compiler takes the first one's result.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pyvmm.linux import trust
from pyvmm.linux.build import tools
from pyvmm.linux.build.options import HERE, line_of, parse_config, read_fragments, refused_options
from pyvmm.linux.build.progress import BuildError, Progress, tell
from pyvmm.linux.build.source import PACKAGE, Source, download_source, find_source, sha256_of
from pyvmm.linux.cache import locked
from pyvmm.startup.types import cache_path

ARTEFACTS = {"bzImage": "arch/x86/boot/bzImage", "vmlinux": "vmlinux"}

# The recipe: part of the cache key, so a change here builds anew.
TINY_CONFIGS = ("kernel/configs/tiny-base.config", "kernel/configs/tiny.config",
                "arch/x86/configs/tiny.config")
MAKE_VARIABLES = ("ARCH=x86_64", "KBUILD_BUILD_USER=pyvmm", "KBUILD_BUILD_HOST=pyvmm",
                  "KBUILD_BUILD_VERSION=1")
MAKE_TARGETS = ("bzImage", "vmlinux")

# More than half of the source: nothing here is read by an x86 build but the Kconfig files.
UNPACK_EXCLUDE = (
    "*/Documentation/*/*", "*/tools/testing/*", "*/arch/[!x]*/*.[chS]", "*/arch/[!x]*/*.dts*",
    *(f"*/{part}/*.[ch]" for part in ("drivers/gpu", "drivers/media", "drivers/staging", "sound",
                                      "drivers/infiniband", "drivers/iio", "drivers/net/ethernet",
                                      "drivers/net/wireless", "drivers/scsi", "drivers/usb")),
)
"""Left out if all options are ours: those of a user may need any of it."""
WORK_BYTES = 1_000_000_000
WHOLE_WORK_BYTES = 2_500_000_000
EXPECTED_STEPS = 1250  # lines an ordinary build prints; only the progress line uses it


def cache_directory() -> Path:
    """Return where built kernels are kept: in pyvmm's cache."""
    return Path(cache_path()) / "kernels"


def cache_key(options: Mapping[str, str], source_version: str, compiler: str) -> str:
    """Return 16 hex digits for all that the kernel depends on.

    Comments and the order of options do not count.
    """
    recipe = [sorted(options.items()), source_version, compiler, TINY_CONFIGS, MAKE_VARIABLES,
              MAKE_TARGETS]
    return sha256_of(repr(recipe).encode())[:16]


def build(
    fragments: Sequence[Path], cache: Path, source: Source | None = None, jobs: int | None = None
) -> Path:
    """Build one kernel unless it is cached; return the directory with bzImage, vmlinux, config."""
    return build_all([fragments], cache, source, jobs)[0]


def build_all(
    variants: Sequence[Sequence[Path]], cache: Path, source: Source | None = None,
    jobs: int | None = None,
) -> list[Path]:
    """Build the kernel of each of ``variants``, lists of fragments, unless it is cached.

    They are built in one tree, one after another, so that the source is unpacked once and what
    their configurations do not change is compiled once.  Racing runs are safe: the first builds
    under a lock, the others wait and take its result.  Without a ``source`` it is Debian's.
    """
    tools.require_tools()
    if re.search(r"[\s:]", str(cache)):
        raise BuildError(f"{cache}: a kernel cannot be built under a path with spaces or colons; "
                         "set PYVMM_CACHE to another directory")
    trust.make_directory(cache)
    source = source or find_source(cache)
    compiler = tools.output_of("gcc", "--version").splitlines()[0]
    recipes = {}
    for fragments in variants:
        options = read_fragments(fragments)
        recipes[cache / cache_key(options, source.version, compiler)] = options
    absent = {done: options for done, options in recipes.items() if not is_complete(done)}
    for done in recipes.keys() - absent.keys():
        tell(f"cached: {done}")
    if absent:
        is_ours = all(path.parent == HERE for fragments in variants for path in fragments)
        with contextlib.ExitStack() as stack:
            # All of them, in one order: nobody waits for a run that waits for him.
            for done in sorted(absent):
                stack.enter_context(locked(done.with_name(f"{done.name}.lock"), tell))
            stack.enter_context(trust.writable_by_us_alone())
            _build_absent(
                {done: options for done, options in absent.items() if not is_complete(done)},
                source, cache, is_ours=is_ours and source.name == PACKAGE, jobs=jobs,
            )
    return list(recipes)


def _build_absent(
    recipes: Mapping[Path, Mapping[str, str]], source: Source, cache: Path, *, is_ours: bool,
    jobs: int | None,
) -> None:
    """Build what is in ``recipes``, whose locks are held: directories and their options."""
    if not recipes:
        return
    for done in recipes:
        # Under the lock, what still carries this name is left over from a killed build.
        for stale in cache.glob(f"{done.name}.work*"):
            shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f"{next(iter(recipes)).name}.work-", dir=cache))
    needed_bytes = WORK_BYTES if is_ours else WHOLE_WORK_BYTES
    try:
        if (free := shutil.disk_usage(cache).free) < needed_bytes:
            raise BuildError(f"{cache}: {free >> 20} MiB free, the build needs "
                             f"{needed_bytes >> 20} MiB for a while")
        tarball = source.tarball or download_source(source.version, cache, work)
        tell(f"building Linux from {source.name} {source.version[:20]}: a few minutes, once")
        for done, options in recipes.items():
            log = cache / f"{done.name}.log"
            log.unlink(missing_ok=True)
            _build_in(work, tarball, options, log, is_ours=is_ours, jobs=jobs)
            shutil.rmtree(done, ignore_errors=True)
            os.rename(work / "result", done)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _build_in(
    work: Path, tarball: Path, options: Mapping[str, str], log: Path, *, is_ours: bool,
    jobs: int | None,
) -> None:
    """Unpack unless another was built there, configure, verify and make under ``work``; leaves
    ``work/result``."""
    tree, result = work / "linux", work / "result"
    environment = tools.build_environment(os.environ)
    # A fixed date: the same source gives the same kernel, whoever builds it and when.
    stamp = time.strftime("%Y-%m-%d", time.gmtime(tarball.stat().st_mtime))
    make = ["make", *MAKE_VARIABLES, f"KBUILD_BUILD_TIMESTAMP={stamp}"]
    with log.open("x") as output:
        progress = Progress(output, environment)
        if not tree.exists():
            tree.mkdir()
            left_out = [f"--exclude={glob}" for glob in UNPACK_EXCLUDE] if is_ours else []
            progress.run("unpacking", ["tar", "-xf", str(tarball), "--strip-components=1",
                                       *left_out], cwd=tree)
            check_tree(tree, tarball)
        configure_tiny(progress, make, tree, options, work / "wanted.config")
        final = (tree / ".config").read_text()
        if refused := refused_options(options, parse_config(final)):
            raise BuildError("the kernel's configuration refused: " + ", ".join(refused)
                             + " (a dependency is missing, or the option does not exist)")
        progress.run("compiling", [*make, f"-j{tools.jobs_of(jobs)}", *MAKE_TARGETS], cwd=tree,
                     steps=EXPECTED_STEPS)
    result.mkdir()
    (result / "config").write_text(final)
    for name, path in ARTEFACTS.items():
        shutil.copyfile(tree / path, result / name)
    os.rename(log, result / "build.log")


def check_tree(tree: Path, given: Path) -> None:
    """Raise BuildError unless ``tree``, which came from ``given``, is a kernel's source."""
    if not (tree / "Makefile").is_file() or not (tree / "arch/x86").is_dir():
        raise BuildError(f"{given}: is no kernel source (no Makefile and arch/x86 in it)")


def configure_tiny(
    progress: Progress, make: Sequence[str], tree: Path, options: Mapping[str, str], wanted: Path
) -> None:
    """Write ``.config`` of ``tree``: tinyconfig with ``options`` over it; ``wanted`` is scratch."""
    tiny = [(tree / name).read_text() for name in TINY_CONFIGS if (tree / name).exists()]
    wanted.write_text("\n".join([*tiny, *(line_of(*option) for option in options.items()), ""]))
    # allnoconfig with these answers is what tinyconfig is, with ours given the last word.
    progress.run("configuring", [*make, f"KCONFIG_ALLCONFIG={wanted}", "allnoconfig"], cwd=tree)


def is_complete(directory: Path) -> bool:
    """Return True if ``directory`` holds a finished build (it appears by one rename).

    HostError if another user could have made it.
    """
    if os.path.lexists(directory):
        trust.check_tree(directory)
    return all((directory / name).exists() for name in ARTEFACTS)
