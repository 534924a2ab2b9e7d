"""The host's terminal, while the guest has it."""

from __future__ import annotations

import contextlib
import os
import termios


class RawTerminal:
    """A terminal in raw mode for as long as the context lasts; every byte goes to the guest.

    Only the foreground process group touches a terminal; in the background it is left alone.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._saved: list[object] | None = None

    def __enter__(self) -> RawTerminal:
        try:
            if os.isatty(self.fd) and os.tcgetpgrp(self.fd) == os.getpgrp():
                saved = termios.tcgetattr(self.fd)
                raw = termios.tcgetattr(self.fd)
                raw[0] &= ~(termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP
                            | termios.INLCR | termios.IGNCR | termios.ICRNL | termios.IXON)
                # OPOST stays: lines of ours and of others on the same terminal stay lines.
                raw[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG
                            | termios.IEXTEN)
                raw[6][termios.VMIN], raw[6][termios.VTIME] = 1, 0
                termios.tcsetattr(self.fd, termios.TCSADRAIN, raw)
                self._saved = list(saved)
        except (OSError, termios.error):
            self._saved = None
        return self

    @property
    def active(self) -> bool:
        """Whether the terminal is in raw mode because of us."""
        return self._saved is not None

    def __exit__(self, *_exc: object) -> None:
        if self._saved is not None:
            saved, self._saved = self._saved, None
            # The terminal may have gone away meanwhile; then there is nothing to restore.
            with contextlib.suppress(OSError, termios.error):
                termios.tcsetattr(self.fd, termios.TCSADRAIN, saved)  # type: ignore[arg-type]
