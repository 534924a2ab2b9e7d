"""Serving without a machine: one loop on the main thread, until a signal ends it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence

from pyvmm.peers.eventfds import Bell
from pyvmm.run.io_loop import LAST_WAIT_S, IoLoop, IoSource
from pyvmm.run.signals import (
    KICK_SIGNAL,
    NOTICE_SIGNALS,
    REFRESH_SIGNAL,
    KickHandler,
    Signals,
)

WATCH_S = 0.05
"""How often a write that may wait is looked at; it is ended after one to two of these."""


def serve(
    start: Callable[[], Sequence[IoSource]],
    *,
    begun: Callable[[], None] = lambda: None,
    refresh: Callable[[], None],
    hurry: Callable[[float], None],
    bell: Bell,
) -> int:
    """Serve what ``start`` gives on the calling thread, the main one, until a stop signal; its
    number.

    ``start`` is called once signals are taken: whoever sees what it makes may send one.  ``begun``
    is called when nothing can go wrong any more.
    ``refresh`` is called after every REFRESH_SIGNAL.  At the first stop signal ``hurry`` is told
    the time (time.monotonic) until which a source may still wait: from the signal's handler, for
    this thread may be what waits.  A write of ``bell``, which rings for the sources, is ended if it
    waits.
    """
    taken: list[int] = []
    stops: list[int] = []

    def take(number: int) -> None:
        taken.append(number)
        if number not in NOTICE_SIGNALS:
            stops.append(number)
            if len(stops) == 1:
                hurry(time.monotonic() + LAST_WAIT_S)

    with Signals(take, job_control=False) as signals, _BellWatch(bell):

        def look() -> None:
            os.read(signals.wakeup_fd, 4096)  # the handlers have run by now
            while noticed := [number for number in taken if number in NOTICE_SIGNALS]:
                taken.remove(noticed[0])
                if noticed[0] == REFRESH_SIGNAL:
                    refresh()
            if taken:
                loop.stop()

        source = IoSource(signals.wakeup_fd, look, edge_triggered=False)
        loop = IoLoop([*start(), source])
        begun()
        loop.run()
    return taken[0]


class _BellWatch:
    """Ends what ``bell`` writes for the calling thread, by a signal, if it lasts.

    A thread of its own looks, and sleeps for as long as nothing is written.  The signal
    goes only to a write that was under way at two looks: elsewhere it would be for nothing.
    """

    def __init__(self, bell: Bell) -> None:
        self._bell = bell
        self._writer = threading.get_ident()
        self._stopping = False
        self._woken = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bell", daemon=True)

    def _run(self) -> None:
        bell, seen = self._bell, -1
        while not self._stopping:
            turn = bell.turn
            if turn != seen or turn % 2:
                if turn == seen:
                    signal.pthread_kill(self._writer, KICK_SIGNAL)
                seen = turn
                time.sleep(WATCH_S)
                continue
            self._woken.clear()
            bell.wake = self._woken.set
            if bell.turn == seen and not self._stopping:
                self._woken.wait()

    def __enter__(self) -> None:
        KickHandler.begin()
        self._thread.start()

    def __exit__(self, *_exc: object) -> None:
        self._stopping = True
        self._woken.set()
        self._thread.join()
        KickHandler.end()
