"""A command that runs in the guest, with its streams."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import threading
import time
from collections.abc import Mapping, Sequence

from pyvmm.control.client import Pending
from pyvmm.errors import AgentError, HostError
from pyvmm.launcher.completed import Completed
from pyvmm.launcher.errors import OutputLimitError
from pyvmm.launcher.pump import Pump, make_pipe
from pyvmm.launcher.session import Session
from pyvmm.report import escape
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike
    from typing import BinaryIO

MAX_OUTPUT_BYTES = 64 << 20
"""The most of a stream that is kept in memory."""
ANSWER_GRACE_S = 30.0
"""The agent kills a command at its time limit; this much later its answer is missing."""
SIGKILL = 9


class Command:
    """A command in the guest that was started by ``Vm.begin``.

    ``stdout`` and ``stderr`` are unbuffered binary files: read them as the bytes come, or leave
    them to ``wait``.  A command whose stream nobody reads waits, as with any pipe.  A context
    manager: leaving it kills a command that still runs.
    """

    def __init__(
        self, session: Session, argv: tuple[str, ...], data: bytes | None, timeout_s: float | None
    ) -> None:
        self.argv = argv
        self._session = session
        self._what = f"command {escape(shlex.join(argv)[:200])}"
        self._data = data
        self._unsent = [memoryview(data or b"")]
        """The rest of ``input``: ``wait`` may be called again."""
        self._until_s = None if timeout_s is None else (
            time.monotonic() + timeout_s + ANSWER_GRACE_S
        )
        self._lock = threading.Lock()
        self._waiting = threading.Lock()
        self._completed: Completed | None = None
        self._out = _Kept(f"{self._what}: stdout")
        self._err = _Kept(f"{self._what}: stderr")
        self._stdin_fd = -1
        self._call: Pending
        self.stdout: io.FileIO
        """The command's standard output, as a binary file."""
        self.stderr: io.FileIO
        """The command's standard error, as a binary file."""

    @classmethod
    def begin(
        cls,
        session: Session,
        argv: Sequence[str | bytes | PathLike[str]],
        *,
        input: bytes | str | None,  # noqa: A002 - as subprocess.run has it
        env: Mapping[str, str] | None,
        cwd: str,
        timeout_s: float | None,
        has_input: bool,
    ) -> Command:
        """Start a command: see ``Vm.begin``."""
        words = _words(argv)
        data = input.encode() if isinstance(input, str) else input
        if data is not None and not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"input must be bytes or str, not {type(data).__name__}")
        params: dict[str, object] = {
            "argv": words, "cwd": os.fspath(cwd), "stdout": 0, "stderr": 1,
            "env": None if env is None else _checked_env(env),
            "timeout_s": _checked_limit(timeout_s),
        }
        self = cls(session, tuple(words), None if data is None else bytes(data), timeout_s)
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            try:
                out, out_end = make_pipe()
                ours.callback(os.close, out)
                theirs.callback(os.close, out_end)
                err, err_end = make_pipe()
                ours.callback(os.close, err)
                theirs.callback(os.close, err_end)
                fds = [out_end, err_end]
                if has_input or data is not None:
                    stdin_end, self._stdin_fd = make_pipe()
                    ours.callback(os.close, self._stdin_fd)
                    theirs.callback(os.close, stdin_end)
                    params["stdin"] = len(fds)
                    fds.append(stdin_end)
            except OSError as error:
                raise HostError(f"{self._what}: {error}") from error
            self._call = session.send("agent.run", params, fds)
            ours.pop_all()
        self.stdout, self.stderr = io.FileIO(out, "rb"), io.FileIO(err, "rb")
        session.adopt(self)
        return self

    # Input

    def write(self, data: bytes | str) -> None:
        """Write to the command's standard input; wait while it takes nothing.

        Bytes for a command that has closed its input are dropped.  BrokenPipeError once it has
        ended.
        """
        data = data.encode() if isinstance(data, str) else data
        if self._data is not None or self._stdin_fd < 0:
            raise RuntimeError(f"{self._what}: has no input to write to")
        left: list[memoryview] = [memoryview(data)]
        state = {"is_done": False, "is_broken": True}

        def give() -> memoryview | None:
            if left:
                return left.pop()
            state["is_broken"] = False
            return None

        pump = Pump(self._session, self._what)
        pump.add_writer(self._stdin_fd, give, lambda: state.update(is_done=True))
        if not pump.run(lambda: state["is_done"], self._until_s):
            raise self._no_answer()
        if state["is_broken"]:
            raise BrokenPipeError(32, f"{self._what} reads no more input")

    def close_input(self) -> None:
        """End the command's standard input; idempotent."""
        with self._lock:
            fd, self._stdin_fd = self._stdin_fd, -1
        if fd >= 0:
            os.close(fd)

    # Its end

    def kill(self, signal: int = 15) -> None:
        """Send a signal to the command's process group; nothing if it has ended."""
        if not self._call.done():
            self._session.send("agent.kill", {"request": self._call.id, "signal": int(signal)})

    @property
    def is_running(self) -> bool:
        """True until the command's end is known here."""
        return not self._call.done() and self._session.state.outcome is None

    def wait(
        self,
        timeout_s: float | None = None,
        *,
        stdout: BinaryIO | None = None,
        stderr: BinaryIO | None = None,
    ) -> Completed:
        """Read both streams to their end, send ``input``, and return how the command ended.

        The bytes that were not read before go to the binary files ``stdout`` and ``stderr``, or
        into the result: up to 64 MiB each, more kills the command and is OutputLimitError.
        TimeoutError after ``timeout_s`` seconds: the command runs on, call ``wait`` again.
        """
        self._session.state.refuse_own_thread("wait()")
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        with self._waiting:
            if self._completed is None:
                self._completed = self._wait(until_s, timeout_s, stdout, stderr)
            return self._completed

    def _wait(
        self, until_s: float | None, timeout_s: float | None, stdout: BinaryIO | None,
        stderr: BinaryIO | None,
    ) -> Completed:
        pump = Pump(self._session, self._what)
        for kept, into, pipe in (
            (self._out, stdout, self.stdout), (self._err, stderr, self.stderr),
        ):
            kept.into(into)
            if not pipe.closed:
                pump.add_reader(pipe.fileno(), kept.take)
        if self._data is not None and self._stdin_fd >= 0:
            pump.add_writer(self._stdin_fd, self._give, self.close_input)
        limits = [each for each in (until_s, self._until_s) if each is not None]
        try:
            is_done = pump.run(self._call.done, min(limits, default=None))
        except BaseException:
            self._abandon()
            raise
        if not is_done:
            if until_s is not None and time.monotonic() >= until_s:
                self._unsent += filter(None, [pump.rest_of(self._stdin_fd)])
                raise TimeoutError(f"{self._what} runs on after {timeout_s:g} s")
            raise self._no_answer()
        return self._completed_of(self._out.data, self._err.data)

    def close(self) -> None:
        """Kill the command if it runs, and close its streams; idempotent."""
        self._abandon()
        self._session.disown(self)

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # Parts

    def _give(self) -> memoryview | None:
        return self._unsent.pop() if self._unsent and self._unsent[0] else None

    def _abandon(self) -> None:
        """Kill the command, which nobody waits for any more, and close its streams."""
        if not self._call.done():
            self._session.tell("agent.kill", {"request": self._call.id, "signal": SIGKILL})
        self.close_input()
        self.stdout.close()
        self.stderr.close()

    def _no_answer(self) -> AgentError:
        self._abandon()
        return AgentError(
            f"{self._what}: the agent has not told its end, {ANSWER_GRACE_S:g} s after its time "
            "limit; the guest hangs or is paused"
        )

    def _completed_of(self, stdout: bytes, stderr: bytes) -> Completed:
        result = self._session.result_of(self._call, self._what)
        value = result.get("value")
        number = value if isinstance(value, int) else 0
        reason = str(result.get("reason", ""))
        is_timeout = bool(result.get("timed_out"))
        status: int | None = None
        signal: int | None = None
        match result.get("kind"):
            case "exited":
                status = number
            case "signalled":
                signal = number
            case "lost":
                self._session.raise_lost(self._what, reason)
            case _:
                raise AgentError(
                    f"{self._what}: {escape(reason) or os.strerror(number)}", number
                )
        return Completed(
            argv=self.argv, status=status, signal=signal, timed_out=is_timeout,
            stdout_bytes=stdout, stderr_bytes=stderr,
        )


