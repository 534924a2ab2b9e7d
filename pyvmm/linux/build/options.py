"""Options of a kernel's configuration: fragments, and what became of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pyvmm.errors import ConfigError

HERE = Path(__file__).resolve().parent
FRAGMENT = HERE / "pyvmm.config"
"""All of our own kernel, over tinyconfig."""
NEEDS = HERE / "needs.config"
"""The options that pyvmm needs of a kernel whose configuration is somebody else's."""


def parse_config(text: str) -> dict[str, str]:
    """Return the options of a ``.config`` or a fragment: ``{"CONFIG_SMP": "n", ...}``."""
    options = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"(CONFIG_\w+)=(.*)", line):
            options[match[1]] = match[2]
        elif match := re.fullmatch(r"# (CONFIG_\w+) is not set", line):
            options[match[1]] = "n"
    return options


def read_fragment(path: Path) -> dict[str, str]:
    """Return the options in the file ``path``; ConfigError if it cannot be read or has none."""
    try:
        options = parse_config(path.read_text("utf-8", "replace"))
    except OSError as error:
        raise ConfigError(str(path), str(error.strerror)) from error
    if not options:
        raise ConfigError(
            str(path), "has no option; write lines such as CONFIG_XFS_FS=y or "
            "# CONFIG_NET is not set"
        )
    return options


def read_fragments(paths: Sequence[Path]) -> dict[str, str]:
    """Return the options of all ``paths``; of two values the later one counts."""
    options: dict[str, str] = {}
    for path in paths:
        options |= read_fragment(path)
    return options


def refused_options(wanted: Mapping[str, str], final: Mapping[str, str]) -> list[str]:
    """Return a phrase for each wanted option that the final configuration does not have."""
    return [
        f"{name}={value} (became {final.get(name, 'n')})"
        for name, value in wanted.items()
        if final.get(name, "n") != value
    ]


def line_of(name: str, value: str) -> str:
    """Return an option as a ``.config`` spells it."""
    return f"# {name} is not set" if value == "n" else f"{name}={value}"
