"""The attendant's half: take requests, do what the duties allow, and clear away at the end.

The process that asks may have been taken over by its guest.  Nothing that it sends is shown, and a
message that is wrong, or not allowed, is answered with an error and told of once.  It may fall
silent for ever: the attendant then waits for ever, for the end of that process.  It may take no
answer: the attendant then waits in the midst of one, until the same end.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Sequence
from socket import AF_UNIX, SOCK_SEQPACKET, socket, socketpair

from pyvmm.attendant.duties import Duties
from pyvmm.attendant.handing import hand_over
from pyvmm.attendant.messages import Ask, encode
from pyvmm.attendant.reading import Answer
from pyvmm.attendant.requests import answer_error, take_request
from pyvmm.attendant.writer_server import MOST_WRITERS, WriterServer
from pyvmm.errors import SnapshotError
from pyvmm.report import say
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.run.verdict import Evidence
from pyvmm.snapshot.files.writer import Writer
from pyvmm.storage.scratch import nameless_file

FORBIDDEN = (
    "the machine's process asked for something that its options do not allow, and was refused; if "
    "no defect of pyvmm has done so, a guest has (docs/jail.md)"
)


class Server:
    """Serves the machine at the other end of ``connection``, to its end."""

    def __init__(self, connection: socket, duties: Duties) -> None:
        self._connection = connection
        self._duties = duties
        self._scratch_files = 0
        self._writers: list[WriterServer] = []
        self._has_complained = False
        self._explanation: threading.Thread | None = None
        self._is_alive = True

    def serve(self) -> bool:
        """Return at the machine's end: True if it said so, False if its process is gone.

        An explanation may still be under way; the caller does not wait for it.
        """
        requests: dict[int, Callable[..., None]] = {
            Ask.SCRATCH: self._scratch, Ask.SNAPSHOT: self._snapshot, Ask.ENDED: self._ended,
        }
        while True:
            try:
                request = take_request(self._connection)
                if request is None:
                    break
                kind, values = request
                if kind == Ask.END:
                    return True
                if kind not in requests:
                    raise ValueError("a request for a snapshot's writer")
                requests[kind](*values)
            except ConnectionError:
                break
            except (OSError, ValueError, SnapshotError) as error:
                if isinstance(error, (ValueError, PermissionError)):
                    self._complain()
                try:
                    answer_error(self._connection, error)
                except OSError:
                    break
        self._is_alive = False
        return False

    def close(self) -> None:
        """Wait until no snapshot is being made any more, which ends with its machine."""
        for writer in self._writers:
            writer.join()

    def _scratch(self) -> None:
        if self._scratch_files >= self._duties.most_scratch_files:
            raise PermissionError(errno.EPERM, "too many files without a name")
        self._scratch_files += 1
        hand_over(self._connection, encode(Answer.DONE), nameless_file())

    def _snapshot(self, path: str) -> None:
        if not (self._duties.any_snapshot or path == self._duties.snapshot_path):
            self._complain()
            raise SnapshotError(path, "no option of this run allows a snapshot there")
        self._writers = [one for one in self._writers if one.is_alive]
        if len(self._writers) >= MOST_WRITERS:
            raise SnapshotError(path, f"{MOST_WRITERS} snapshots are being made already")
        with contextlib.ExitStack() as undo:
            ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET)
            undo.callback(ours.close)
            undo.callback(theirs.close)
            writer = undo.enter_context(Writer(path))
            self._writers.append(WriterServer(ours, writer, self._complain))
            undo.pop_all()
        # If nobody takes it, the other end is closed: the writer's thread clears away.
        answer = encode(Answer.DONE, writer.path, writer.temporary_path)
        hand_over(self._connection, answer, theirs.detach())

    def _ended(
        self, kind: str, detail: str, has_printed: int, waits_for_root: int, reached_init: int
    ) -> None:
        if self._explanation is not None:
            raise PermissionError(errno.EPERM, "a run ends once")
        outcome, evidence = Outcome(Kind(kind), detail=detail), Evidence()
        evidence.has_printed = bool(has_printed)
        evidence.waits_for_root = bool(waits_for_root)
        evidence.reached_init = bool(reached_init)
        # In a thread, so that the end of a machine that nobody waits for ends this as well.
        self._explanation = threading.Thread(
            target=self._explain, args=(outcome, evidence), name="explanation", daemon=True
        )
        self._explanation.start()

    def _explain(self, outcome: Outcome, evidence: Evidence) -> None:
        lines: Sequence[str] = ()
        try:
            lines = tuple(self._duties.explain(outcome, evidence))
        except (OSError, ImportError):  # the outcome stands
            pass
        finally:
            if self._is_alive:
                for line in lines:
                    say(line)
                try:
                    self._connection.send(encode(Answer.DONE))
                except OSError:
                    self._is_alive = False

    def _complain(self) -> None:
        """Say once that a request was none, or not allowed."""
        if not self._has_complained:
            self._has_complained = True
            say(FORBIDDEN)
