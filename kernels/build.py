#!/usr/bin/env python3
"""Build the guest kernel: Debian's linux-source-6.1, tinyconfig and the options of pyvmm.config.

    python3 kernels/build.py --out build        leaves build/bzImage and build/vmlinux

The result is kept by content in the cache directory ($PYVMM_CACHE, $XDG_CACHE_HOME/pyvmm or
~/.cache/pyvmm), so a second run copies two files.  Needs no root.  Standard library only, and of
pyvmm what needs no more: this runs before there is a virtual environment.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import filecmp
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script: the checkout's pyvmm
from kernels.progress import BuildError, Progress, say
from pyvmm.errors import HostError
from pyvmm.linux import trust
from pyvmm.linux.cache import locked
from pyvmm.startup.types import cache_path

FRAGMENT = Path(__file__).resolve().parent / "pyvmm.config"
PACKAGE = "linux-source-6.1"
TARBALL = Path("/usr/src") / f"{PACKAGE}.tar.xz"
ARTEFACTS = {"bzImage": "arch/x86/boot/bzImage", "vmlinux": "vmlinux"}

# What makes a kernel out of the source; part of the cache key, so a change here builds anew.
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
WORK_BYTES = 1_000_000_000
EXPECTED_STEPS = 1250  # lines an ordinary build prints; only the progress line uses it

# Tool or header -> Debian package.  The kernel's own tools need libc, its objtool libelf.
TOOLS = {
    "gcc": "gcc", "ld": "binutils", "make": "make", "bc": "bc", "flex": "flex", "bison": "bison",
    "lz4": "lz4", "tar": "tar", "xz": "xz-utils", "stdio.h": "libc6-dev", "libelf.h": "libelf-dev",
}
# All that a build sees of the caller's environment: an outer make's flags, or a CROSS_COMPILE or
# KCFLAGS left in a shell, would change what is built.
ENVIRONMENT = ("PATH", "HOME", "TMPDIR")


# ---- the fragment ------------------------------------------------------------------------------


def parse_config(text: str) -> dict[str, str]:
    """Options of a ``.config`` or a fragment: ``{"CONFIG_SMP": "n", "CONFIG_HZ": "100"}``."""
    options = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"(CONFIG_\w+)=(.*)", line):
            options[match[1]] = match[2]
        elif match := re.fullmatch(r"# (CONFIG_\w+) is not set", line):
            options[match[1]] = "n"
    return options


def refused_options(wanted: Mapping[str, str], final: Mapping[str, str]) -> list[str]:
    """Each wanted option that the final configuration does not have, said in one phrase."""
    return [
        f"{name}={value} (became {final.get(name, 'n')})"
        for name, value in wanted.items()
        if final.get(name, "n") != value
    ]


# ---- the source --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A kernel source package: ``tarball`` is None until it is downloaded."""

    version: str
    tarball: Path | None


def find_source(cache: Path) -> Source:
    """The installed package, else one already downloaded, else the one apt would download."""
    trust.check_directory(cache)
    if TARBALL.exists():
        version = _output("dpkg-query", "-W", "-f", "${Version}", PACKAGE)
        return Source(version=version or _sha256(TARBALL), tarball=TARBALL)
    show = _output("apt-cache", "show", "--no-all-versions", PACKAGE) or ""
    if match := re.search(r"^Version: (\S+)$", show, re.MULTILINE):
        downloaded = cache / f"{PACKAGE}_{match[1]}.tar.xz"
        return Source(version=match[1], tarball=_own_file(downloaded))
    if kept := sorted(cache.glob(f"{PACKAGE}_*.tar.xz")):
        version = kept[-1].name.removeprefix(f"{PACKAGE}_").removesuffix(".tar.xz")
        return Source(version=version, tarball=_own_file(kept[-1]))
    raise BuildError(f"no kernel source: {TARBALL} is missing; {_install_hint([PACKAGE])}")


def _own_file(path: Path) -> Path | None:
    """``path`` of the cache, unless it is missing; HostError if another user may have made it."""
    if not os.path.lexists(path):
        return None
    trust.check_file(path)
    return path


def download_source(version: str, cache: Path, work: Path) -> Path:
    """Fetch the package with apt, as any user, and keep its tarball in the cache."""
    say(f"downloading {PACKAGE} {version} (130 MB)")
    scratch = work / "package"
    scratch.mkdir()
    command = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root",
               f"{PACKAGE}={version}"]
    result = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    packages = list(scratch.glob("*.deb"))
    if result.returncode or len(packages) != 1:
        reason = (result.stderr.strip().splitlines() or ["no file"])[-1]
        raise BuildError(f"apt-get download {PACKAGE}: {reason}; {_install_hint([PACKAGE])}")
    subprocess.run(["dpkg-deb", "-x", packages[0], scratch / "x"], check=True)
    target = cache / f"{PACKAGE}_{version}.tar.xz"
    os.replace(scratch / "x/usr/src" / TARBALL.name, target)
    shutil.rmtree(scratch)
    return target


