"""The entrance of a jailed run: no vCPU enters the guest before every thread is confined."""

from __future__ import annotations

import threading
from collections.abc import Callable

from pyvmm.errors import HostError


class Entrance:
    """Confines ``threads`` threads, each by its own call of ``let_in``, and holds the vCPUs.

    ``enter(kind)`` confines the calling thread for good; HostError if the host refuses.
    ``refused`` then takes the error, and the run must end: no thread comes in.
    """

    def __init__(
        self, enter: Callable[[str], None], threads: int, refused: Callable[[HostError], None]
    ) -> None:
        self._enter = enter
        self._missing = threads
        self._refused = refused
        self._lock = threading.Lock()
        self._is_open = False
        self._news = threading.Event()
        """All threads are confined, or nobody need wait any more."""

    def let_in(self, kind: str, *, waits: bool = False) -> bool:
        """Confine the calling thread as ``kind``; return True if it may do its work.

        With ``waits`` return only once every thread of the run is confined: for a vCPU.
        """
        try:
            self._enter(kind)
        except HostError as error:
            self._refused(error)
            return False
        with self._lock:
            self._missing -= 1
            if not self._missing:
                self._is_open = True
                self._news.set()
        if waits:
            self._news.wait()
            return self._is_open
        return True

    def close(self) -> None:
        """Let nobody wait any more: the run has ended.  Idempotent."""
        self._news.set()
