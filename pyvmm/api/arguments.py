"""The types of what a script gives to calls about snapshots: a TypeError names the argument."""

from __future__ import annotations

import os
from collections.abc import Mapping

from pyvmm.api.config import check_type


def check_path(name: str, path: object) -> None:
    """Raise TypeError unless ``path`` is a text or an object with one; bytes are none."""
    check_type(name, path, (str, os.PathLike), "a path")
    if not isinstance(os.fspath(path), str):  # type: ignore[call-overload]
        raise TypeError(f"{name} must be a path of text, not one of bytes")


def check_path_or_none(name: str, path: object) -> None:
    """Raise TypeError unless ``path`` is None or a path."""
    check_type(name, path, (str, os.PathLike, type(None)), "a path or None")
    if path is not None:
        check_path(name, path)


def check_flag(name: str, flag: object) -> None:
    """Raise TypeError unless ``flag`` is a bool: a text as "no" would count as True."""
    if not isinstance(flag, bool):
        raise TypeError(f"{name} must be True or False, not {type(flag).__name__}")


def check_checkpoint(number: object) -> None:
    """Raise TypeError unless ``number`` may be that of a checkpoint."""
    check_type("number", number, (int, type(None)), "the number of a checkpoint or None")


def check_seconds(name: str, seconds: object) -> None:
    """Raise TypeError unless ``seconds`` is a number or None."""
    check_type(name, seconds, (int, float, type(None)), "seconds or None")


def check_report(report: object) -> None:
    """Raise TypeError unless ``report`` can be called, or is None."""
    if report is not None and not callable(report):
        raise TypeError(f"report must be a function of a text, not {type(report).__name__}")


def check_by_index(disks: object) -> None:
    """Raise TypeError unless ``disks`` has something by the indices of disks."""
    if not isinstance(disks, Mapping):
        raise TypeError(
            f'disks are by index from 0, {{0: "root.img"}}, not {type(disks).__name__}'
        )
    for index in disks:
        check_type("the index of a disk", index, int, "int")


def check_files_by_index(disks: object) -> None:
    """Raise TypeError unless ``disks`` has paths by the indices of disks."""
    check_by_index(disks)
    assert isinstance(disks, Mapping)
    for index, path in disks.items():
        check_path(f"disks[{index}]", path)
