"""Start an attendant: a shell that sleeps until there is something to do, then becomes Python.

Most runs ask for nothing.  A Python that waits would cost each of them 10 ms of CPU time and 3 MB;
a shell costs 0.4 ms and 0.1 MB.  A fork of this process would cost 0.8 ms, and then each page that
is written anew here.  It would have this process's memory layout, too, and register pages that the
guest reads.  The shell has nothing of all that, and none of our descriptors but those in ``Kept``.

Signals are the machine's business.  So the attendant is in a process group of its own (a terminal's
Ctrl-C, Ctrl-Z and hang-up do not reach it) and blocks every signal that can be blocked.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import sys
import termios

from pyvmm.attendant.beginning import Beginning
from pyvmm.attendant.remote import QUIT, Line, RemoteAttendant
from pyvmm.console.terminal import is_in_front
from pyvmm.errors import HostError
from pyvmm.jail.calls import system_call
from pyvmm.startup.types import TYPE_CHECKING, IntEnum

if TYPE_CHECKING:
    _Action = tuple[int, int, int] | tuple[int, int, str, int, int]

_SHELL = "/bin/sh"
# $1 and what follows is Python.  The pipe at standard input tells "wake" or "quit", or ends with
# the machine's process.  Then its state is read at once, before its parent has reaped it.  The
# limit, in KiB, is for a machine's process that was taken over and sends a line without an end;
# Python takes it back.
_SLEEPER = f"""\
ulimit -S -d 16384 2>/dev/null
read -r word
[ "$word" = {QUIT.decode().strip()} ] && exit
read -r state <&4
exec "$@" "$word" "$state" </dev/null
"""
# An import fails if pyvmm was removed, or half upgraded, while the guest ran.
_PROGRAM = """\
import sys
sys.path.insert(0, sys.argv[1])
try:
    from {0} import main
except ImportError as error:
    sys.exit(f"pyvmm: the process beside the machine cannot begin: {{error}}")
main()
"""
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_SIGNALS = range(1, 32)
_SEQPACKET_CLOEXEC = 5 | os.O_CLOEXEC  # SOCK_SEQPACKET | SOCK_CLOEXEC
_PAIR = struct.Struct("=ii")
_SOCKETPAIR, _CLOSE_RANGE, _CLOSE_RANGE_CLOEXEC = 53, 436, 4
_LAST = (1 << 31) - 1
_ABOVE = 10  # no descriptor here collides with one of the attendant's


class Kept(IntEnum):
    """The attendant's descriptors, besides standard error."""

    CHANNEL = 3
    STATE = 4
    """/proc/PID/stat of the machine's process."""
    DIRECTORY = 5
    """The directory with the name of the control socket, if there is one."""
    TERMINAL = 6
    """The terminal with the guest's input, if it is one."""
    PROCESS = 7
    """A pidfd of the machine's process."""


