"""``@pytest.mark.pyvmm(...)``: its arguments, checked, and those of several markers together."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

import pytest

MARKER = "pyvmm"
SCOPES = ("function", "module", "session")
AGENT_WAYS = ("none", "image", "inject")

Problem = str


def _path(value: object) -> Problem:
    return "" if isinstance(value, (str, os.PathLike)) and value else "a path"


def _path_or_paths(value: object) -> Problem:
    if isinstance(value, (list, tuple)) and value:
        return _path_or_paths(value[0]) if len(value) == 1 else (
            "" if not any(map(_path, value)) else "a path or a list of paths"
        )
    return _path(value) and "a path or a list of paths"


def _disks(value: object) -> Problem:
    if isinstance(value, (bytes, Mapping, bool, int, float)) or value is None:
        return "a disk (a path, or one of pyvmm's) or a list of disks"
    return ""


def _memory(value: object) -> Problem:
    good = isinstance(value, (str, int)) and not isinstance(value, bool)
    return "" if good else "a text as '512M' or bytes"


def _count(value: object) -> Problem:
    good = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return "" if good else "a whole number from 1 on"


def _seconds(value: object) -> Problem:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
    return "" if good else "seconds, more than 0"


def _text(value: object) -> Problem:
    return "" if isinstance(value, str) else "a text"


def _flag(value: object) -> Problem:
    return "" if isinstance(value, bool) else "True or False"


def _agent(value: object) -> Problem:
    good = isinstance(value, bool) or value in AGENT_WAYS
    return "" if good else f"True, False or one of {', '.join(AGENT_WAYS)}"


def _fail_on(value: object) -> Problem:
    from pyvmm.testing.fail_on import FailOn

    good = isinstance(value, FailOn)
    return "" if good else "a pyvmm.FailOn, as pyvmm.FAIL_ON.without('warning')"


def _scope(value: object) -> Problem:
    return "" if value in SCOPES else f"one of {', '.join(SCOPES)}"


ARGUMENTS: dict[str, Callable[[object], Problem]] = {
    "kernel": _path_or_paths,
    "disk": _disks,
    "disks": _disks,
    "initrd": _path,
    "memory": _memory,
    "cpus": _count,
    "cpu": _text,
    "append": _text,
    "cmdline": _text,
    "timeout": _seconds,
    "boot_timeout": _seconds,
    "agent": _agent,
    "fail_on": _fail_on,
    "scope": _scope,
    "may_end": _flag,
    "mmio": _text,
    "serve": _text,
    "rtc": _text,
    "discovery": _text,
}
"""By name, a function that returns "", or what the argument must be.

docs/pytest.md has the meaning of each.
"""
OF_ONE_BOOT = tuple(name for name in ARGUMENTS if name != "scope")
"""The arguments of ``pyvmm_boot``."""


class ArgumentsError(ValueError):
    """An argument is unknown or has a value that cannot be; the text names it."""


def checked(
    call: str, arguments: Mapping[str, object], known: Iterable[str] = ARGUMENTS
) -> dict[str, object]:
    """Return ``arguments`` of ``call``, ``disk`` renamed to ``disks``; ArgumentsError."""
    known = tuple(known)
    for name, value in arguments.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ArgumentsError(
                f"{call}: there is no argument {name!r}{meant} (it takes {', '.join(known)})"
            )
        if problem := ARGUMENTS[name](value):
            raise ArgumentsError(f"{call}: {name} must be {problem}, not {value!r}")
    if "disk" in arguments and "disks" in arguments:
        raise ArgumentsError(f"{call}: disk and disks are the same; give one of them")
    found = {name: value for name, value in arguments.items() if name != "disk"}
    if "disk" in arguments:
        found["disks"] = arguments["disk"]
    if "disks" in found:
        found["disks"] = _as_list(found["disks"])
    return found


def _as_list(disks: object) -> list[object]:
    if isinstance(disks, Sequence) and not isinstance(disks, str):
        return list(disks)
    return [disks]


def arguments_of(node: pytest.Item | pytest.Collector) -> dict[str, object]:
    """Return the arguments of all markers on ``node`` and around it: the nearest one counts.

    ArgumentsError names the test and the argument.
    """
    merged: dict[str, object] = {}
    for mark in node.iter_markers(MARKER):
        if mark.args:
            raise ArgumentsError(
                f"{node.nodeid}: @pytest.mark.pyvmm takes named arguments only, not "
                f"{mark.args[0]!r}; write kernel=..., disk=..."
            )
        own = checked(f"{node.nodeid}: @pytest.mark.pyvmm", mark.kwargs)
        merged = {**own, **merged}
    return merged
