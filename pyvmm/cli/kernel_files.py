"""``pyvmm kernel fetch`` and ``pyvmm kernel build``: a kernel's files, and how to boot them."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

from pyvmm.cli.first_look import config_cache_path
from pyvmm.errors import ConfigError, HostError
from pyvmm.linux import config as linux_config
from pyvmm.linux import debian, local_kernel
from pyvmm.linux.build import cached, source, tree
from pyvmm.linux.build.options import FRAGMENT
from pyvmm.linux.cache import cache_directory, install
from pyvmm.linux.compression import UnpackError
from pyvmm.linux.config_cache import remember
from pyvmm.linux.kernel_directory import is_source_tree
from pyvmm.linux.stock import StockKernel
from pyvmm.numerals import shown, whole_number
from pyvmm.report import say, show
from pyvmm.startup.mistakes import did_you_mean

MAX_JOBS = 1024


def fetch(args: SimpleNamespace) -> int:
    """Fetch a kernel, print where its files are, and return the exit status."""
    kernel = _fetched(args)
    if args.out is not None:
        kernel = _copied(kernel, Path(args.out))
    with contextlib.suppress(OSError, UnpackError):
        found = linux_config.read(kernel.config)
        for path in (kernel.vmlinuz, kernel.vmlinux):
            if found is not None:
                remember(config_cache_path(path), found)
    version = f"{kernel.version} (Linux {kernel.release})" if kernel.version else kernel.release
    show(f"version    {version}")
    show(f"kernel     {kernel.vmlinuz}")
    show(f"vmlinux    {kernel.vmlinux}")
    show(f"config     {kernel.config}")
    show(f"initramfs  {kernel.initramfs}")
    if kernel.modules is not None:
        show(f"modules    {kernel.modules}")
    if args.out is not None:
        show(f"boot it    pyvmm run --kernel {shlex.quote(args.out)} --disk root.img")
    return 0


def _fetched(args: SimpleNamespace) -> StockKernel:
    cache, given, with_modules = cache_directory(), args.source, args.modules > 0
    if args.backports and given != "debian":
        raise ConfigError("--backports", "is for debian")
    if given == "debian":
        return debian.fetch(
            cache, say, backports=args.backports > 0, version=args.version,
            with_modules=with_modules,
        )
    if given == "ubuntu":
        return debian.fetch_ubuntu(cache, say, version=args.version, with_modules=with_modules)
    path = Path(given)
    if path.is_dir():
        return local_kernel.fetch_tree(
            path, cache, say, release=args.version or "", with_modules=with_modules
        )
    if not path.exists():
        raise ConfigError(
            given, "is neither debian nor ubuntu, nor a file or directory"
            f"{did_you_mean(given, ('debian', 'ubuntu'))} (pyvmm kernel fetch --help)"
        )
    if args.version:
        raise ConfigError("--version", f"is for debian, ubuntu or a directory; {given} is one")
    return local_kernel.fetch_files(path, cache, say, with_modules=with_modules)


def _copied(kernel: StockKernel, out: Path) -> StockKernel:
    """Copy the files of ``kernel`` out of the cache; HostError."""
    if others := sorted(
        path.name for path in out.glob("vmlinuz-*") if path.name != kernel.vmlinuz.name
    ):
        raise ConfigError(
            f"--out {out}", f"has another kernel, {others[0]}; remove it or choose another DIR"
        )
    files = ("vmlinuz", "vmlinux", "config", "initramfs")
    try:
        for name in files:
            source_file: Path = getattr(kernel, name)
            install(source_file, out / source_file.name)
        modules = None
        if kernel.modules is not None:
            modules = out / "lib/modules" / kernel.release
            shutil.copytree(kernel.modules, modules, dirs_exist_ok=True)
    except OSError as error:
        raise HostError(f"{error.filename or out}: {error.strerror}") from error
    return StockKernel(
        release=kernel.release, version=kernel.version, modules=modules,
        **{name: out / getattr(kernel, name).name for name in files},
    )


def build(args: SimpleNamespace) -> int:
    """Build a kernel, print where its files are, and return the exit status."""
    jobs = None
    if args.jobs is not None and (jobs := whole_number(args.jobs, 1, MAX_JOBS)) is None:
        raise ConfigError(f"--jobs {shown(args.jobs)}", f"is not a number from 1 to {MAX_JOBS}")
    fragments = [Path(name).resolve() for name in args.config]
    given = Path(args.source)
    if args.source == "debian" and not given.is_dir():
        found = cached.build([FRAGMENT, *fragments], cached.cache_directory(), None, jobs)
        files = {name: found / name for name in (*cached.ARTEFACTS, "config")}
    elif given.is_dir():
        if not is_source_tree(given):
            raise ConfigError(args.source, "is no kernel tree (no Makefile and arch/x86 in it)")
        files = tree.build_tree(given, fragments, jobs)
    elif given.is_file():
        found = cached.build(
            [FRAGMENT, *fragments], cached.cache_directory(), source.own_source(given), jobs
        )
        files = {name: found / name for name in (*cached.ARTEFACTS, "config")}
    else:
        raise ConfigError(args.source, "is no kernel tree and no tarball (pyvmm kernel build "
                          "--help)")
    bootable = files["bzImage"]
    if args.out is not None:
        try:
            for name, path in files.items():
                install(path, Path(args.out, name))
        except OSError as error:
            raise HostError(f"{error.filename or args.out}: {error.strerror}") from error
        files = {name: Path(args.out, name) for name in files}
        bootable = Path(args.out)
    elif given.is_dir():
        bootable = given
    show(f"kernel     {files['bzImage']}")
    show(f"vmlinux    {files['vmlinux']}")
    show(f"config     {files['config']}")
    show(f"boot it    pyvmm run --kernel {shlex.quote(os.fspath(bootable))} --disk root.img")
    return 0
