#!/usr/bin/env python3
"""Build the agent's program, static and the same byte for byte wherever the tools are the same.

    python3 guest/agent/build.py                   # into pyvmm/agent/, with what built it
    python3 guest/agent/build.py --out build/agent

Needs musl-tools and gcc.  Standard library only.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = tuple(sorted(HERE.glob("*.c")))
"""In one order everywhere: the linker keeps it."""
PACKAGE = HERE.parents[1] / "pyvmm" / "agent"
COMPILER = "musl-gcc"
WARNINGS = ("-std=gnu11", "-Wall", "-Wextra", "-Werror")
FLAGS = (*WARNINGS, "-Os", "-static", "-no-pie", "-fno-pie", "-s", "-Wl,--build-id=none")
"""No flag, and nothing in the source, brings in a path or a time."""
LOADER = "/lib/ld-musl-x86_64.so.1"
"""musl's own, which says its version."""


class BuildError(Exception):
    """One line for the user."""


def build(out: Path) -> None:
    """Compile the agent into ``out``, mode 0755; BuildError says what is missing or wrong."""
    out.parent.mkdir(parents=True, exist_ok=True)
    _run([COMPILER, *FLAGS, "-o", str(out), *map(str, SOURCES)])
    out.chmod(0o755)


def tool_versions() -> list[str]:
    """Return the versions on which the program's bytes depend: compiler, linker, C library."""
    versions = [_run([tool, "--version"]).stdout.splitlines()[0] for tool in ("gcc", "ld")]
    # It exits with status 1, because it is given no program.
    loader = subprocess.run([LOADER], capture_output=True, text=True, check=False)
    lines = loader.stderr.splitlines()
    if len(lines) < 2 or not lines[1].startswith("Version "):
        raise BuildError(f"{LOADER}: says no version of musl")
    return [*versions, f"musl {lines[1].removeprefix('Version ')}"]


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        raise BuildError(f"{command[0]} is missing; install Debian's musl-tools and gcc")
    # Only these: REALGCC, CPATH and the like would make another program.
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return an exit status."""
    parser = argparse.ArgumentParser(description="Build the agent's program.")
    parser.add_argument("--out", type=Path, default=PACKAGE / "pyvmm-agent", metavar="FILE",
                        help="default: %(default)s")
    out: Path = parser.parse_args(arguments).out
    try:
        build(out)
        record = "".join(f"{line}\n" for line in tool_versions())
        out.with_name(f"{out.name}.built-with").write_text(record)
    except BuildError as error:
        print(f"build: {error}", file=sys.stderr)
        return 1
    print(f"{out}: {out.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
