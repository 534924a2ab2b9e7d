"""What is typed at the console, on its way to the guest."""

from __future__ import annotations

from collections.abc import Callable

ESCAPE = 0x01  # Ctrl-A
HELP = (
    "\nCtrl-A x  quit (the guest is stopped at once)\n"
    "Ctrl-A p  pause the guest, or resume it\n"
    "Ctrl-A ?  this help\n"
    "Ctrl-A Ctrl-A  send Ctrl-A to the guest\n"
)


class EscapeFilter:
    """Takes Ctrl-A sequences out of what is typed; the rest is the guest's."""

    def __init__(
        self,
        on_quit: Callable[[], None],
        on_pause: Callable[[], None],
        on_help: Callable[[], None],
    ) -> None:
        self._on_quit = on_quit
        self._on_pause = on_pause
        self._on_help = on_help
        self._escaped = False

    def feed(self, data: bytes) -> bytes:
        """The bytes of ``data`` that are for the guest."""
        out = bytearray()
        for byte in data:
            if not self._escaped:
                if byte == ESCAPE:
                    self._escaped = True
                else:
                    out.append(byte)
                continue
            self._escaped = False
            match chr(byte):
                case "x" | "X":
                    self._on_quit()
                case "p" | "P":
                    self._on_pause()
                case "?" | "h" | "H":
                    self._on_help()
                case "\x01":
                    out.append(byte)
                case _:
                    out += bytes((ESCAPE, byte))
        return bytes(out)
