"""A machine in this process, and its agent: what ``pyvmm.launch`` does with a process between."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

from pyvmm.agent.link import AgentLink, Job, JobResult, LinkState, RunRequest
from pyvmm.config import RunConfig
from pyvmm.machine import build
from pyvmm.run.outcome import Kind, Outcome
from tests.support.patience import patient

START_S = 240


class Done(NamedTuple):
    """A command that has ended."""

    result: JobResult
    stdout: bytes
    stderr: bytes


class _Events:
    """A job's, which are called with the guest's lock held."""

    def __init__(self, guest: AgentGuest) -> None:
        self._guest = guest
        self.job: Job | None = None
        self.output = {1: bytearray(), 2: bytearray()}
        self.result: JobResult | None = None

    def on_data(self, stream: int, data: bytes) -> None:
        self.output[stream] += data
        if self.job is not None and data:
            self.job.consumed(stream, len(data))

    def on_room(self) -> None:
        pass

    def on_exit(self, result: JobResult) -> None:
        self.result = result
        self._guest.changed.notify_all()


class AgentGuest:
    """A guest of ``config`` that runs, and takes orders; a context manager."""

    def __init__(self, config: RunConfig) -> None:
        self.reports: list[str] = []
        self.changed = threading.Condition(threading.RLock())
        self._link = AgentLink(on_state=self._note, wake=lambda: None)
        self._machine = build(config, report=self.reports.append)
        port = self._machine.agent_port
        assert port is not None
        self._port = port
        port.connect(on_data=self._feed, on_room=self._pump, on_open=self._open)
        self.begin_s = time.monotonic()
        self._machine.start()

    def _note(self) -> None:
        self.changed.notify_all()

    def _feed(self, data: bytes) -> int:
        with self.changed:
            self._link.feed(data)
        self._pump()
        return len(data)

    def _open(self, is_open: bool) -> None:
        with self.changed:
            self._link.opened(is_open)

    def _pump(self) -> None:
        with self.changed:
            while (taken := self._port.receive(self._link.output(1 << 16))):
                self._link.sent(taken)

    def wait_until_ready(self) -> float:
        """Return the seconds from the start until the agent takes orders."""
        until_s = time.monotonic() + patient(START_S)
        with self.changed:
            while self._link.state is not LinkState.READY:
                assert self._machine.wait(0) is None, "the guest has ended"
                assert time.monotonic() < until_s, f"no agent ({self._link.problem})"
                self.changed.wait(patient(1))
        return time.monotonic() - self.begin_s

    def run(self, argv: Sequence[str], timeout_s: float = 120) -> Done:
        """Run a command to its end."""
        self.wait_until_ready()
        events = _Events(self)
        until_s = time.monotonic() + patient(timeout_s)
        with self.changed:
            events.job = self._link.run(RunRequest(argv=tuple(argv), has_input=False), events)
            self._pump()
            while events.result is None:
                assert time.monotonic() < until_s, f"{argv} does not end"
                self.changed.wait(patient(1))
                self._pump()
        return Done(events.result, bytes(events.output[1]), bytes(events.output[2]))

    def wait(self) -> Outcome | None:
        """Wait for the guest's own end."""
        return self._machine.wait(patient(START_S))

    def __enter__(self) -> AgentGuest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._machine.stop(Outcome(Kind.QUIT))
        self._machine.close()
