"""A machine's half of an attendant that hands out files; see ``client.Attendant``.

Only machines that may be saved, or whose disks may need nameless files, import this.
"""

from __future__ import annotations

import errno
import os
from socket import AF_UNIX, SOCK_SEQPACKET, socket

from pyvmm.attendant.handing import take_file
from pyvmm.attendant.messages import Ask, encode
from pyvmm.attendant.reading import Answer, check, decode
from pyvmm.attendant.remote import Line, RemoteAttendant
from pyvmm.attendant.remote_writer import RemoteWriter
from pyvmm.errors import SnapshotError
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from pyvmm.attendant.messages import Value
    from pyvmm.snapshot.files.making import SnapshotWriter

_GONE = "the process beside the machine that does this has ended"


class Channel(Line):
    """A line with answers that count, and that may bring a descriptor."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._socket = socket(AF_UNIX, SOCK_SEQPACKET, 0, fd)

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
                answer, fd = take_file(self._socket)
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

    def _close(self) -> None:
        super()._close()
        self._socket.detach()


class FilesAttendant(RemoteAttendant):
    """An attendant that may be asked for files.  ``channel`` is its line."""

    def __init__(
        self, pid: int, channel: Channel, wake_fd: int, *, has_work_at_the_end: bool
    ) -> None:
        super().__init__(pid, channel, wake_fd, has_work_at_the_end=has_work_at_the_end)
        self._channel = channel

    def scratch_file(self) -> int:
        """See ``Attendant``."""
        if not self._is_jailed:
            return super().scratch_file()
        self.wake()
        return self._channel.ask_for_file(Ask.SCRATCH)[0]

    def snapshot_writer(self, path: str | os.PathLike[str]) -> SnapshotWriter:
        """See ``Attendant``."""
        text = os.fspath(path)
        self.wake()
        try:
            fd, (final, temporary) = self._channel.ask_for_file(
                Ask.SNAPSHOT, text, shape=(str, str)
            )
        except OSError as error:
            raise SnapshotError(text, f"cannot be written: {error.strerror}") from error
        return RemoteWriter(Channel(fd), str(final), str(temporary))


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