# ---- the build ---------------------------------------------------------------------------------


def cache_key(options: Mapping[str, str], source_version: str, compiler: str) -> str:
    """What the kernel depends on, as 16 hex digits.  Comments and order of options do not count."""
    recipe = [sorted(options.items()), source_version, compiler, TINY_CONFIGS, MAKE_VARIABLES,
              MAKE_TARGETS]
    return _sha256(repr(recipe).encode())[:16]


def build(fragments: Sequence[Path], cache: Path) -> Path:
    """Build one kernel unless it is cached; the directory with bzImage, vmlinux and config."""
    return build_all([fragments], cache)[0]


def build_all(variants: Sequence[Sequence[Path]], cache: Path) -> list[Path]:
    """Build the kernel of each of ``variants``, lists of fragments, unless it is cached.

    They are built in one tree, one after another, so that the source is unpacked once and what
    their configurations do not change is compiled once.  Racing runs are safe: the first builds
    under a lock, the others wait and take its result.
    """
    if missing := missing_tools():
        raise BuildError(f"building a kernel needs {', '.join(missing)}; "
                         f"{_install_hint(sorted({TOOLS[tool] for tool in missing}))}")
    if re.search(r"[\s:]", str(cache)):
        raise BuildError(f"{cache}: a kernel cannot be built under a path with spaces or colons; "
                         "set PYVMM_CACHE to another directory")
    trust.make_directory(cache)
    source = find_source(cache)
    compiler = _output("gcc", "--version").splitlines()[0]
    recipes: dict[Path, dict[str, str]] = {}
    for fragments in variants:
        options: dict[str, str] = {}
        for fragment in fragments:
            options |= parse_config(fragment.read_text())
        recipes[cache / cache_key(options, source.version, compiler)] = options
    absent = {done: options for done, options in recipes.items() if not is_complete(done)}
    for done in recipes.keys() - absent.keys():
        say(f"cached: {done}")
    if absent:
        with contextlib.ExitStack() as stack:
            # All of them, in one order: nobody waits for a run that waits for him.
            for done in sorted(absent):
                stack.enter_context(locked(done.with_name(f"{done.name}.lock"), say))
            stack.enter_context(trust.writable_by_us_alone())
            _build_absent(
                {done: options for done, options in absent.items() if not is_complete(done)},
                source, cache,
            )
    return list(recipes)


def _build_absent(recipes: Mapping[Path, Mapping[str, str]], source: Source, cache: Path) -> None:
    """Build what is in ``recipes``, whose locks are held: directories and their options."""
    if not recipes:
        return
    for done in recipes:
        # Under the lock, what still carries this name is left over from a killed build.
        for stale in cache.glob(f"{done.name}.work*"):
            shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f"{next(iter(recipes)).name}.work-", dir=cache))
    try:
        if (free := shutil.disk_usage(cache).free) < WORK_BYTES:
            raise BuildError(f"{cache}: {free >> 20} MiB free, the build needs "
                             f"{WORK_BYTES >> 20} MiB for a while")
        tarball = source.tarball or download_source(source.version, cache, work)
        say(f"building Linux from {PACKAGE} {source.version}: a few minutes, once")
        for done, options in recipes.items():
            log = cache / f"{done.name}.log"
            log.unlink(missing_ok=True)
            _build_in(work, tarball, options, log)
            shutil.rmtree(done, ignore_errors=True)
            os.rename(work / "result", done)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _build_in(work: Path, tarball: Path, options: Mapping[str, str], log: Path) -> None:
    """Unpack unless another was built there, configure, verify and make under ``work``; leaves
    ``work/result``."""
    tree, result = work / "linux", work / "result"
    jobs = f"-j{len(os.sched_getaffinity(0))}"
    environment = build_environment(os.environ)
    # A fixed date: the same source gives the same kernel, whoever builds it and when.
    stamp = time.strftime("%Y-%m-%d", time.gmtime(tarball.stat().st_mtime))
    make = ["make", *MAKE_VARIABLES, f"KBUILD_BUILD_TIMESTAMP={stamp}"]
    with log.open("x") as output:
        progress = Progress(output, environment)
        if not tree.exists():
            tree.mkdir()
            progress.run("unpacking", ["tar", "-xJf", str(tarball), "--strip-components=1",
                                       *(f"--exclude={glob}" for glob in UNPACK_EXCLUDE)], cwd=tree)
        wanted = work / "wanted.config"
        wanted.write_text("\n".join([*((tree / name).read_text() for name in TINY_CONFIGS),
                                     *(line_of(*option) for option in options.items())]))
        # allnoconfig with these answers is what tinyconfig is, with ours given the last word.
        progress.run("configuring", [*make, f"KCONFIG_ALLCONFIG={wanted}", "allnoconfig"], cwd=tree)
        final = (tree / ".config").read_text()
        if refused := refused_options(options, parse_config(final)):
            raise BuildError("the kernel's configuration refused: " + ", ".join(refused)
                             + " (a dependency is missing, or the option does not exist)")
        progress.run("compiling", [*make, jobs, *MAKE_TARGETS], cwd=tree, steps=EXPECTED_STEPS)
    result.mkdir()
    (result / "config").write_text(final)
    for name, path in ARTEFACTS.items():
        shutil.copyfile(tree / path, result / name)
    os.rename(log, result / "build.log")


