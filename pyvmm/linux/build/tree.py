"""A kernel tree of the user's: is it one, which kernel is built in it, and building it there.

The build is the tree's own: a second one compiles what has changed.  A ``.config`` that is there
keeps its options, and gets only what a guest of pyvmm needs.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pyvmm.errors import ConfigError
from pyvmm.linux.build import tools
from pyvmm.linux.build.cached import (
    ARTEFACTS,
    EXPECTED_STEPS,
    MAKE_TARGETS,
    configure_tiny,
)
from pyvmm.linux.build.options import (
    FRAGMENT,
    NEEDS,
    line_of,
    parse_config,
    read_fragment,
    read_fragments,
    refused_options,
)
from pyvmm.linux.build.progress import BuildError, Progress, tell

LOG = ".pyvmm-build.log"
BEFORE = ".config.before-pyvmm"
"""A copy of the configuration that was there: git ignores both names in a kernel's tree."""


def build_tree(tree: Path, fragments: Sequence[Path], jobs: int | None = None) -> dict[str, Path]:
    """Configure and make the kernel in ``tree``; return bzImage, vmlinux and config by name.

    ConfigError if an option of ``fragments`` does not survive, BuildError if the build fails.
    """
    tools.require_tools()
    if not os.access(tree, os.W_OK):
        raise ConfigError(str(tree), "cannot be written; copy the tree, or pack it into a tarball")
    wanted = read_fragments(fragments)
    make = ["make", "ARCH=x86_64"]
    with (tree / LOG).open("w") as log:
        progress = Progress(log, tools.tree_environment(os.environ))
        _configure(progress, make, tree, wanted)
        progress.run("compiling", [*make, f"-j{tools.jobs_of(jobs)}", *MAKE_TARGETS], cwd=tree,
                     steps=EXPECTED_STEPS)
    (tree / LOG).unlink()
    return {name: tree / path for name, path in ARTEFACTS.items()} | {"config": tree / ".config"}


def _configure(
    progress: Progress, make: Sequence[str], tree: Path, wanted: dict[str, str]
) -> None:
    config = tree / ".config"
    if config.exists():
        ours = read_fragment(NEEDS)
        before = parse_config(config.read_text("utf-8", "replace"))
        if not refused_options(ours | wanted, before):
            return
        shutil.copyfile(config, tree / BEFORE)
        tell(f"{config} gets what a guest of pyvmm needs (it was: {tree / BEFORE})")
        merged = before | ours | wanted
        config.write_text("".join(f"{line_of(*option)}\n" for option in merged.items()))
        progress.run("configuring", [*make, "olddefconfig"], cwd=tree)
    else:
        ours = read_fragment(FRAGMENT)
        tell(f"{tree} has no .config: tinyconfig, with pyvmm's options over it")
        with tempfile.TemporaryDirectory(prefix="pyvmm-config-") as scratch:
            configure_tiny(progress, make, tree, ours | wanted, Path(scratch) / "wanted.config")
    final = parse_config(config.read_text("utf-8", "replace"))
    if refused := refused_options(wanted, final):
        raise BuildError("the kernel's configuration refused: " + ", ".join(refused)
                         + " (a dependency is missing, or the option does not exist)")
    # Another Linux than the one that ours is written for lacks some: `run` names what it misses.
    if left_out := refused_options(
        {name: value for name, value in ours.items() if name not in wanted}, final
    ):
        tell(f"this Linux does not take: {', '.join(left_out)}")
