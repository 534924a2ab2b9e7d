"""Processes under measurement: started, watched until they say something, always ended."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from bench.figures import BenchError

ROOT = Path(__file__).resolve().parents[1]
END_TIMEOUT_S = 10.0


def environment() -> dict[str, str]:
    """The environment in which pyvmm is this checkout's, whatever is installed.

    Compiled code is kept, as it is for everybody who has not asked otherwise.
    """
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPATH": str(ROOT)}


class Watched:
    """A process whose standard output is read along; a context manager that ends it.

    All waiting is bounded by ``timeout_s`` from the start.  ``started_s`` is the moment, on the
    monotonic clock, just before the process was started.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        timeout_s: float,
        pass_fds: Sequence[int] = (),
        extra_environment: Mapping[str, str] | None = None,
        take_output: bool = True,
    ) -> None:
        self.name = Path(command[0]).name
        self.output = bytearray()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        variables = {**environment(), **(extra_environment or {})}
        self.started_s = time.monotonic()
        self._deadline_s = self.started_s + timeout_s
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stderr=self._errors, cwd=ROOT,
                stdout=subprocess.PIPE if take_output else self._errors,
                env=variables, pass_fds=tuple(pass_fds),
            )
        except OSError as error:
            self._errors.close()
            raise BenchError(f"cannot start {command[0]}: {error.strerror}") from error

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def wait_for(self, mark: bytes) -> float:
        """Read output up to ``mark``; when it was seen, on the monotonic clock.

        BenchError if the output ends, or the time is over, before.
        """
        searched = 0
        while (found := self.output.find(mark, searched)) < 0:
            searched = max(0, len(self.output) - len(mark))
            if not self._read_more():
                raise self.failure(f"ended before it said {mark.decode().strip()!r}")
        seen_s = time.monotonic()
        del self.output[: found + len(mark)]
        return seen_s

    def finish(self) -> str:
        """Read the rest of the output and wait for the end; the text since the last mark."""
        while self._read_more():
            pass
        self.wait()
        return self.output.decode(errors="replace").replace("\r\n", "\n")

    def wait(self) -> int:
        """Wait for the end; the exit status.  BenchError if it takes too long."""
        try:
            return self._process.wait(max(0.0, self._deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise self.failure("does not end") from None

    def _read_more(self) -> bool:
        pipe = self._process.stdout
        if pipe is None:
            return False
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0 or not select.select([pipe], [], [], left_s)[0]:
            raise self.failure("takes too long")
        data = os.read(pipe.fileno(), 1 << 16)
        self.output += data
        return bool(data)

    def failure(self, what: str) -> BenchError:
        """An error about this process, with the end of what it said."""
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace") or self.output.decode(errors="replace")
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        tail = " | ".join(lines[-3:])
        return BenchError(f"{self.name} {what}{': ' if tail else ''}{tail[-400:]}")

    def errors(self) -> str:
        """What it has said on standard error so far."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")

    def __enter__(self) -> Watched:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()


@contextlib.contextmanager
def serving(command: Sequence[str], socket: Path, *, timeout_s: float = 20.0) -> Iterator[Watched]:
    """A daemon that has made ``socket``; ended, and the socket gone, afterwards."""
    with contextlib.ExitStack() as stack:
        stack.callback(socket.unlink, missing_ok=True)
        daemon = stack.enter_context(Watched(command, timeout_s=timeout_s, take_output=False))
        until_s = daemon.started_s + timeout_s
        while not socket.exists():
            if not daemon.is_alive:
                raise daemon.failure("ended before it made its socket")
            if time.monotonic() > until_s:
                raise daemon.failure("makes no socket")
            time.sleep(0.005)
        time.sleep(0.05)  # between a socket's name and its listening there is a moment
        yield daemon
