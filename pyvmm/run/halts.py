"""When to look whether the guest has halted for good; docs/architecture.md, "Halts"."""

from __future__ import annotations

ANNOUNCED_S = 10.0
ANNOUNCED_POLL_S = 0.05
FIRST_WINDOW_S, LONGEST_WINDOW_S = 2.0, 8.0
QUIET_SHARE = 0.01
"""A guest that uses less of one CPU than this, over a whole window, may have halted."""
REGULAR_S = 30.0
"""Seconds between inspections of a busier guest, which may have halted with a timer left on."""


class HaltWatch:
    """Says when to inspect whether the guest has halted for good.  Times are CLOCK_MONOTONIC.

    An inspection kicks every vCPU, and a guest that is kicked again and again gets nowhere.  So
    only three cases are worth an inspection:

    * The guest has announced that it halts: for a while afterwards.
    * The vCPUs have used next to no CPU time for a whole window: the guest is idle, or has halted
      without a word.  A quiet window doubles the next one, because most guests are idle; a window
      in which the guest works halves the next one.
    * There was no inspection for REGULAR_S: so rare a kick disturbs nobody.
    """

    def __init__(self, now_s: float) -> None:
        self._announced_until_s = now_s
        self.due_s = now_s
        """When to call ``is_worth_it`` next."""
        self.start_anew(now_s, 0.0)

    def start_anew(self, now_s: float, cpu_time_s: float) -> None:
        """Begin a new window: the last one says nothing, because the guest is paused, say."""
        self._window_s = FIRST_WINDOW_S
        self._since_s, self._used_s = now_s, cpu_time_s
        self._inspected_s = now_s
        self.due_s = now_s + FIRST_WINDOW_S

    def forget(self, now_s: float, cpu_time_s: float) -> None:
        """Expect no halt that was announced, and begin a new window."""
        self._announced_until_s = now_s
        self.start_anew(now_s, cpu_time_s)

    def announce(self, now_s: float) -> None:
        """Expect a halt: the guest says that it halts."""
        self._announced_until_s = now_s + ANNOUNCED_S
        self.due_s = now_s

    def is_worth_it(self, now_s: float, cpu_time_s: float) -> bool:
        """Return True to inspect now; call it at ``due_s``, which it moves.

        ``cpu_time_s`` is the CPU time that all vCPUs have used.
        """
        if now_s < self._announced_until_s:
            self.due_s = now_s + ANNOUNCED_POLL_S
            self._inspected_s = now_s
            return True
        is_quiet = cpu_time_s - self._used_s < QUIET_SHARE * (now_s - self._since_s)
        window_s = self._window_s * 2 if is_quiet else self._window_s / 2
        self._window_s = min(max(window_s, FIRST_WINDOW_S), LONGEST_WINDOW_S)
        self._since_s, self._used_s = now_s, cpu_time_s
        self.due_s = now_s + self._window_s
        if not is_quiet and now_s - self._inspected_s < REGULAR_S:
            return False
        self._inspected_s = now_s
        return True
