"""Writing to an eventfd that somebody who is not trusted has, too.

A write to an eventfd whose counter is full waits for a reader, unless O_NONBLOCK is set.  That flag
belongs to the open file description.  So whoever was sent the eventfd can clear the flag and fill
the counter at any moment, also between our look at the flag and our write.  Linux has no write that
would not wait then: RWF_NOWAIT is not supported, and the file cannot be opened anew.

So a signal must be able to end the write.  ``EventfdWriter`` counts its writes; another thread
watches the count and ends a write that lasts (``run/serving.py``).
"""

from __future__ import annotations

import os
from collections.abc import Callable


class EventfdWriter:
    """Writes to eventfds, for one thread.

    ``turn`` grows by one when a write begins and by one when it ends: it is odd for as long as a
    write is under way.  Before a watcher sleeps, it sets ``wake`` to the function that wakes it,
    then looks at ``turn`` once more.  The next write calls the function, once.
    """

    __slots__ = ("turn", "wake")

    def __init__(self) -> None:
        self.turn = 0
        self.wake: Callable[[], None] | None = None

    def signal(self, fd: int) -> bool:
        """Make the eventfd ``fd`` readable; a full one is readable already.

        Return False if a signal had to end the write, because somebody has made it wait.
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
