"""SIGINT, SIGTERM and SIGHUP as events of a matrix, for the time that it runs."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

_TAKEN = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def interrupts(tell: Callable[[int], None]) -> Iterator[None]:
    """Have ``tell`` called with the number of each signal that would end us.

    A signal that is ignored stays ignored.  From the third signal on, SIGINT ends the process as
    if nobody had taken it.
    """
    count = 0

    def take(number: int, _frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count > 2:
            raise KeyboardInterrupt
        tell(number)

    before = {}
    try:
        for number in _TAKEN:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, take)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
