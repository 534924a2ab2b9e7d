"""The attendant's half of one snapshot's writer: a thread, and a channel of its own.

A directory that takes long to become stable so holds up no other request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from socket import socket

from pyvmm.attendant.handing import hand_over
from pyvmm.attendant.messages import Ask, encode
from pyvmm.attendant.reading import Answer
from pyvmm.attendant.requests import answer_error, take_request
from pyvmm.errors import SnapshotError
from pyvmm.snapshot.files.writer import Writer
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from pyvmm.attendant.messages import Value

MOST_WRITERS = 2
"""A run makes its own snapshot (--snapshot), and one at a time for its clients (--control)."""


class WriterServer:
    """Serves requests for ``writer`` over ``connection``, and owns both.

    The end of the connection aborts the writer, unless its directory is finished.  ``complain`` is
    called after a request that is none.
    """

    def __init__(
        self, connection: socket, writer: Writer, complain: Callable[[], None]
    ) -> None:
        self._connection = connection
        self._writer = writer
        self._complain = complain
        self._thread = threading.Thread(target=self._run, name="snapshot", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """True until the machine has closed its end, and the writer has cleared away."""
        return self._thread.is_alive()

    def join(self) -> None:
        """Wait until the machine has closed its end."""
        self._thread.join()

    def _run(self) -> None:
        with self._connection, self._writer:
            try:
                while self._serve_one():
                    pass
            except OSError:  # nobody takes the answer
                return

    def _serve_one(self) -> bool:
        """Take one request; return False at the end."""
        try:
            request = take_request(self._connection)
            if request is None:
                return False
            self._answer(*request)
        except ConnectionError:
            return False
        except (OSError, ValueError, SnapshotError) as error:
            if isinstance(error, ValueError):
                self._complain()
            answer_error(self._connection, error)
        return True

    def _answer(self, kind: int, values: tuple[Value, ...]) -> None:
        writer = self._writer
        found: list[Value] = []
        match kind:
            case Ask.CREATE | Ask.REOPEN:
                (name,) = map(str, values)
                fd = writer.create(name) if kind == Ask.CREATE else writer.reopen(name)
                hand_over(self._connection, encode(Answer.DONE), fd)
                return
            case Ask.SIZE:
                found = [writer.size_of(str(values[0]))]
            case Ask.SETTLE:
                found = [value for pair in writer.settle().items() for value in pair]
            case Ask.PUBLISH:
                writer.publish()
                found = [writer.held_bytes]
            case Ask.ABORT:
                writer.abort()
            case _:
                raise ValueError("no request for a writer")
        self._connection.send(encode(Answer.DONE, *found))
