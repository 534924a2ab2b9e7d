"""Serve without a machine: one loop on the main thread, until a signal ends it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence

from pyvmm.peers.eventfds import EventfdWriter
from pyvmm.run.io_loop import LAST_WAIT_S, IoLoop, IoSource
from pyvmm.run.signals import (
    KICK_SIGNAL,
    NOTICE_SIGNALS,
    REFRESH_SIGNAL,
    KickHandler,
    Signals,
)

WATCH_S = 0.05
"""Seconds between two looks at a write; a write that waits is ended after one to two looks."""


def serve(
    start: Callable[[], Sequence[IoSource]],
    *,
    begun: Callable[[], None] = lambda: None,
    refresh: Callable[[], None],
    hurry: Callable[[float], None],
    eventfd_writer: EventfdWriter,
) -> int:
    """Serve the sources from ``start`` until a stop signal; return the signal's number.

    Call it in the main thread, which serves.  ``start`` is called once signals are taken, because
    whoever sees the socket it makes may send one.  ``begun`` is called when nothing can go wrong
    any more, ``refresh`` after every REFRESH_SIGNAL.

    The first stop signal calls ``hurry`` with the time (time.monotonic) until which a source may
    still wait.  The signal's handler makes that call, because the main thread may be waiting in a
    source.  The sources write their eventfds by ``eventfd_writer``; a write that waits is ended.
    """
    taken: list[int] = []
    stops: list[int] = []

    def take(number: int) -> None:
        taken.append(number)
        if number not in NOTICE_SIGNALS:
            stops.append(number)
            if len(stops) == 1:
                hurry(time.monotonic() + LAST_WAIT_S)

    with Signals(take, job_control=False) as signals, _WriteWatch(eventfd_writer):

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


class _WriteWatch:
    """Ends, by a signal, a write of ``eventfd_writer`` in the calling thread that lasts.

    A thread of its own watches, and sleeps for as long as nothing is written.  The thread sends the
    signal only if the same write was under way at two looks.
    """

    def __init__(self, eventfd_writer: EventfdWriter) -> None:
        self._eventfd_writer = eventfd_writer
        self._writing_thread = threading.get_ident()
        self._stopping = False
        self._woken = threading.Event()
        self._thread = threading.Thread(target=self._run, name="eventfd watch", daemon=True)

    def _run(self) -> None:
        eventfd_writer, seen = self._eventfd_writer, -1
        while not self._stopping:
            turn = eventfd_writer.turn
            if turn != seen or turn % 2:
                if turn == seen:
                    signal.pthread_kill(self._writing_thread, KICK_SIGNAL)
                seen = turn
                time.sleep(WATCH_S)
                continue
            self._woken.clear()
            eventfd_writer.wake = self._woken.set
            if eventfd_writer.turn == seen and not self._stopping:
                self._woken.wait()

    def __enter__(self) -> None:
        KickHandler.begin()
        self._thread.start()

    def __exit__(self, *_exc: object) -> None:
        self._stopping = True
        self._woken.set()
        self._thread.join()
        KickHandler.end()