class _Kept:
    """The bytes of a stream: given to a file, or kept up to MAX_OUTPUT_BYTES."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._file: BinaryIO | None = None
        self._data = bytearray()

    @property
    def data(self) -> bytes:
        """Return all that was kept."""
        return bytes(self._data)

    def into(self, file: BinaryIO | None) -> None:
        """Give ``file``, if there is one, all bytes from now on, and those kept before."""
        self._file = file
        if file is not None and self._data:
            file.write(self._data)
            self._data.clear()

    def take(self, data: bytes) -> None:
        """Take more bytes; OutputLimitError, or an error of the file."""
        if self._file is not None:
            self._file.write(data)
            return
        self._data += data
        if len(self._data) > MAX_OUTPUT_BYTES:
            raise OutputLimitError(
                f"{self._what} has more than {MAX_OUTPUT_BYTES >> 20} MiB: the command was killed; "
                "give a binary file for it"
            )


def _words(argv: object) -> list[str]:
    """Return the arguments as texts, other bytes as surrogates; TypeError, ValueError."""
    if isinstance(argv, (str, bytes)):
        raise TypeError(
            'a command is a list of arguments: write ["sh", "-c", text] to have a shell read text'
        )
    if not isinstance(argv, Sequence) or not argv:
        raise TypeError(f"a command is a list with at least a program, not {argv!r}")
    words = []
    for word in argv:
        if not isinstance(word, (str, bytes, os.PathLike)):
            raise TypeError(f"a command's argument must be str or bytes, not {word!r}")
        words.append(os.fsdecode(word))
        if "\0" in words[-1]:
            raise ValueError(f"a command's argument has a NUL: {word!r}")
    return words


def _checked_env(env: Mapping[str, str]) -> dict[str, str]:
    for name, value in env.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"env: {name!r} and {value!r} must be texts")
        if not name or "=" in name or "\0" in name + value:
            raise ValueError(f"env: {name!r} cannot be a variable's name, or there is a NUL")
    return dict(env)


def _checked_limit(timeout_s: float | None) -> float | None:
    if timeout_s is not None and not 0 < timeout_s <= 86400 * 366:
        raise ValueError(f"timeout_s must be above 0, at most a year: {timeout_s!r}")
    return timeout_s
