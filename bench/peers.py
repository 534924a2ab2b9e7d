"""Who is measured: pyvmm and its peers, as ``peers.toml`` describes them."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench.figures import BenchError

PEERS_FILE = Path(__file__).with_name("peers.toml")
KINDS = ("vmm", "daemon")
PYVMM = Path(sys.executable).with_name("pyvmm")
_PLACEHOLDER = re.compile(r"\{([a-z]+)\}")
_KNOWN = frozenset({"kernel", "memory", "root", "append", "data", "socket", "pyvmm", "disk"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One program in one role; ``lines`` are its command templates by name."""

    name: str
    ours: bool = False
    lines: Mapping[str, str] = field(default_factory=dict)

    def command(self, *parts: str, **values: object) -> list[str]:
        """The argument vector from the templates ``parts``, with each {name} replaced.

        BenchError if the contender lacks one of them, or if its program is not installed.
        """
        words = []
        for part in parts:
            if part not in self.lines:
                raise BenchError(f"{self.name} has no `{part}` in {PEERS_FILE.name}")
            words += shlex.split(self.lines[part])
        values = {"pyvmm": PYVMM, **values}
        filled = [_PLACEHOLDER.sub(lambda found: str(values[found[1]]), word) for word in words]
        if filled and shutil.which(filled[0]) is None:
            raise BenchError(f"{filled[0]} is not installed")
        return filled


def load(path: Path = PEERS_FILE) -> dict[str, tuple[Contender, ...]]:
    """All contenders by kind, ours first; BenchError names what is wrong with the file."""
    try:
        with path.open("rb") as file:
            tables = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise BenchError(f"{path}: {error}") from error
    for kind in tables:
        if kind not in KINDS:
            raise BenchError(f"{path}: {kind}: there are [[vmm]] and [[daemon]]")
    return {kind: _contenders(path, kind, tables.get(kind, [])) for kind in KINDS}


def _contenders(path: Path, kind: str, tables: object) -> tuple[Contender, ...]:
    if not isinstance(tables, list):
        raise BenchError(f"{path}: {kind}: write [[{kind}]], for there may be several")
    found = tuple(_contender(path, kind, table) for table in tables)
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise BenchError(f"{path}: {kind}: two are named {name}")
    if [one.ours for one in found].count(True) != 1:
        raise BenchError(f"{path}: {kind}: exactly one is `ours = true`")
    return tuple(sorted(found, key=lambda one: not one.ours))


def _contender(path: Path, kind: str, table: Mapping[str, object]) -> Contender:
    name, ours = table.get("name"), table.get("ours", False)
    lines = {key: value for key, value in table.items() if key not in ("name", "ours")}
    if not isinstance(name, str) or not name:
        raise BenchError(f"{path}: {kind}: one has no name")
    if not isinstance(ours, bool):
        raise BenchError(f"{path}: {name}: `ours` is true or false")
    if "command" not in lines:
        raise BenchError(f"{path}: {name}: has no command")
    texts: dict[str, str] = {}
    for key, value in lines.items():
        if not isinstance(value, str):
            raise BenchError(f"{path}: {name}: {key}: is not text")
        if unknown := set(_PLACEHOLDER.findall(value)) - _KNOWN:
            raise BenchError(f"{path}: {name}: {key}: nothing is called {{{min(unknown)}}}")
        try:
            shlex.split(value)
        except ValueError as error:
            raise BenchError(f"{path}: {name}: {key}: {error}") from error
        texts[key] = value
    return Contender(name=name, ours=ours, lines=texts)