class Sleeper:
    """A process that will be the attendant of this one, asleep; HostError.

    It knows nothing of the machine yet, so it can be started before that is built: then it falls
    asleep meanwhile, on a CPU of its own.  ``program`` is the module that it will run.
    ``directory_fd`` is of the directory with the control socket's name, ``input_fd`` of the guest's
    input: its modes are restored if it is a terminal and this process does not do it.
    """

    def __init__(
        self, program: str, *, directory_fd: int = -1, input_fd: int | None = None
    ) -> None:
        self._terminal = "" if input_fd is None else _modes(input_fd)
        with contextlib.ExitStack() as stack, contextlib.ExitStack() as on_error:
            try:
                actions: list[_Action] = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]

                def keep(fd: int, kept: int) -> None:
                    copy = _copy_above(fd)
                    stack.callback(os.close, copy)
                    actions.append((os.POSIX_SPAWN_DUP2, copy, kept))

                if self._terminal and input_fd is not None:
                    keep(input_fd, Kept.TERMINAL)
                if directory_fd >= 0:
                    keep(directory_fd, Kept.DIRECTORY)
                state_fd = os.open("/proc/self/stat", os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, state_fd)
                keep(state_fd, Kept.STATE)
                with contextlib.suppress(OSError):  # Linux 5.3
                    pidfd = os.pidfd_open(os.getpid())
                    stack.callback(os.close, pidfd)
                    keep(pidfd, Kept.PROCESS)
                bell, self._wake_fd = os.pipe2(os.O_CLOEXEC)
                stack.callback(os.close, bell)
                on_error.callback(os.close, self._wake_fd)
                keep(bell, 0)
                self._line_fd, theirs = _socket_pair()
                stack.callback(os.close, theirs)
                on_error.callback(os.close, self._line_fd)
                keep(theirs, Kept.CHANNEL)
                _close_on_exec()
                self._pid = _spawn(_command(program), actions)
            except OSError as error:
                raise _cannot_start(error) from error
            on_error.pop_all()

    def begin(self, beginning: Beginning) -> RemoteAttendant:
        """Make it the attendant that ``beginning`` tells of, once; HostError."""
        if self._terminal:
            beginning = beginning.replace(terminal=self._terminal)
        try:
            os.write(self._line_fd, beginning.message())
        except (OSError, ValueError) as error:
            self.close()
            raise _cannot_start(error) from error
        pid, has_work = self._pid, beginning.has_work_at_the_end
        if beginning.hands_out_files:
            from pyvmm.attendant.remote_files import Channel, FilesAttendant

            line = Channel(self._line_fd)
            return FilesAttendant(pid, line, self._wake_fd, has_work_at_the_end=has_work)
        return RemoteAttendant(
            pid, Line(self._line_fd), self._wake_fd, has_work_at_the_end=has_work
        )

    def close(self) -> None:
        """Let it go: there is no machine for it."""
        line = Line(self._line_fd)
        RemoteAttendant(self._pid, line, self._wake_fd, has_work_at_the_end=False).close()


def start(
    beginning: Beginning, *, program: str, directory_fd: int = -1, input_fd: int | None = None
) -> RemoteAttendant:
    """Start the attendant of this process; HostError.  See ``Sleeper``."""
    return Sleeper(program, directory_fd=directory_fd, input_fd=input_fd).begin(beginning)


def _cannot_start(error: Exception) -> HostError:
    return HostError(
        f"the process beside the machine cannot be started: {error} (--jail off does without it)"
    )


def _copy_above(fd: int) -> int:
    """Return a copy of ``fd`` whose number is none of the attendant's; OSError."""
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # The limit of open files allows no such number.
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE)) from error


def _command(program: str) -> list[str]:
    """Return the words that start Python with ``program``."""
    options = ["-I", "-S", *(["-B"] if sys.dont_write_bytecode else [])]
    return [sys.executable, *options, "-c", _PROGRAM.format(program), _ROOT]


def _spawn(command: list[str], actions: list[_Action]) -> int:
    """Return the id of the process that will run ``command``, asleep if there is a shell."""
    asleep = ["sh", "-c", _SLEEPER, "pyvmm-attendant", *command]
    for path, words in ((_SHELL, asleep), (command[0], [*command, "", ""])):
        with contextlib.suppress(FileNotFoundError):
            return os.posix_spawn(
                path, words, os.environ, file_actions=actions, setpgroup=0, setsigmask=_SIGNALS
            )
    raise FileNotFoundError(f"there is neither {_SHELL} nor {command[0]}")


def _socket_pair() -> tuple[int, int]:
    """Return two connected sockets; OSError.  Importing ``socket`` would take 4 ms."""
    pair = ctypes.create_string_buffer(_PAIR.size)
    system_call(_SOCKETPAIR, 1, _SEQPACKET_CLOEXEC, 0, pair)  # AF_UNIX
    ours, theirs = _PAIR.unpack(pair)
    return ours, theirs


def _close_on_exec() -> None:
    """Let no program that is started inherit a descriptor that the caller left open for us.

    Kernels before 5.11 cannot: such a descriptor then stays open until the attendant is awake.
    """
    with contextlib.suppress(OSError):
        system_call(_CLOSE_RANGE, 3, _LAST, _CLOSE_RANGE_CLOEXEC)


def _modes(fd: int) -> str:
    """Return the modes of the terminal ``fd`` as text; "" unless we are in front there."""
    if not is_in_front(fd):
        return ""
    with contextlib.suppress(OSError, termios.error):
        *modes, characters = termios.tcgetattr(fd)
        codes = (one if isinstance(one, int) else one[0] for one in characters)
        return " ".join(map(str, (*modes, *codes)))
    return ""
