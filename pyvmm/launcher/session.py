"""The process of a machine, the connection to it, and all that waits for either.

The client's thread gets answers and events, the console's among them.  Every other thread waits on
one condition, or polls descriptors and is woken by a function of its own.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from uuid import UUID

from pyvmm.api.config import MachineConfig
from pyvmm.api.vcpus import Registers
from pyvmm.control.client import Client, ControlError, Pending
from pyvmm.errors import AgentError, HostError, PyvmmError
from pyvmm.launcher.arguments import arguments_of
from pyvmm.launcher.console import VmConsole
from pyvmm.launcher.process import END_TIMEOUT_S, MachineProcess, VmProcess
from pyvmm.launcher.run_state import RunState
from pyvmm.launcher.stderr import StderrThread, log_line
from pyvmm.report import escape
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.startup.types import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from concurrent.futures import Future
    from os import PathLike
    from typing import Any

START_TIMEOUT_S = 300.0
"""Time for the process to build its machine."""
CALL_TIMEOUT_S = 60.0
"""Time for an answer to a request that waits for nothing."""
STOP_TIMEOUT_S = 20.0
"""Time for a run to end after it was asked to; then the process is ended."""
TOLD_TIMEOUT_S = 2.0
"""Time for the process to end by itself once it has told the outcome, and somebody closes."""
_GRACE_S = 10.0
"""More than the limit that the other process was told to keep."""
_TYPED_BYTES = 256 << 10
"""Bytes for the console in one request."""


class Closable(Protocol):
    """A command that runs, or anything else that a VM closes at its end."""

    def close(self) -> None:
        """Free all that it has; idempotent."""


class Session:
    """All of a ``Vm`` but its face; ``start`` makes one."""

    def __init__(self, process: MachineProcess, report: Callable[[str], None] | None) -> None:
        self._process = process
        self._owner_pid = os.getpid()
        self.state = RunState()
        self._parts: set[Closable] = set()
        self._parts_lock = threading.Lock()
        self._closing = threading.RLock()
        self.is_closed = False
        self.evidence: Mapping[str, object] = {}
        self.end_registers: Sequence[str] = ()
        self._end_values: Sequence[Mapping[str, str]] = ()
        self.is_paused = False
        self.clone_id: UUID | None = None
        self._told = report or log_line
        self._stderr = StderrThread(
            process.stderr_fd, self.report, name=f"pyvmm VM {process.pid} stderr",
        )
        self.console = VmConsole(
            send=self._type, refuse_own_threads=self.state.refuse_own_thread,
            run_hook=self._run_hook, raise_if_failed=self.state.raise_if_failed,
        )
        # Before the interpreter's threads stop, without which nothing can be closed in order.
        atexit.register(self._at_exit)
        self._client = Client(process.socket, on_event=self._on_event, on_end=self._on_hang_up)

    # Start and end

    @classmethod
    def start(
        cls,
        config: MachineConfig,
        *,
        console_log: str | PathLike[str] | int | None,
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
            process = VmProcess.start(arguments)
        return cls.over(process, report)

    @classmethod
    def over(
        cls, process: MachineProcess, report: Callable[[str], None] | None
    ) -> Session:
        """Return the session of a process that builds its machine, once that runs; HostError."""
        try:
            session = cls(process, report)
        except BaseException:
            process.close()
            raise
        try:
            session._begin()
        except BaseException:
            process.hang_up()  # it may build for long, and listens to nothing meanwhile
            session.close()
            raise
        return session

    def _begin(self) -> None:
        try:
            self._client.wait_hello(START_TIMEOUT_S)
        except ControlError as error:
            if error.kind != "closed":
                raise HostError(f"launch: {error}") from error
            outcome = self.wait(None)
            raise HostError(f"launch: {outcome.detail if outcome else error}") from None
        self._stderr.release()
        told = self.call("subscribe", {
            "events": ["console", "state", "ended", "rewound"], "console_from": 0,
        })
        self._take_clone_id(told)

    @property
    def pid(self) -> int:
        """The process of the machine."""
        return self._process.pid

    def wait(self, timeout_s: float | None) -> Outcome | None:
        """See ``Vm.wait``."""
        self.check_open("wait()")
        self.state.refuse_own_thread("wait()")
        return self.state.wait(timeout_s)

    def finish(self) -> None:
        """See ``Vm.finish``."""
        self.tell("stop", {})

    def stop(self) -> Outcome:
        """See ``Vm.stop``."""
        self.state.refuse_own_thread("stop()")
        if self.state.outcome is None:
            self.check_open("stop()")
            self.finish()
            if self.wait(STOP_TIMEOUT_S) is None:
                self._process.hang_up()
                self.wait(None)
        assert self.state.outcome is not None
        return self.state.outcome

    def close(self) -> None:
        """See ``Vm.close``."""
        if os.getpid() != self._owner_pid:
            raise RuntimeError(f"close(): the VM belongs to process {self._owner_pid}")
        self.state.refuse_own_thread("close()")
        with self._closing:
            if self.is_closed:
                return
            with self._parts_lock:
                parts = list(self._parts)
            for part in parts:
                part.close()
            if self.state.outcome is None:
                self.stop()
            # With an outcome told, only the process's last words are still to come.
            self._process.end(TOLD_TIMEOUT_S)
            self._client.close()
            self._stderr.join()
            self._process.close()
            self.is_closed = True
            self.console.close()
            atexit.unregister(self._at_exit)

    def forget(self) -> None:
        """Close a VM that nobody holds any more; a ResourceWarning says that nobody did."""
        if self.is_closed or os.getpid() != self._owner_pid or sys.is_finalizing():
            return
        # The collector runs in any thread.
        if threading.current_thread() is self.state.event_thread:
            threading.Thread(target=self.close, name=f"pyvmm VM {self.pid} end").start()
        else:
            self.close()
        warnings.warn("the VM was never closed", ResourceWarning, stacklevel=2)

    def _at_exit(self) -> None:
        if os.getpid() == self._owner_pid:
            self.close()

    # Calls

    def send(
        self, method: str, params: Mapping[str, object] | None = None, fds: Sequence[int] = ()
    ) -> Pending:
        """Send a request without waiting for its answer: see ``wait_for`` and ``result_of``."""
        self.check_open(method)
        self.state.raise_if_over(method)
        return self.begin(method, params, fds)

    def begin(
        self, method: str, params: Mapping[str, object] | None = None, fds: Sequence[int] = ()
    ) -> Pending:
        """Send a request as ``send`` does, also once the run is over."""
        pending = self._client.begin(method, params, fds)
        pending.add_done_callback(self._on_answer)
        return pending

    def call(
        self, method: str, params: Mapping[str, object] | None = None,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> dict[str, Any]:
        """Send a request and return the result of its answer; PyvmmError, RuntimeError."""
        self.state.refuse_own_thread(method)
        pending = self.send(method, params)
        self.state.wait_for(pending.done, timeout_s, method)
        return self.result_of(pending, method)

    def result_of(self, pending: Pending, what: str) -> dict[str, Any]:
        """Return the result of an answered request; raise its error."""
        self.state.raise_if_failed()
        try:
            return pending.result(0)
        except ControlError as error:
            # The answer to a request may come before the event of the end.
            if error.kind in ("closed", "ended"):
                self.state.wait_for_notice()
                self.state.raise_if_over(what)
            text = escape(str(error))
            if error.kind == "state":
                raise RuntimeError(text) from None
            if error.kind == "agent":
                raise AgentError(text) from None
            raise

    def tell(self, method: str, params: Mapping[str, object]) -> None:
        """Send a request whose answer nobody waits for; nothing once the run is over."""
        if self.state.ending is None and not self.is_closed:
            self._client.begin(method, params)

    def settle(self, timeout_s: float) -> None:
        """See ``Vm.settle``."""
        self.check_open("settle()")
        self.state.refuse_own_thread("settle()")
        pending = self._client.begin("status")
        pending.add_done_callback(lambda _: self.state.notify())
        self.state.wait_until(pending.done, timeout_s)

    def raise_lost(self, what: str, reason: str) -> None:
        """Raise for a job whose agent was lost: the run's end if that is why, else AgentError."""
        self.state.wait_for_notice()
        self.state.raise_if_over(what)
        raise AgentError(f"{what}: {escape(reason) or 'the agent in the guest was lost'}")

    def adopt(self, part: Closable) -> None:
        """Have ``part`` closed with the VM."""
        with self._parts_lock:
            self._parts.add(part)

    def disown(self, part: Closable) -> None:
        """Forget ``part``, which was closed."""
        with self._parts_lock:
            self._parts.discard(part)

    def check_open(self, call: str) -> None:
        """Raise RuntimeError once the VM is closed, and in another process."""
        if os.getpid() != self._owner_pid:
            raise RuntimeError(f"{call}: the VM belongs to process {self._owner_pid}")
        if self.is_closed:
            raise RuntimeError(f"{call}: the VM was closed")

    # Methods with a result of their own

    def pause(self, timeout_s: float) -> bool:
        """See ``Vm.pause``."""
        try:
            self.call("pause", {"timeout_s": timeout_s}, timeout_s + _GRACE_S)
        except ControlError as error:
            if error.kind == "timeout":
                return False
            raise
        return True

    def registers(self, vcpu: int) -> Registers:
        """See ``Vm.registers``."""
        if self.state.outcome is None:
            values = self.call("registers", {"vcpu": vcpu})["values"]
        elif 0 <= vcpu < len(self._end_values):
            values = self._end_values[vcpu]
        else:
            raise PyvmmError(f"registers: vCPU {vcpu} has told none at the end of the run")
        return Registers(**{name: int(values[name], 16) for name in Registers._fields})

    def wait_for_agent(self, timeout_s: float) -> None:
        """See ``Vm.wait_for_agent``."""
        try:
            self.call("agent.wait", {"timeout_s": timeout_s}, timeout_s + _GRACE_S)
        except ControlError as error:
            raise AgentError(escape(str(error))) from None

    def _type(self, data: bytes) -> None:
        for start in range(0, len(data), _TYPED_BYTES):
            text = base64.b64encode(data[start : start + _TYPED_BYTES]).decode()
            if threading.current_thread() is self.state.event_thread:  # cannot wait for an answer
                self.send("console.write", {"data": text})
            else:
                self.call("console.write", {"data": text})

    def report(self, line: str) -> None:
        """Tell the user a line about what is odd."""
        self._run_hook("report", self._told, line)

    # Judging

    def fail(self, error: PyvmmError) -> None:
        """See ``Vm.fail``."""
        self.state.fail(error)
        self.console.end()
        self.finish()

    # The client's thread

    def _on_event(self, event: dict[str, Any]) -> None:
        self.state.event_thread = threading.current_thread()
        match event["event"]:
            case "console":
                self.console.feed(base64.b64decode(event["data"]))
            case "console.lost":
                self.console.lost_bytes += event["bytes"]
            case "state":
                self.is_paused = bool(event["paused"])
                self._take_clone_id(event)
                self.state.notify()
            case "rewound":
                self.is_paused = bool(event["paused"])
                self._take_clone_id(event)
                self._begin_anew(base64.b64decode(event["unfinished"]))
            case "ended":
                self.evidence = event["evidence"]
                self.end_registers = tuple(event["registers"])
                self._end_values = event.get("register_values", ())
                told = event["outcome"]
                self._over(Outcome(Kind[told["kind"]], told["value"], told["detail"]))

    def _take_clone_id(self, told: Mapping[str, Any]) -> None:
        text = told["clone_id"]
        self.clone_id = None if text is None else UUID(text)

    def _begin_anew(self, unfinished: bytes) -> None:
        """The machine was rewound, from its end too."""
        self.evidence, self.end_registers, self._end_values = {}, (), ()
        self.state.begin_anew()
        self.console.begin_anew(unfinished)

    def _on_answer(self, pending: Future[dict[str, Any]]) -> None:
        if pending.exception() is None and "paused" in pending.result():
            self.is_paused = bool(pending.result()["paused"])  # its event may come later
        self.state.notify()

    def _on_hang_up(self) -> None:
        """Take the end of the connection, which is that of the process, or soon will be."""
        self.state.event_thread = threading.current_thread()
        if self.state.ending is None:
            status = self._process.end(END_TIMEOUT_S)
            self._stderr.join()
            self._over(Outcome(Kind.HOST_ERROR, detail=_died(status, self._stderr.text)))

    def _over(self, outcome: Outcome) -> None:
        """Tell everybody that the run is over, the callbacks first; only the first time."""
        self.state.end(outcome, self._run_hook)
        self.console.end()

    def _run_hook(self, name: str, hook: Callable[..., object], value: object) -> None:
        """Call a user's function; an error in it fails the run."""
        try:
            hook(value)
        except Exception as error:  # whatever a user's function raises
            problem = PyvmmError(f"{name}: {hook!r} raised {type(error).__name__}: {error}")
            problem.__cause__ = error
            self.fail(problem)


def _died(status: int, last_words: str) -> str:
    """Return how a process ended that told no outcome."""
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    return f"the process of the VM ended {how}{f': {last_words}' if last_words else ''}"
