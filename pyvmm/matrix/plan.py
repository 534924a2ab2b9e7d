"""Read the file of a matrix into a ``Plan``: its axes with their entries, and its exceptions."""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pyvmm.config import MAX_CPUS, AnyDiskConfig, format_size
from pyvmm.errors import ConfigError
from pyvmm.launcher.limits import boot_timeout_s
from pyvmm.matrix.entries import (
    MAX_S,
    DiskEntry,
    Files,
    KernelEntry,
    read_append,
    read_command,
    read_disk,
    read_fail_on,
    read_kernel,
)
from pyvmm.matrix.runs import AXES, Order
from pyvmm.matrix.toml_table import Table, check_name, quoted
from pyvmm.numerals import size_in_bytes
from pyvmm.startup.mistakes import did_you_mean
from pyvmm.startup.types import Record
from pyvmm.testing.boot_test import TIMEOUT_S
from pyvmm.testing.fail_on import FAIL_ON
from pyvmm.x86 import layout

MAX_FILE_BYTES = 1 << 20
AGENTS = ("inject", "image")
DEFAULT_MEMORY = "256M"
_Value = TypeVar("_Value", str, int)
TOP_KEYS = ("kernels", "disks", "commands", "memory", "cpus", "append", "agent", "timeout",
        "boot-timeout", "fail-on", "no-fail-on", "allow", "include", "exclude")


class Plan(Record):
    """A matrix as its file has it.

    ``kernels``, ``disks`` and ``commands`` are pairs of a name and an entry.  Each of ``excludes``
    maps axes to the names of entries; runs with all of them are left out.  ``includes`` are more
    runs: the names of their entries on all axes, and the run's name, which may be "".
    """

    file: str
    kernels: tuple[tuple[str, KernelEntry], ...]
    disks: tuple[tuple[str, DiskEntry], ...]
    memories: tuple[str, ...]
    cpus: tuple[int, ...]
    commands: tuple[tuple[str, Order], ...]
    append: str = ""
    agent: str = "inject"
    excludes: tuple[tuple[tuple[str, str], ...], ...] = ()
    includes: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def entries(self, axis: str) -> tuple[str, ...]:
        """Return the names of the entries of ``axis``, in the file's order."""
        match axis:
            case "memory":
                return self.memories
            case "cpus":
                return tuple(map(str, self.cpus))
        pairs: tuple[tuple[str, object], ...] = {
            "kernel": self.kernels, "disk": self.disks, "command": self.commands,
        }[axis]
        return tuple(name for name, _ in pairs)


def read_plan(path: str, parse_disk: Callable[[str], AnyDiskConfig]) -> Plan:
    """Return the matrix in the file ``path``; ConfigError names file, key and limit.

    ``parse_disk`` reads a disk as the command line has it.
    """
    top = Table(path, "", _parsed(path))
    top.only(TOP_KEYS)
    files = Files(folder=os.path.dirname(os.path.abspath(path)), parse_disk=parse_disk)
    defaults = Order(
        argv=(),
        fail_on=read_fail_on(top, FAIL_ON),
        timeout_s=top.seconds("timeout", TIMEOUT_S, MAX_S),
        boot_timeout_s=top.seconds("boot-timeout", boot_timeout_s(), MAX_S),
    )
    kernels, disks, commands = (top.table(key) for key in ("kernels", "disks", "commands"))
    for key, table, example in (
        ("kernels", kernels, 'mine = "bzImage"'), ("commands", commands, 'version = ["uname"]'),
    ):
        if not table.names:
            top.fail(key, f"has no entry, so the matrix is empty; write [{key}] and {example}")
    for table in (kernels, disks, commands):
        for name in table.names:
            if name in TOP_KEYS:
                table.fail(name, "for all runs stands above the first [table]; no entry has "
                           "this name")
            check_name(table, name)
    plan = Plan(
        file=path,
        kernels=tuple((name, read_kernel(kernels, name, files)) for name in kernels.names),
        disks=tuple((name, read_disk(disks, name, files)) for name in disks.names),
        memories=_memories(top),
        cpus=_once(top, "cpus", top.numbers("cpus", (1,), MAX_CPUS)),
        commands=tuple(
            (name, read_command(commands, name, files, defaults)) for name in commands.names
        ),
        append=read_append(top),
        agent=top.choice("agent", AGENTS, "inject"),
    )
    return plan.replace(
        excludes=tuple(_exclude(table, plan) for table in top.tables("exclude")),
        includes=tuple(_include(table, plan) for table in top.tables("include")),
    )


