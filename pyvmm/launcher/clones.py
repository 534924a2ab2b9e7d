"""The processes of a snapshot's clones, and the one that forks them, behind ``VmSnapshot``."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping

from pyvmm.api.arguments import (
    check_files_by_index,
    check_path,
    check_path_or_none,
    check_report,
    check_seconds,
)
from pyvmm.api.config import check_type
from pyvmm.errors import ConfigError, SnapshotError
from pyvmm.launcher.arguments import Arguments
from pyvmm.launcher.session import Session
from pyvmm.launcher.zygote import ForkedProcess, Zygote
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike

CLOCKS = ("keep", "now")


class Clones:
    """The clones of the snapshot in the directory ``path``; see ``VmSnapshot``."""

    def __init__(
        self, path: str | PathLike[str], *,
        disks: Mapping[int, str | PathLike[str]] | None = None,
    ) -> None:
        check_path("path", path)
        if disks is not None:
            check_files_by_index(disks)
        self._path = os.path.abspath(path)
        self._disks = {number: os.fspath(place) for number, place in (disks or {}).items()}
        self._held = held = _Held()
        # Also if nobody closes it, and at the interpreter's end.
        self._close = weakref.finalize(self, held.close)

    @classmethod
    def in_temporary_directory(cls, make: Callable[[str], None]) -> Clones:
        """Have ``make`` write a snapshot to a path and return its clones; ``close`` removes it.

        SnapshotError without a directory for it.
        """
        parent = os.path.abspath(os.environ.get("TMPDIR") or "/var/tmp")
        try:
            place = tempfile.mkdtemp(prefix="pyvmm-snapshot-", dir=parent)
        except OSError as error:
            raise SnapshotError(
                parent, f"has no room for a snapshot: {error.strerror}; TMPDIR names another "
                "directory"
            ) from error
        try:
            make(os.path.join(place, "snapshot"))
            found = cls(os.path.join(place, "snapshot"))
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        found._held.temporary = place
        return found

    @property
    def path(self) -> str:
        """The snapshot's directory."""
        return self._path

    def start(
        self,
        *,
        clock: str,
        timeout_s: float | None,
        console_log: str | PathLike[str] | int | None,
        control: str | PathLike[str] | None,
        report: Callable[[str], None] | None,
    ) -> Session:
        """Start a clone and return its session; see ``VmSnapshot.clone``."""
        check_type("clock", clock, str, "'keep' or 'now'")
        check_seconds("timeout_s", timeout_s)
        if not isinstance(console_log, int):
            check_path_or_none("console_log", console_log)
        check_path_or_none("control", control)
        check_report(report)
        if clock not in CLOCKS:
            raise ConfigError(f"clock {clock!r}", f"is none of {', '.join(CLOCKS)}")
        zygote = self._started()
        with contextlib.closing(Arguments()) as arguments:
            words: list[str | dict[str, object]] = []
            if timeout_s is not None:
                arguments.add("--timeout", repr(float(timeout_s)))
            if control is not None:
                arguments.add("--control", os.path.abspath(control))
            words += [f"--clock={clock}", *arguments.words]
            if console_log is None:
                words.append("--console=none")
            else:
                arguments.add_log(console_log)
                words.append({"fd": 2, "before": "--console=/proc/self/fd/"})
            process = ForkedProcess.start(zygote, words, arguments.fds)
        return Session.over(process, report)

    def close(self) -> None:
        """End the process that makes clones, and remove a temporary directory; idempotent."""
        self._close()

    def _started(self) -> Zygote:
        words = [self._path]
        words += [f"--disk={number}={place}" for number, place in self._disks.items()]
        return self._held.started(words)


class _Held:
    """All that has to be given back: the process that makes clones, a temporary directory."""

    def __init__(self) -> None:
        self.temporary: str | None = None
        self._lock = threading.Lock()
        self._zygote: Zygote | None = None
        self._owner_pid = os.getpid()
        self._is_closed = False

    def started(self, words: list[str]) -> Zygote:
        """Return the process that makes clones; it is started once, with the options ``words``."""
        with self._lock:
            if self._is_closed or os.getpid() != self._owner_pid:
                raise RuntimeError("clone(): the snapshot was closed, or is another process's")
            if self._zygote is None:
                self._zygote = Zygote(words)
            return self._zygote

    def close(self) -> None:
        """Give it back; nothing in a process that was forked from the owner."""
        if os.getpid() != self._owner_pid:
            return
        with self._lock:
            self._is_closed = True
            zygote, self._zygote = self._zygote, None
            temporary, self.temporary = self.temporary, None
        if zygote is not None:
            zygote.close()
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
