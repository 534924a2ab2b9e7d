"""What another user of this machine might plant, for tests of what must not be believed."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ANOTHER = 54321
"""The number of a user who is neither root nor us."""


def give_away(monkeypatch: pytest.MonkeyPatch, *paths: Path, alone: bool = False) -> None:
    """``paths`` belong to another user from now on; unless ``alone``, all that is in them too."""
    trees = [entry for path in paths for entry in (path, *(() if alone else path.rglob("*")))]
    if os.geteuid() == 0:
        for entry in trees:
            os.chown(entry, ANOTHER, ANOTHER, follow_symlinks=False)
        return
    # Who may not give files away sees these, and no others, as if they had been.
    inodes = {os.lstat(entry).st_ino for entry in trees}
    for name in ("lstat", "fstat", "stat"):
        monkeypatch.setattr(os, name, _seen_as_anothers(getattr(os, name), inodes))


class OtherProcess:
    """A child process of user ``ANOTHER``; see ``as_another_user``."""

    def __init__(self, pid: int, pipe: int) -> None:
        self._pid = pid
        self._pipe = pipe

    def result(self) -> bytes:
        """Wait for the child's end, and return what its function did; its traceback fails."""
        with os.fdopen(self._pipe, "rb") as pipe:
            said = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        assert status == 0, said.decode()
        return said


def as_another_user(function: Callable[[], bytes]) -> OtherProcess:
    """Call ``function`` in a child process of user ``ANOTHER``.  Only root may.

    The child is a fork: another user need not be able to read this Python.
    """
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write_fd)
        return OtherProcess(pid, read_fd)
    status = 1
    try:
        os.setgroups([])
        os.setresgid(ANOTHER, ANOTHER, ANOTHER)
        os.setresuid(ANOTHER, ANOTHER, ANOTHER)
        os.write(write_fd, function())
        status = 0
    except BaseException:
        os.write(write_fd, traceback.format_exc().encode())
    finally:
        os._exit(status)


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
