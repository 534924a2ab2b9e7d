"""The process of a machine, the connection to it, and all that waits for either.

One thread a machine reads: answers, events (the console's among them) and the process's stderr.
Every other thread waits on one condition, or polls descriptors with a ``Waker`` among them.
"""

from __future__ import annotations

import base64
import contextlib
import os
import select
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

from pyvmm.api.config import MachineConfig
from pyvmm.api.vcpus import Registers
from pyvmm.errors import ConfigError, HostError, KvmError, PyvmmError
from pyvmm.launcher.arguments import arguments_of
from pyvmm.launcher.connection import Call, Connection
from pyvmm.launcher.console import VmConsole
from pyvmm.launcher.errors import AgentError, EndedError
from pyvmm.launcher.process import END_TIMEOUT_S, VmProcess
from pyvmm.launcher.stderr import StderrLines
from pyvmm.report import escape
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.startup.types import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from os import PathLike

START_TIMEOUT_S = 300.0
"""Time for the process to build its machine."""
CALL_TIMEOUT_S = 60.0
"""Time for an answer to a request that waits for nothing."""
STOP_TIMEOUT_S = 20.0
"""Time for a run to end after it was asked to; then the process is ended."""
END_NOTICE_S = 5.0
"""Time in which the end of a run is told, after its agent was lost by that."""
TOLD_TIMEOUT_S = 2.0
"""Time for the process to end by itself once it has told the outcome, and somebody closes."""
_GRACE_S = 10.0
"""More than the limit that the other process was told to keep."""
_KINDS: dict[str, type[PyvmmError]] = {"agent": AgentError}


class Closable(Protocol):
    """A command that runs, or anything else that a VM closes at its end."""

    def close(self) -> None:
        """Free all that it has; idempotent."""