def line_of(name: str, value: str) -> str:
    """An option as a ``.config`` spells it."""
    return f"# {name} is not set" if value == "n" else f"{name}={value}"


def build_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of ``environment`` that a build may see, and a fixed locale."""
    return {"LC_ALL": "C"} | {k: environment[k] for k in ENVIRONMENT if k in environment}


def is_complete(directory: Path) -> bool:
    """Whether ``directory`` holds a finished build (it appears by one rename).

    HostError if another user could have made it.
    """
    if os.path.lexists(directory):
        trust.check_tree(directory)
    return all((directory / name).exists() for name in ARTEFACTS)


# ---- small things ------------------------------------------------------------------------------


def missing_tools() -> list[str]:
    """The tools and headers that the build needs and this machine lacks."""
    return [tool for tool in TOOLS if not (_has_header(tool) if tool.endswith(".h")
                                           else shutil.which(tool))]


def _has_header(name: str) -> bool:
    if not shutil.which("gcc"):
        return False
    return subprocess.run(["gcc", "-E", "-x", "c", "-"], input=f"#include <{name}>", text=True,
                          capture_output=True, check=False).returncode == 0


def missing_packages(cache: Path) -> list[str]:
    """Debian packages to install before ``build`` can work."""
    packages = {TOOLS[tool] for tool in missing_tools()}
    if not TARBALL.exists() and not list(cache.glob(f"{PACKAGE}_*.tar.xz")):
        packages.add(PACKAGE)
    return sorted(packages)


def cache_directory() -> Path:
    """Where built kernels are kept: in pyvmm's cache, outside the tree."""
    return Path(cache_path()) / "kernels"


def install(source: Path, target: Path) -> None:
    """Copy atomically; an identical file is left alone, with its time."""
    if target.exists() and filecmp.cmp(source, target, shallow=False):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with trust.replacing(target) as unfinished:
        shutil.copyfile(source, unfinished)


def _install_hint(packages: Sequence[str]) -> str:
    sudo = "" if os.geteuid() == 0 else "sudo "
    return f"run: {sudo}apt-get install -y --no-install-recommends {' '.join(packages)}"


def _output(*command: str) -> str:
    """What ``command`` prints, stripped; empty when it fails or does not exist."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def _sha256(data: bytes | Path) -> str:
    if isinstance(data, Path):
        with data.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(data).hexdigest()


def _stop(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(description="Build the guest kernel, once.")
    parser.add_argument("--out", type=Path, default=Path("build"), metavar="DIR",
                        help="where bzImage and vmlinux go (default: build)")
    parser.add_argument("--fragment", type=Path, action="append", default=[], metavar="FILE",
                        help="further options over pyvmm.config; repeatable, the last one wins")
    parser.add_argument("--variant", nargs=2, type=Path, action="append", default=[],
                        metavar=("FILE", "DIR"),
                        help="build also, in the same tree, the kernel with FILE's options over "
                             "these, into DIR; repeatable")
    parser.add_argument("--missing", action="store_true",
                        help="print the Debian packages that are needed and missing, and end")
    options = parser.parse_args(arguments)
    cache = cache_directory()
    if options.missing:
        print(*missing_packages(cache))
        return 0
    signal.signal(signal.SIGTERM, _stop)
    try:
        fragments = [FRAGMENT, *options.fragment]
        kernels = {options.out: fragments}
        kernels |= {out: [*fragments, fragment] for fragment, out in options.variant}
        for done, out in zip(build_all(list(kernels.values()), cache), kernels, strict=True):
            for name in ARTEFACTS:
                install(done / name, out / name)
    except KeyboardInterrupt:
        return 130
    except (BuildError, HostError, OSError, subprocess.CalledProcessError) as error:
        print(f"kernels/build.py: {error}", file=sys.stderr)
        return 1
    for out in kernels:
        say(f"{out / 'bzImage'} and {out / 'vmlinux'} are ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
