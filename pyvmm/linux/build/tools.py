"""The programs and headers that a kernel's build needs, and its environment."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from types import MappingProxyType

from pyvmm.linux.build.progress import BuildError
from pyvmm.linux.host import install_command

# Tool or header -> Debian package.  The kernel's own tools need libc, its objtool libelf.
TOOLS = MappingProxyType({
    "gcc": "gcc", "ld": "binutils", "make": "make", "bc": "bc", "flex": "flex", "bison": "bison",
    "lz4": "lz4", "tar": "tar", "xz": "xz-utils", "stdio.h": "libc6-dev", "libelf.h": "libelf-dev",
})
_KEPT = ("PATH", "HOME", "TMPDIR")
_OUTER_MAKE = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "GNUMAKEFLAGS", "KBUILD_OUTPUT", "O", "ARCH")


def missing_tools() -> list[str]:
    """Return the tools and headers that the build needs and this host lacks."""
    return [
        tool for tool in TOOLS
        if not (_has_header(tool) if tool.endswith(".h") else shutil.which(tool))
    ]


def require_tools() -> None:
    """Raise BuildError, with the command that installs them, if tools are missing."""
    if missing := missing_tools():
        raise BuildError(f"building a kernel needs {', '.join(missing)}; run: "
                         f"{install_command(sorted({TOOLS[tool] for tool in missing}))}")


def _has_header(name: str) -> bool:
    if not shutil.which("gcc"):
        return False
    return subprocess.run(
        ["gcc", "-E", "-x", "c", "-"], input=f"#include <{name}>", text=True,
        capture_output=True, check=False,
    ).returncode == 0


def build_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the part of ``environment`` that a cached build may see, and a fixed locale.

    An outer make's flags, or a CROSS_COMPILE or KCFLAGS left in a shell, would change the kernel.
    """
    return {"LC_ALL": "C"} | {name: environment[name] for name in _KEPT if name in environment}


def tree_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for a build in somebody's tree: CC, LLVM and the like are theirs."""
    return {name: value for name, value in environment.items() if name not in _OUTER_MAKE} | {
        "LC_ALL": "C"
    }


def jobs_of(jobs: int | None) -> int:
    """Return ``jobs``, or the number of CPUs that this process may use."""
    return jobs or len(os.sched_getaffinity(0))


def output_of(*command: str) -> str:
    """Return what ``command`` prints, stripped; "" if it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