class Session:
    """All of a ``Vm`` but its face; ``start`` makes one."""

    def __init__(self, process: VmProcess, report: Callable[[str], None] | None) -> None:
        self._process = process
        self._owner_pid = os.getpid()
        self._news = threading.Condition()
        self._wakers: set[Callable[[], None]] = set()
        self._parts: set[Closable] = set()
        self._closing = threading.Lock()
        self._is_closing = self.is_closed = False
        self._has_begun = False
        self._start_error: PyvmmError | None = None
        self._ending: Outcome | None = None
        """The outcome as soon as it is known; ``outcome`` is set after the callbacks."""
        self.outcome: Outcome | None = None
        self.evidence: Mapping[str, object] = {}
        self.end_registers: Sequence[str] = ()
        self.failure: PyvmmError | None = None
        self.is_paused = False
        self.agent_state = self.agent_problem = ""
        self._end_callbacks: list[Callable[[Outcome], object]] = []
        told = report or _log
        self._stderr = StderrLines(
            process.stderr_fd, lambda line: self._run_hook("report", told, line)
        )
        self.console = VmConsole(
            send=self._type, refuse_own_threads=self.refuse_own_thread, run_hook=self._run_hook,
            raise_if_failed=self.raise_if_failed,
        )
        self._connection = Connection(
            process.socket, on_event=self._on_event, on_answer=lambda _call: self._notify()
        )
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(
            target=self._read, name=f"pyvmm VM {process.pid}", daemon=True
        )

    # Start and end

    @classmethod
    def start(
        cls,
        config: MachineConfig,
        *,
        console_log: str | PathLike[str] | None,
        control: str | PathLike[str] | None,
        report: Callable[[str], None] | None,
    ) -> Session:
        """Start the process and return the session once its machine runs; see ``launch``."""
        if not isinstance(config, MachineConfig):
            raise TypeError(f"launch takes a MachineConfig, not {type(config).__name__}")
        if report is not None and not callable(report):
            raise TypeError(f"report must be a function of a text, not {type(report).__name__}")
        arguments = arguments_of(config, console_log=console_log, control=control)
        with contextlib.closing(arguments):
            session = cls(VmProcess.start(arguments), report)
        try:
            session._begin()
        except BaseException:
            session.close()
            raise
        return session

    def _begin(self) -> None:
        self._thread.start()
        until_s = time.monotonic() + START_TIMEOUT_S
        with self._news:
            while not (self._has_begun or self._start_error or self._ending):
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    raise HostError(
                        f"launch: the process of the VM has not started in {START_TIMEOUT_S:g} s"
                    )
                self._news.wait(left_s)
        if self._start_error is not None:
            raise self._start_error
        if not self._has_begun:
            raise HostError(f"launch: {self._ending.detail if self._ending else ''}")
        self.call("subscribe", {"events": ["console", "state", "ended"], "console_from": 0})

    @property
    def pid(self) -> int:
        """The process of the machine."""
        return self._process.pid

    def wait(self, timeout_s: float | None) -> Outcome | None:
        """See ``Vm.wait``."""
        self.refuse_own_thread("wait()")
        with self._news:
            self._news.wait_for(lambda: self.outcome is not None, timeout_s)
            return self.outcome

    def finish(self) -> None:
        """See ``Vm.finish``."""
        if self._ending is None and not self.is_closed:
            with contextlib.suppress(OSError, PyvmmError):
                self._connection.send("stop")

    def stop(self) -> Outcome:
        """See ``Vm.stop``."""
        self._check_open("stop()")
        self.finish()
        outcome = self.wait(STOP_TIMEOUT_S)
        if outcome is None:
            self._process.hang_up()
            outcome = self.wait(None)
        assert outcome is not None  # the reader sees the end of the socket
        return outcome

    def close(self) -> None:
        """See ``Vm.close``."""
        if os.getpid() != self._owner_pid:
            raise RuntimeError(f"close(): the VM belongs to process {self._owner_pid}")
        self.refuse_own_thread("close()")
        with self._closing:
            if self.is_closed:
                return
            self._is_closing = True
            with self._news:
                parts = list(self._parts)
            for part in parts:
                part.close()
            if self._thread.ident is not None and self._ending is None:
                self.finish()
                self.wait(STOP_TIMEOUT_S)
            os.eventfd_write(self._stop_fd, 1)
            if self._thread.ident is not None:
                self._thread.join()
            self._process.close()
            with self._news:
                self.is_closed = True
            self.console.close()
            os.close(self._stop_fd)
            self._notify()

    def forget(self) -> None:
        """Close a VM that nobody holds any more; a ResourceWarning says that nobody did."""
        if self.is_closed or os.getpid() != self._owner_pid:
            return
        self.close()
        warnings.warn("the VM was never closed", ResourceWarning, stacklevel=2)

    # Calls

    def send(
        self, method: str, params: dict[str, object] | None = None, fds: Sequence[int] = ()
    ) -> Call:
        """Send a request without waiting for its answer: see ``answered`` and ``result_of``."""
        self._check_open(method)
        self.raise_if_failed()
        try:
            return self._connection.send(method, params, fds)
        except OSError:
            self._wait_for_end()
            raise self._ended(method) from None

    def call(
        self, method: str, params: dict[str, object] | None = None,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> dict[str, object]:
        """Send a request and return the result of its answer; PyvmmError, RuntimeError."""
        self.refuse_own_thread(method)
        call = self.send(method, params)
        self.wait_for(lambda: call.answer is not None, timeout_s, method)
        return self.result_of(call, method)

    def wait_for(self, is_there: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Wait until ``is_there``; raise what ended the run, or HostError when the time is up."""
        until_s = time.monotonic() + timeout_s
        with self._news:
            while not is_there():
                self.raise_if_failed()
                if self.outcome is not None or self.is_closed:
                    raise self._ended(what)
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    raise HostError(
                        f"{what}: the process of the VM has not answered in {timeout_s:g} s"
                    )
                self._news.wait(left_s)

    def result_of(self, call: Call, what: str) -> dict[str, object]:
        """Return the result of an answered call; raise its error."""
        self.raise_if_failed()
        if call.error is None:
            return call.result
        kind, message = str(call.error.get("kind")), escape(str(call.error.get("message")))
        if kind == "ended":
            self._wait_for_end()
            raise self._ended(what)
        if kind == "state":
            raise RuntimeError(message)
        raise _KINDS.get(kind, PyvmmError)(message)

    def raise_if_failed(self) -> None:
        """Raise the error given to ``fail``, if there is one."""
        if self.failure is not None:
            raise self.failure

    def raise_if_over(self, what: str) -> None:
        """Raise the error given to ``fail``, or EndedError if the run is over."""
        self.raise_if_failed()
        if self.outcome is not None or self.is_closed:
            raise self._ended(what)

    def raise_lost(self, what: str, reason: str) -> None:
        """Raise for a job whose agent was lost: the run's end if that is why, else AgentError."""
        self._wait_for_end()
        self.raise_if_over(what)
        raise AgentError(f"{what}: {escape(reason) or 'the agent in the guest was lost'}")

    @contextlib.contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """Have ``wake`` called after every change, in the thread that made it."""
        with self._news:
            self._wakers.add(wake)
        try:
            yield
        finally:
            with self._news:
                self._wakers.discard(wake)

    def adopt(self, part: Closable) -> None:
        """Have ``part`` closed with the VM."""
        with self._news:
            self._parts.add(part)

    def disown(self, part: Closable) -> None:
        """``part`` was closed."""
        with self._news:
            self._parts.discard(part)

    def refuse_own_thread(self, call: str) -> None:
        """Raise RuntimeError in the thread that reads, which would wait for itself."""
        if threading.current_thread() is self._thread:
            raise RuntimeError(f"{call} in a callback would wait for itself: use another thread")

    def _ended(self, what: str) -> Exception:
        if self.outcome is None:
            return RuntimeError(f"{what}: the VM was closed")
        text = f"{what}: the run has ended: {self.outcome}"
        return EndedError(text, self.outcome)

    def _wait_for_end(self) -> None:
        """Wait a moment for the end of the run, which is about to be told."""
        if threading.current_thread() is not self._thread:
            with self._news:
                self._news.wait_for(
                    lambda: self.outcome is not None or self.failure is not None, END_NOTICE_S
                )
        self.raise_if_failed()

    def _check_open(self, call: str) -> None:
        if os.getpid() != self._owner_pid:
            raise RuntimeError(f"{call}: the VM belongs to process {self._owner_pid}")
        if self.is_closed:
            raise RuntimeError(f"{call}: the VM was closed")

    # Methods with a result of their own

    def pause(self, timeout_s: float) -> bool:
        """See ``Vm.pause``."""
        answer = self.call("pause", {"timeout_s": timeout_s}, timeout_s + _GRACE_S)
        return bool(answer.get("paused"))

    def registers(self, vcpu: int) -> Registers:
        """See ``Vm.registers``."""
        found = self.call("registers", {"vcpu": vcpu}).get("registers")
        if not isinstance(found, dict):
            raise HostError("registers: the process of the VM sent none")
        return Registers(**{name: int(found[name]) for name in Registers._fields})

    def wait_for_agent(self, timeout_s: float) -> None:
        """See ``Vm.wait_for_agent``."""
        self.call("agent.wait", {"timeout_s": timeout_s}, timeout_s + _GRACE_S)

    def _type(self, data: bytes) -> None:
        for start in range(0, len(data), 256 << 10):
            text = base64.b64encode(data[start : start + (256 << 10)]).decode()
            if threading.current_thread() is self._thread:  # a callback cannot wait for an answer
                self.send("console.write", {"data": text})
            else:
                self.call("console.write", {"data": text})

    # Judging

    def fail(self, error: PyvmmError) -> None:
        """See ``Vm.fail``."""
        if not isinstance(error, PyvmmError):
            raise TypeError(f"fail takes a PyvmmError, not {type(error).__name__}")
        with self._news:
            if self.failure is None:
                self.failure = error
        self.console.end()
        self._notify()
        self.finish()

    def on_end(self, callback: Callable[[Outcome], object]) -> None:
        """See ``Vm.on_end``."""
        with self._news:
            outcome = self._ending
            if outcome is None:
                self._end_callbacks.append(callback)
        if outcome is not None:
            callback(outcome)

    # The thread that reads

    def _read(self) -> None:
        poller = select.poll()
        for fd in (self._process.socket.fileno(), self._process.stderr_fd, self._stop_fd):
            poller.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poller.poll()}
            if self._process.stderr_fd in ready and not self._stderr.read():
                poller.unregister(self._process.stderr_fd)
            if self._process.socket.fileno() in ready and not self._connection.read():
                break
            if self._stop_fd in ready:
                break
        status = self._process.end(END_TIMEOUT_S if self._ending is None else TOLD_TIMEOUT_S)
        self._stderr.finish()
        self._over(Outcome(Kind.HOST_ERROR, detail=_died(status, self._stderr.text)))

    def _on_event(self, event: dict[str, object]) -> None:
        match event["event"]:
            case "console":
                self.console.feed(base64.b64decode(str(event.get("data", ""))))
            case "console.lost":
                lost = event.get("bytes")
                self.console.lost_bytes += lost if isinstance(lost, int) else 0
            case "state":
                self.is_paused = bool(event.get("paused"))
                self.agent_state = str(event.get("agent"))
                self.agent_problem = str(event.get("problem") or "")
            case "hello":
                self._has_begun = True
            case "failed":
                self._start_error = _start_error(event)
            case "ended":
                self._ended_by(event)
        if event["event"] not in ("console", "console.lost"):
            self._notify()

    def _ended_by(self, event: dict[str, object]) -> None:
        outcome, evidence = event.get("outcome"), event.get("evidence")
        registers = event.get("registers")
        self.evidence = evidence if isinstance(evidence, dict) else {}
        self.end_registers = tuple(map(str, registers)) if isinstance(registers, list) else ()
        self._over(_outcome_of(outcome))

    def _over(self, outcome: Outcome) -> None:
        """Tell everybody that the run is over, the callbacks first; only the first time."""
        with self._news:
            if self._ending is not None:
                return
            self._ending = outcome
            callbacks = list(self._end_callbacks)
        for callback in callbacks:
            self._run_hook("on_end", callback, outcome)
        with self._news:
            self.outcome = outcome
        self.console.end()
        self._notify()

    def _run_hook(self, name: str, hook: Callable[..., object], value: object) -> None:
        """Call a user's function; an error in it fails the run."""
        try:
            hook(value)
        except Exception as error:  # whatever a user's function raises
            problem = PyvmmError(f"{name}: {hook!r} raised {type(error).__name__}: {error}")
            problem.__cause__ = error
            self.fail(problem)

    def _notify(self) -> None:
        with self._news:
            self._news.notify_all()
            for wake in self._wakers:
                wake()


def _outcome_of(data: object) -> Outcome:
    """Return the outcome in an event; one that says so if there is none."""
    try:
        assert isinstance(data, dict)
        return Outcome(Kind(data["kind"]), int(data["value"]), str(data["detail"]))
    except (AssertionError, KeyError, TypeError, ValueError):
        return Outcome(Kind.HOST_ERROR, detail="the process of the VM told no outcome")


def _died(status: int, stderr: str) -> str:
    """Return how a process ended that told no outcome."""
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    return f"the process of the VM ended {how}{f': {stderr}' if stderr else ''}"


def _start_error(event: dict[str, object]) -> PyvmmError:
    """Return the error that a machine could not be built by."""
    kind, message = event.get("kind"), escape(str(event.get("message")))
    if kind == "ConfigError":
        subject, _, problem = message.partition(": ")
        return ConfigError(subject, problem)
    if kind in ("HostError", KvmError.__name__):
        return HostError(message)
    return PyvmmError(message)


def _log(line: str) -> None:
    import logging

    logging.getLogger("pyvmm").warning("%s", escape(line))
