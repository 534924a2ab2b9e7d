"""Threads that confine themselves before they work, beside those of a run (``run/entrance.py``)."""

from __future__ import annotations

import threading
from collections.abc import Callable

from pyvmm.errors import HostError


class EnteredThread:
    """A daemon thread called ``name`` that calls ``body``.

    ``start(enter)`` has it call ``enter(kind)`` first, which confines the calling thread for good
    (docs/jail.md).  ``wait`` then returns once that is done.
    """

    def __init__(self, name: str, kind: str, body: Callable[[], None]) -> None:
        self._kind = kind
        self._body = body
        self._enter: Callable[[str], None] | None = None
        self._error: BaseException | None = None
        self._has_entered = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self, enter: Callable[[str], None] | None = None) -> None:
        """Start the thread; HostError if this user has none left."""
        self._enter = enter
        try:
            self._thread.start()
        except RuntimeError as error:
            name = self._thread.name
            raise HostError(f"the thread {name!r} cannot be started: {error}") from None

    def wait(self) -> None:
        """Return once the thread is confined; raise what ``enter`` raised."""
        if self._enter is not None:
            self._has_entered.wait()
            if self._error is not None:
                raise self._error

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for its end; nothing to do if it never began."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    @property
    def has_begun(self) -> bool:
        """True once it was started."""
        return self._thread.ident is not None

    @property
    def is_alive(self) -> bool:
        """True from its start to its end."""
        return self._thread.is_alive()

    def _run(self) -> None:
        if self._enter is not None:
            try:
                self._enter(self._kind)
            except BaseException as error:
                self._error = error
                return
            finally:
                self._has_entered.set()
        self._body()
