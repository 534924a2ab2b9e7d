"""What another user of this machine might plant, for tests of what must not be believed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ANOTHER = 54321
"""The number of a user who is neither root nor us."""


def give_away(monkeypatch: pytest.MonkeyPatch, *paths: Path) -> None:
    """``paths`` belong to another user from now on, all that is in them too."""
    trees = [entry for path in paths for entry in (path, *path.rglob("*"))]
    if os.geteuid() == 0:
        for entry in trees:
            os.chown(entry, ANOTHER, ANOTHER, follow_symlinks=False)
        return
    # Who may not give files away sees these, and no others, as if they had been.
    inodes = {os.lstat(entry).st_ino for entry in trees}
    for name in ("lstat", "fstat", "stat"):
        monkeypatch.setattr(os, name, _seen_as_anothers(getattr(os, name), inodes))


def _seen_as_anothers(
    real: Callable[..., os.stat_result], inodes: set[int]
) -> Callable[..., os.stat_result]:
    def stat(*arguments: Any, **options: Any) -> os.stat_result:
        status = real(*arguments, **options)
        if status.st_ino not in inodes:
            return status
        fields = list(status[:10])
        fields[4] = fields[5] = ANOTHER
        return os.stat_result(fields)

    return stat
