"""A machine's half of an attendant in a process of its own; see ``client.Attendant``.

All that it does is to write and read descriptors: nothing is opened, made or imported.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading

from pyvmm.attendant.messages import MAX_BYTES, MAX_DETAIL, Ask, encode
from pyvmm.errors import SnapshotError
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from pyvmm.attendant.messages import Value
    from pyvmm.run.outcome import Outcome
    from pyvmm.run.verdict import Evidence
    from pyvmm.snapshot.files.making import SnapshotWriter

WAKE, QUIT = b"wake\n", b"quit\n"
"""The words to a sleeping attendant, through its pipe: begin your work; there is none."""


class Line:
    """Requests over ``fd``, a SOCK_SEQPACKET socket, one at a time; any thread may send one."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._lock = threading.Lock()

    def tell(self, kind: Ask, *values: Value, waits: bool = False) -> None:
        """Send a request of which no answer counts; nothing if nobody is there.

        With ``waits`` return once there is one, whatever it is.
        """
        with self._lock, contextlib.suppress(OSError):
            if self.fd < 0:
                return
            try:
                os.write(self.fd, encode(kind, *values))
                if waits:
                    os.read(self.fd, MAX_BYTES)
            except BaseException:  # an answer on its way would be taken for the next one's
                self._close()
                raise

    def close(self) -> None:
        """Close the socket; idempotent."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class RemoteAttendant:
    """See ``client.Attendant``.  ``start.start`` makes one.

    ``pid`` is the process's; it sleeps until something is written to ``wake_fd``.  With
    ``has_work_at_the_end`` it is not let go without its work.
    """

    def __init__(
        self, pid: int, line: Line, wake_fd: int, *, has_work_at_the_end: bool
    ) -> None:
        self.pid = pid
        self.beside: RemoteAttendant | None = None
        """Another one of this machine, with other rights; it is asked for nothing."""
        self._line = line
        self._wake_fd = wake_fd
        self._has_work_at_the_end = has_work_at_the_end
        self._lock = threading.Lock()
        self._is_awake = False
        self._is_closed = False
        self._is_jailed = False

    def descriptors(self) -> dict[int, str]:
        """See ``Attendant``."""
        found = {self._line.fd: "attendant", self._wake_fd: "attendant's bell"}
        return found if self.beside is None else found | self.beside.descriptors()

    def wake(self) -> None:
        """See ``Attendant``: to wake up takes it 50 ms."""
        with self._lock:
            if not self._is_awake:
                self._is_awake = True
                self._ring(WAKE)

    def scratch_file(self) -> int:
        """See ``Attendant``: only before the jail closes."""
        if self._is_jailed:
            raise PermissionError(errno.EPERM, "no option of this run calls for files")
        from pyvmm.storage.scratch import nameless_file  # not for a machine without disks

        return nameless_file()

    def snapshot_writer(self, path: str | os.PathLike[str]) -> SnapshotWriter:
        """See ``Attendant``: there is none."""
        raise SnapshotError(os.fspath(path), "no option of this run allows a snapshot there")

    def ended(self, outcome: Outcome, evidence: Evidence) -> None:
        """See ``Attendant``."""
        self.wake()
        self._line.tell(  # the outcome stands without an explanation
            Ask.ENDED, str(outcome.kind), outcome.detail[:MAX_DETAIL], evidence.has_printed,
            evidence.waits_for_root, evidence.reached_init, waits=True,
        )

    def jailed(self) -> None:
        """See ``Attendant``."""
        self._is_jailed = True

    def close(self) -> None:
        """See ``Attendant``."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            if self._has_work_at_the_end and not self._is_awake:
                self._is_awake = True
                self._ring(WAKE)
            if self._is_awake:
                self._line.tell(Ask.END)
            else:
                self._ring(QUIT)
                self._line.close()  # one that never slept waits for that
            os.close(self._wake_fd)
            self._wake_fd = -1
        with contextlib.suppress(ChildProcessError):  # SIGCHLD is ignored: it is reaped already
            os.waitpid(self.pid, 0)
        self._line.close()
        if self.beside is not None:
            self.beside.close()

    def _ring(self, word: bytes) -> None:
        with contextlib.suppress(OSError):  # it has ended; a request says so
            os.write(self._wake_fd, word)