def check_memory(table: Table, key: str, text: str) -> str:
    """Return ``text``, a size of memory a guest may have, as ``512M``."""
    least, most = layout.MIN_MEMORY, layout.MAX_MEMORY
    size = size_in_bytes(text, most)
    if size is None or size < least or text.isdigit():
        unit = f'; write "{text}M"' if text.isdigit() else ""
        table.fail(key, f"{quoted(text)} is no size from {format_size(least)} to "
                   f"{format_size(most)}, such as \"512M\"{unit}")
    return text


def _parsed(path: str) -> dict[str, Any]:
    """Return the file's TOML."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ConfigError(path, "is not a file")
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(path, f"cannot be read: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(path, f"is over {format_size(MAX_FILE_BYTES)}, the limit of a matrix")
    try:
        return tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(path, f"is not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise ConfigError(path, "is no TOML: it is nested too deeply") from error
    except ValueError as error:
        raise ConfigError(path, f"is no TOML: {error}") from error


def _memories(top: Table) -> tuple[str, ...]:
    if "memory" not in top:
        return (DEFAULT_MEMORY,)
    given = top["memory"]
    for one in given if isinstance(given, list) else (given,):
        if type(one) is int:
            check_memory(top, "memory", str(one))  # it tells of the missing unit
    texts = top.texts("memory")
    return _once(top, "memory", tuple(check_memory(top, "memory", text) for text in texts))


def _once(top: Table, key: str, values: tuple[_Value, ...]) -> tuple[_Value, ...]:
    """Return ``values``, each of which makes a run's name."""
    if not values:
        top.fail(key, "is an empty list, so the matrix is empty")
    for at, value in enumerate(values):
        if value in values[:at]:
            top.fail(key, f"has {quoted(value)} twice")
    return values


def _exclude(table: Table, plan: Plan) -> tuple[tuple[str, str], ...]:
    table.only(AXES)
    if not table.names:
        table.fail("", "is empty: it would leave out every run")
    return tuple((axis, _entry(table, axis, plan)) for axis in table.names)


def _include(table: Table, plan: Plan) -> tuple[str, tuple[str, ...]]:
    table.only((*AXES, "name"))
    name = table.text("name")
    if name:
        check_name(table, name)
    return name, tuple(_included(table, axis, plan) for axis in AXES)


def _included(table: Table, axis: str, plan: Plan) -> str:
    """Return the entry of an included run on ``axis``; the only one need not be named."""
    entries = plan.entries(axis)
    if axis not in table:
        if len(entries) > 1:
            table.fail(axis, f"is missing: name one of {', '.join(entries)}")
        return entries[0] if entries else ""
    if axis == "memory":
        return check_memory(table, axis, table.text(axis))
    if axis == "cpus":
        return str(table.numbers(axis, (), MAX_CPUS)[0])
    return _entry(table, axis, plan)


def _entry(table: Table, axis: str, plan: Plan) -> str:
    """Return the name at ``axis`` of one of the plan's entries there."""
    value = table[axis]
    text = str(value) if axis == "cpus" and type(value) is int else table.text(axis)
    entries = plan.entries(axis)
    if text not in entries:
        there = f"; there are {', '.join(entries)}" if entries else "; there are none"
        table.fail(axis, f"{quoted(text)} is not among the file's entries"
                   f"{did_you_mean(text, entries) or there}")
    return text
