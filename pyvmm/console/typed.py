"""Typed input on its way from the console to the guest."""

from __future__ import annotations

from collections.abc import Callable

ESCAPE = 0x01  # Ctrl-A
_HELP = (
    "\nCtrl-A x  quit (the guest is stopped at once)\n"
    "Ctrl-A p  pause the guest, or resume it\n"
)
_HELP_SNAPSHOT = "Ctrl-A s  take the snapshot of --snapshot now\n"
_HELP_END = (
    "Ctrl-A ?  this help\n"
    "Ctrl-A Ctrl-A  send Ctrl-A to the guest\n"
)


def help_text(*, has_snapshot: bool) -> str:
    """Return the list of keys; ``has_snapshot`` is True if Ctrl-A s takes a snapshot."""
    return _HELP + (_HELP_SNAPSHOT if has_snapshot else "") + _HELP_END


class TypedInput:
    """Bytes that wait until the guest takes them.

    A pipe or file is not read on while LIMIT bytes wait, so none is lost.  A terminal must be read
    for its escapes.  While TERMINAL_LIMIT bytes wait, all other input from it is dropped, and
    ``say`` gets a line about that, once.
    """

    LIMIT = 4096
    TERMINAL_LIMIT = 1 << 20

    def __init__(self, escapes: EscapeFilter, say: Callable[[str], None]) -> None:
        self._escapes = escapes
        self._say = say
        self._waiting = bytearray()
        self._has_said = False

    @property
    def has_room(self) -> bool:
        """True if there is room for input that can also be left unread."""
        return len(self._waiting) < self.LIMIT

    def add(self, data: bytes, *, from_terminal: bool) -> None:
        """Take ``data`` that was read, from a terminal or elsewhere."""
        if not from_terminal:
            self._waiting += data
            return
        data = self._escapes.feed(data)
        room = self.TERMINAL_LIMIT - len(self._waiting)
        self._waiting += data[:room]
        if len(data) > room and not self._has_said:
            self._has_said = True
            self._say(
                f"typed input is dropped while the guest does not read: {self.TERMINAL_LIMIT} "
                "bytes wait; a pipe or file (pyvmm run < FILE) waits without a loss"
            )

    def hand_over(self, receive: Callable[[bytes], int]) -> bool:
        """Give ``receive`` as much as it takes; return True if bytes still wait."""
        while self._waiting:
            piece = bytes(self._waiting[: self.LIMIT])
            taken = receive(piece)
            del self._waiting[:taken]
            if taken < len(piece):
                break
        return bool(self._waiting)

    def __bool__(self) -> bool:
        return bool(self._waiting)


class EscapeFilter:
    """Takes Ctrl-A sequences out of typed input; the rest is the guest's.

    Without ``on_snapshot`` Ctrl-A s is the guest's, too.
    """

    def __init__(
        self,
        on_quit: Callable[[], None],
        on_pause: Callable[[], None],
        on_help: Callable[[], None],
        on_snapshot: Callable[[], None] | None = None,
    ) -> None:
        self._on_quit = on_quit
        self._on_pause = on_pause
        self._on_help = on_help
        self._on_snapshot = on_snapshot
        self._escaped = False

    def feed(self, data: bytes) -> bytes:
        """Return the bytes of ``data`` that are for the guest."""
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
                case "s" | "S" if self._on_snapshot is not None:
                    self._on_snapshot()
                case "\x01":
                    out.append(byte)
                case _:
                    out += bytes((ESCAPE, byte))
        return bytes(out)
