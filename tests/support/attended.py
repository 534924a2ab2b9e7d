"""An attendant's server in a thread of this process, and the machine's end of its channel."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from socket import AF_UNIX, SHUT_RDWR, SOCK_SEQPACKET, socket, socketpair

from pyvmm.attendant.duties import Duties
from pyvmm.attendant.reading import decode
from pyvmm.attendant.remote_files import Channel
from pyvmm.attendant.server import Server
from pyvmm.run.outcome import Outcome
from pyvmm.run.verdict import Evidence
from tests.support.patience import patient


class Attended:
    """A server with duties of a test: ``explained`` and ``tidied`` note their calls."""

    def __init__(
        self, *, snapshot_path: str | None = None, any_snapshot: bool = False,
        most_scratch_files: int = 0, lines: Iterable[str] = (),
    ) -> None:
        self.explained: list[tuple[Outcome, Evidence]] = []
        self.tidied = 0
        self.lines = lines
        self.said_so: bool | None = None
        """What ``serve`` has returned; None before the end."""
        self.duties = Duties(
            explain=self._explain, tidy=self._tidy, snapshot_path=snapshot_path,
            any_snapshot=any_snapshot, most_scratch_files=most_scratch_files,
        )
        ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET)
        ours.settimeout(patient(30))
        self.socket: socket = ours
        """The machine's end, for messages of a test's own."""
        self._server = Server(theirs, self.duties)
        self._theirs = theirs
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def channel(self) -> Channel:
        """Return the machine's end with the code that a machine has; it is closed by that."""
        return Channel(self.taken())

    def taken(self) -> int:
        """Return the descriptor of the machine's end, which the caller closes."""
        self.socket.setblocking(True)
        return self.socket.detach()

    def ask(self, data: bytes) -> tuple[int, tuple[int | str, ...]]:
        """Send ``data``, whatever it is, and return the answer."""
        self.socket.send(data)
        return decode(self.socket.recv(1 << 16))

    def vanish(self) -> None:
        """End the server, as if its process were killed."""
        self._theirs.shutdown(SHUT_RDWR)
        self.end()

    def end(self) -> bool:
        """Hang up unless a test has, wait for the server's end, and return what it returned."""
        self.socket.close()
        self._thread.join(patient(30))
        assert self.said_so is not None
        return self.said_so

    def _serve(self) -> None:
        with self._theirs:
            self.said_so = self._server.serve()
            self._server.close()

    def _explain(self, outcome: Outcome, evidence: Evidence) -> Iterable[str]:
        self.explained.append((outcome, evidence))
        return self.lines

    def _tidy(self) -> None:
        self.tidied += 1

    def __enter__(self) -> Attended:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.end()
