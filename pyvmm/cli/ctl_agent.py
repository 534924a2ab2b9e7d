"""``pyvmm ctl SOCKET run``, ``put`` and ``get``: what the agent in the guest does."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from pyvmm.cli.parse import parse_seconds
from pyvmm.control.client import Client, ControlError, Pending
from pyvmm.control.packing import pack, put_place
from pyvmm.control.unpacking import Unpacker
from pyvmm.errors import AgentError, ConfigError
from pyvmm.launcher.limits import boot_timeout_s
from pyvmm.report import say
from pyvmm.testing.passed_on import PassedOn

TIMEOUT_STATUS, NOT_EXECUTABLE_STATUS, NOT_FOUND_STATUS = 124, 126, 127
SILENT_S = 1.0
"""A longer wait is told of."""
_PIECE_BYTES = 64 << 10


def reader_gone(problem: OSError) -> int:
    """Return the exit status for output that nobody takes; raise any other ``problem``."""
    if problem.errno != errno.EPIPE:
        raise problem
    return 128 + signal.SIGPIPE


def check_run(args: SimpleNamespace) -> None:
    """Raise ConfigError for words that name no command."""
    if not args.command:
        raise ConfigError("ctl run", "names no command; write pyvmm ctl SOCKET run -- CMD...")
    args.env = dict(map(_variable, args.env))
    if args.timeout is not None:
        args.timeout = parse_seconds("--timeout", args.timeout)


def check_put(args: SimpleNamespace) -> None:
    """Raise ConfigError or TransferError for a copy that cannot be."""
    if not args.target.startswith("/"):
        raise ConfigError(args.target, "a path in the guest must begin with /")
    pack(args.source, "", [])


def check_get(args: SimpleNamespace) -> None:
    """Raise ConfigError for a copy that cannot be."""
    if not args.source.startswith("/"):
        raise ConfigError(args.source, "a path in the guest must begin with /")


def run(client: Client, args: SimpleNamespace) -> int:
    """Run a command; its streams are ours."""
    params: dict[str, object] = {
        "argv": args.command, "env": args.env, "cwd": args.cwd, "timeout_s": args.timeout,
        "stdout": 0, "stderr": 1,
    }
    _wait_for_agent(client)
    outputs = [_Output(1), _Output(2)]
    fds = [output.given for output in outputs]
    stdin = None
    if not args.no_input:
        stdin = _Input()
        params["stdin"] = 2
        fds.append(stdin.given)
    try:
        pending = client.begin("agent.run", params, fds)
    finally:
        for fd in fds:
            os.close(fd)
    with _interrupts(client, pending):
        for output in outputs:
            output.start()
        if stdin is not None:
            stdin.start()
        result = pending.result()
        for output in outputs:
            output.join()
    for output in outputs:
        if output.passed_on.problem is not None:
            return reader_gone(output.passed_on.problem)
    return _status(args.command[0], result)


def _status(program: str, result: dict[str, Any]) -> int:
    value: int = result["value"]
    match result["kind"]:
        case _ if result["timed_out"]:
            return TIMEOUT_STATUS
        case "exited":
            return value
        case "signalled":
            return 128 + value
        case "failed":
            say(_named(program, result["reason"]))
            if value in (errno.ENOENT, errno.ENOTDIR):
                return NOT_FOUND_STATUS
            return NOT_EXECUTABLE_STATUS if value in (errno.EACCES, errno.ENOEXEC) else 125
    raise AgentError(f"nobody knows how {program} ended: {result['reason']}")


def put(client: Client, args: SimpleNamespace) -> int:
    """Copy ``source`` of this host to ``target`` in the guest."""
    skipped: list[str] = []
    _wait_for_agent(client)
    folder, name = put_place(
        args.source, args.target, target_is_directory=_is_directory(client, args.target)
    )
    with _pipe() as (reads, writes):
        pending = client.begin("agent.put", {"path": folder, "fd": 0}, [reads.take()])
        reads.close()
        with contextlib.suppress(BrokenPipeError):  # the result says why
            for piece in pack(args.source, name, skipped):
                _write(writes.fd, piece)
        writes.close()
        _check(pending, args.target)
    _complain(skipped)
    return 0


def get(client: Client, args: SimpleNamespace) -> int:
    """Copy ``source`` of the guest to ``target`` on this host."""
    with Unpacker(args.target) as unpacker, _pipe() as (reads, writes):
        _wait_for_agent(client)
        pending = client.begin("agent.get", {"path": args.source, "fd": 0}, [writes.take()])
        writes.close()
        while data := os.read(reads.fd, _PIECE_BYTES):
            unpacker.feed(data)
        _check(pending, args.source)
        unpacker.end()
        _complain(unpacker.skipped)
    return 0


def _wait_for_agent(client: Client) -> None:
    """Return once the agent takes orders; ControlError if it does not within a boot's time."""
    limit_s = boot_timeout_s()
    pending = client.begin("agent.wait", {"timeout_s": limit_s})
    try:
        pending.result(SILENT_S)
    except TimeoutError:
        say(f"waiting for the agent in the guest, up to {limit_s:g} s")
        pending.result()


