"""Ringing an eventfd that somebody who is not trusted has, too.

A write to an eventfd whose counter is full waits for a reader, unless O_NONBLOCK is set.  That is
a flag of the open file description: whoever was sent the eventfd can clear it and fill the counter
at any moment, also between a look at it and a write.  Linux has no write that would not wait then
(RWF_NOWAIT is not supported, the file can not be opened anew).  So the write is made where a
signal can end it: ``Bell`` counts its writes, and another thread, which need not be told more, sees
one that lasts (``run/serving.py``).
"""

from __future__ import annotations

import os
from collections.abc import Callable


class Bell:
    """Rings eventfds, for one thread.

    ``turn`` grows by one when a write begins and by one when it ends: it is odd for as long as a
    write is under way.  A watcher that wants to sleep puts into ``wake`` what wakes it up, then
    looks at ``turn`` once more: the next write calls it, once.
    """

    __slots__ = ("turn", "wake")

    def __init__(self) -> None:
        self.turn = 0
        self.wake: Callable[[], None] | None = None

    def ring(self, fd: int) -> bool:
        """Make the eventfd ``fd`` readable, which it also is if it is full.

        False if a signal had to end the write: somebody has made it wait.
        """
        self.turn += 1
        if self.wake is not None:
            wake, self.wake = self.wake, None
            wake()
        try:
            os.eventfd_write(fd, 1)
        except BlockingIOError:
            return True
        except InterruptedError:  # eventfd_write is not retried as PEP 475 has it elsewhere
            return False
        finally:
            self.turn += 1
        return True
