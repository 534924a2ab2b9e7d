"""A machine's half of an attendant in a process of its own; see ``client.Attendant``.

All that it does is to write and read descriptors: nothing is opened, made or imported.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading

from pyvmm.attendant.messages import (
    MAX_BYTES,
    MAX_DETAIL,
    Answer,
    Ask,
    check,
    decode,
    encode,
)
from pyvmm.errors import SnapshotError
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from pyvmm.attendant.messages import Value
    from pyvmm.run.outcome import Outcome
    from pyvmm.run.verdict import Evidence
    from pyvmm.snapshot.files.making import SnapshotWriter

WAKE, QUIT = b"wake\n", b"quit\n"
"""The words to a sleeping attendant, through its pipe: begin your work; there is none."""
_GONE = "the process beside the machine that does this has ended"


class Channel:
    """Requests over ``fd``, a SOCK_SEQPACKET socket, one at a time; any thread may send one.

    With ``takes_files`` answers may bring a descriptor; the modules for that are imported now.
    """

    def __init__(self, fd: int, *, takes_files: bool) -> None:
        self.fd = fd
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._take: Callable[[socket.socket], tuple[bytes, int]] | None = None
        if takes_files:
            from socket import AF_UNIX, SOCK_SEQPACKET, socket

            from pyvmm.attendant.handing import take_file

            self._socket = socket(AF_UNIX, SOCK_SEQPACKET, 0, fd)
            self._take = take_file

    def ask(
        self, kind: Ask, *values: Value, shape: tuple[type, ...] | None = ()
    ) -> tuple[Value, ...]:
        """Return the values of the answer, which have the types ``shape`` (None: any).

        OSError: the host's, or EPIPE if nobody answers any more.  SnapshotError.
        """
        found, fd = self._ask(kind, values)
        if fd >= 0:
            os.close(fd)
        return _checked(found, shape)

    def ask_for_file(
        self, kind: Ask, *values: Value, shape: tuple[type, ...] = ()
    ) -> tuple[int, tuple[Value, ...]]:
        """Return the descriptor that comes with an answer, and the answer's values; see ``ask``."""
        found, fd = self._ask(kind, values)
        try:
            if fd < 0:
                raise OSError(errno.EPROTO, "no file came with the answer")
            return fd, _checked(found, shape)
        except BaseException:
            if fd >= 0:
                os.close(fd)
            raise

    def _ask(self, kind: Ask, values: tuple[Value, ...]) -> tuple[tuple[Value, ...], int]:
        data, fd = encode(kind, *values), -1
        with self._lock:
            if self.fd < 0:
                raise OSError(errno.EPIPE, _GONE)
            try:
                os.write(self.fd, data)
                if self._socket is None or self._take is None:
                    answer = os.read(self.fd, MAX_BYTES)
                else:
                    answer, fd = self._take(self._socket)
                if not answer:
                    raise ConnectionResetError
            except ConnectionError:
                self._close()
                raise OSError(errno.EPIPE, _GONE) from None
            except BaseException:  # an answer on its way would be taken for the next one's
                self._close()
                raise
        try:
            return _read(answer), fd
        except BaseException:
            if fd >= 0:
                os.close(fd)
            raise

    def tell(self, kind: Ask) -> None:
        """Send a request that is not answered; nothing if nobody is there."""
        with self._lock, contextlib.suppress(OSError):
            if self.fd >= 0:
                os.write(self.fd, encode(kind))

    def close(self) -> None:
        """Close the socket; idempotent."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        fd, self.fd = self.fd, -1
        if self._socket is not None:
            self._socket.close()
        elif fd >= 0:
            os.close(fd)


def _read(answer: bytes) -> tuple[Value, ...]:
    """Return the values of a good answer; raise the error of a bad one."""
    try:
        kind, values = decode(answer)
        if kind == Answer.FAILED:
            (number,) = check(values, (int,))
            error: Exception = OSError(int(number), os.strerror(int(number)))
        elif kind == Answer.REFUSED:
            subject, problem = check(values, (str, str))
            error = SnapshotError(str(subject), str(problem))
        elif kind == Answer.DONE:
            return values
        else:
            raise ValueError(f"{kind} is no kind of answer")
    except (ValueError, OverflowError) as problem:
        raise OSError(errno.EPROTO, f"a bad answer: {problem}") from None
    raise error


def _checked(values: tuple[Value, ...], shape: tuple[type, ...] | None) -> tuple[Value, ...]:
    try:
        return values if shape is None else check(values, shape)
    except ValueError as problem:
        raise OSError(errno.EPROTO, f"a bad answer: {problem}") from None


class RemoteAttendant:
    """See ``client.Attendant``.  ``start.start`` makes one.

    ``pid`` is the process's; it sleeps until something is written to ``wake_fd``.  With
    ``has_work_at_the_end`` it is not let go without its work.
    """

    def __init__(
        self, pid: int, channel: Channel, wake_fd: int, *, has_work_at_the_end: bool
    ) -> None:
        self.pid = pid
        self._channel = channel
        self._wake_fd = wake_fd
        self._has_work_at_the_end = has_work_at_the_end
        self._lock = threading.Lock()
        self._is_awake = False
        self._is_closed = False
        self._is_jailed = False

    def descriptors(self) -> dict[int, str]:
        """See ``Attendant``."""
        return {self._channel.fd: "attendant", self._wake_fd: "attendant's bell"}

    def wake(self) -> None:
        """See ``Attendant``: to wake up takes it 50 ms."""
        with self._lock:
            if not self._is_awake:
                self._is_awake = True
                self._ring(WAKE)

    def scratch_file(self) -> int:
        """See ``Attendant``."""
        if not self._is_jailed:
            from pyvmm.storage.scratch import nameless_file  # not for a machine without disks

            return nameless_file()
        self.wake()
        return self._channel.ask_for_file(Ask.SCRATCH)[0]

    def snapshot_writer(self, path: str | os.PathLike[str]) -> SnapshotWriter:
        """See ``Attendant``."""
        from pyvmm.attendant.remote_writer import RemoteWriter  # imported by ``Channel``

        text = os.fspath(path)
        self.wake()
        try:
            fd, (final, temporary) = self._channel.ask_for_file(
                Ask.SNAPSHOT, text, shape=(str, str)
            )
        except OSError as error:
            raise SnapshotError(text, f"cannot be written: {error.strerror}") from error
        return RemoteWriter(Channel(fd, takes_files=True), str(final), str(temporary))

    def ended(self, outcome: Outcome, evidence: Evidence) -> None:
        """See ``Attendant``."""
        self.wake()
        with contextlib.suppress(OSError):  # the outcome stands without an explanation
            self._channel.ask(
                Ask.ENDED, str(outcome.kind), outcome.detail[:MAX_DETAIL], evidence.has_printed,
                evidence.waits_for_root, evidence.reached_init,
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
                self._channel.tell(Ask.END)
            else:
                self._ring(QUIT)
                self._channel.close()  # one that never slept waits for that
            os.close(self._wake_fd)
            self._wake_fd = -1
        with contextlib.suppress(ChildProcessError):  # SIGCHLD is ignored: it is reaped already
            os.waitpid(self.pid, 0)
        self._channel.close()

    def _ring(self, word: bytes) -> None:
        with contextlib.suppress(OSError):  # it has ended; a request says so
            os.write(self._wake_fd, word)