def _is_directory(client: Client, path: str) -> bool:
    """True if the guest has a directory ``path``; reading ``PATH/.`` fails in any case."""
    with _pipe() as (_, writes):
        result = client.call("agent.read", {"path": f"{path}/.", "fd": 0}, [writes.take()])
    return bool(result["kind"] == "failed" and result["value"] == errno.EISDIR)


def _check(pending: Pending, path: str) -> None:
    """Wait for the end of a transfer; AgentError if it failed."""
    result = pending.result()
    if result["kind"] != "exited":
        raise AgentError(_named(path, result["reason"] or result["kind"]))


def _complain(skipped: list[str]) -> None:
    for line in skipped:
        say(line)


def _variable(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not name or not separator:
        raise ConfigError(f"--env {text}", "is not NAME=VALUE")
    return name, value


@contextlib.contextmanager
def _interrupts(client: Client, pending: Pending) -> Iterator[None]:
    """Meanwhile the first Ctrl-C interrupts the command, the second kills it, a third ends us."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        yield
        return
    numbers = [signal.SIGINT, signal.SIGKILL]
    wanted: queue.SimpleQueue[int] = queue.SimpleQueue()

    def handle(_number: int, _frame: object) -> None:
        # The client's locks may be held by the code that this interrupts: a thread takes them.
        if not numbers:
            raise KeyboardInterrupt
        wanted.put(numbers.pop(0))

    def send() -> None:
        while number := wanted.get():
            with contextlib.suppress(ControlError):  # it has just ended
                client.call("agent.kill", {"request": pending.id, "signal": number})

    before = signal.signal(signal.SIGINT, handle)
    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        wanted.put(0)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


class _End:
    """One end of a pipe, closed once."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def take(self) -> int:
        """Return the descriptor, which stays ours: a message carries a copy."""
        return self.fd

    def close(self) -> None:
        """Close it; idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[_End, _End]]:
    """Yield both ends of a new pipe, which are closed at the end."""
    ends = [_End(fd) for fd in os.pipe()]
    try:
        yield ends[0], ends[1]
    finally:
        for end in ends:
            end.close()


class _Output:
    """A stream of the command on its way to our descriptor ``fd``, in a thread."""

    def __init__(self, fd: int) -> None:
        self._reads, self.given = os.pipe()
        self.passed_on = PassedOn(fd)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin to pass on."""
        self._thread.start()

    def join(self) -> None:
        """Wait until all is passed on."""
        self._thread.join()

    def _run(self) -> None:
        with contextlib.closing(os.fdopen(self._reads, "rb", buffering=0)) as stream:
            # Once nobody takes the bytes, the command gets SIGPIPE, as in a pipeline here.
            while self.passed_on.problem is None and (data := stream.read(_PIECE_BYTES)):
                self.passed_on.write(data)
        self.passed_on.end()


class _Input:
    """Our standard input on its way to the command, in a thread that may be left behind."""

    def __init__(self) -> None:
        self.given, self._writes = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # the command has ended, or has closed its input
            while data := os.read(0, _PIECE_BYTES):
                _write(self._writes, data)
        os.close(self._writes)


def _named(name: str, reason: str) -> str:
    """Return ``reason`` behind ``name``, which the agent's own reasons often have already."""
    return reason if reason.startswith(f"{name}: ") else f"{name}: {reason}"
