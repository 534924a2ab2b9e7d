#!/usr/bin/env python3
"""Build the guest kernel for this checkout: Debian's linux-source-6.1 and our options.

    python3 kernels/build.py --out build        leaves build/bzImage and build/vmlinux

The code is ``pyvmm/linux/build``, with the fragments of configuration; ``pyvmm kernel build`` is
its other caller.  This one runs before there is a virtual environment, and can build variants.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script: the checkout's pyvmm
from pyvmm.errors import PyvmmError
from pyvmm.linux.build import source, tools
from pyvmm.linux.build.cached import ARTEFACTS, build_all, cache_directory
from pyvmm.linux.build.options import FRAGMENT
from pyvmm.linux.build.progress import tell
from pyvmm.linux.cache import install


def missing_packages(cache: Path) -> list[str]:
    """Debian packages to install before the kernel can be built."""
    packages = {tools.TOOLS[tool] for tool in tools.missing_tools()}
    if not source.TARBALL.exists() and not list(cache.glob(f"{source.PACKAGE}_*.tar.xz")):
        packages.add(source.PACKAGE)
    return sorted(packages)


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
        fragments = [FRAGMENT, *(path.resolve() for path in options.fragment)]
        kernels = {options.out: fragments}
        kernels |= {out: [*fragments, fragment.resolve()] for fragment, out in options.variant}
        for done, out in zip(build_all(list(kernels.values()), cache), kernels, strict=True):
            for name in ARTEFACTS:
                install(done / name, out / name)
    except KeyboardInterrupt:
        return 130
    except (PyvmmError, OSError, subprocess.CalledProcessError) as error:
        print(f"kernels/build.py: {error}", file=sys.stderr)
        return 1
    for out in kernels:
        tell(f"{out / 'bzImage'} and {out / 'vmlinux'} are ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
