"""The signals of a run, and their handlers.

``KickHandler`` is for every run, in any thread.  ``Signals`` is for a run at a command line, which
owns the process and its main thread.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable

KICK_SIGNAL = signal.SIGRTMIN
REFRESH_SIGNAL = signal.SIGUSR1
"""Look at the disks again: a file may have grown."""
RESIZE_SIGNAL = signal.SIGWINCH
"""The terminal has another size."""
NOTICE_SIGNALS = (REFRESH_SIGNAL, RESIZE_SIGNAL)
JOB_SIGNALS = (signal.SIGTSTP, signal.SIGCONT)
"""Stop, and go on: from the shell, or from a person."""
STOP_SIGNALS = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2, signal.SIGXCPU
)


class KickHandler:
    """Makes KICK_SIGNAL end a system call and nothing else, while anybody needs that.

    A handler belongs to the whole process, so its users are counted for the whole process: the
    first user installs the handler, the last one restores the previous handler.  Any thread may do
    either; ``signal.signal`` would work only in the main thread.
    """

    _lock = threading.Lock()
    _users = 0
    _previous: int | None = None

    @classmethod
    def begin(cls) -> None:
        """Install the handler unless it is installed."""
        with cls._lock:
            cls._users += 1
            if cls._users == 1:
                # A function of the C library that takes an int, does nothing with it, and calls
                # nobody: no Python code runs, and nothing is written to the wake-up descriptor.
                nothing = ctypes.cast(ctypes.pythonapi.abs, ctypes.c_void_p).value
                cls._previous = cls._set_handler(nothing)

    @classmethod
    def end(cls) -> None:
        """Put back the previous handler if nobody else needs ours; once after each ``begin``.

        No thread that was kicked may be left: the default action of the signal ends the process.
        """
        with cls._lock:
            cls._users -= 1
            if cls._users == 0:
                cls._set_handler(cls._previous)

    @staticmethod
    def _set_handler(handler: int | None) -> int | None:
        # Without SA_RESTART, as Python's own handlers: a system call reports EINTR.
        set_handler = ctypes.pythonapi.PyOS_setsig
        set_handler.argtypes, set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        previous: int | None = set_handler(KICK_SIGNAL, handler)
        return previous


class Signals:
    """Signal handlers for the length of a run; the previous ones come back afterwards.

    ``on_signal`` is called for STOP_SIGNALS and NOTICE_SIGNALS, and with ``job_control`` for
    JOB_SIGNALS.  ``wakeup_fd`` becomes readable at every signal: the kernel may hand one to any
    thread, and then nothing else interrupts the main thread's poll.
    """

    def __init__(self, on_signal: Callable[[int], None], *, job_control: bool = True) -> None:
        self._on_signal = on_signal
        self._job_control = job_control
        self._saved: dict[int, object] = {}
        self._previous_wakeup_fd = -1
        self._previous_mask: set[int | signal.Signals] = set()
        self.wakeup_fd = self._wakeup_write_fd = -1

    def __enter__(self) -> Signals:
        self.wakeup_fd, self._wakeup_write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._previous_wakeup_fd = signal.set_wakeup_fd(
            self._wakeup_write_fd, warn_on_full_buffer=False
        )
        job_signals = JOB_SIGNALS if self._job_control else ()
        for number in (*STOP_SIGNALS, *NOTICE_SIGNALS, *job_signals):
            # An ignored signal stays ignored (nohup, a shell's background job).
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._saved[number] = signal.signal(number, lambda n, _f: self._on_signal(n))
        # Let in the notices that came during the start: pyvmm.__main__ has blocked them.
        self._previous_mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, NOTICE_SIGNALS)
        return self

    def __exit__(self, *_exc: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._previous_mask)
        for number, handler in self._saved.items():
            # A thread that was joined may still be ending, with no signal blocked.  A signal that
            # this thread blocks must not meet the default action there, which kills.
            if number in self._previous_mask and handler == signal.SIG_DFL:
                handler = _do_nothing
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._saved.clear()
        signal.set_wakeup_fd(self._previous_wakeup_fd)
        os.close(self.wakeup_fd)
        os.close(self._wakeup_write_fd)


def _do_nothing(_number: int, _frame: object) -> None:
    pass
