"""The agent's methods of the control protocol; docs/control.md describes each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import MappingProxyType

from pyvmm.agent.clone import HOOK
from pyvmm.agent.link import AgentLink, Job, JobEvents, LinkState, RunRequest
from pyvmm.agent.protocol import (
    LAST_SIGNAL,
    MAX_PATH,
    MAX_RUN_BYTES,
    MAX_TIMEOUT_MS,
    STDERR,
    STDOUT,
)
from pyvmm.control.agent_bridge import AgentBridge
from pyvmm.control.connection import Call, Connection
from pyvmm.control.jobs import ClientJob, check_pipe
from pyvmm.control.messages import Params, RequestError
from pyvmm.errors import AgentError
from pyvmm.run.io_loop import Deadline, IoLoop
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from uuid import UUID

MAX_JOBS = 32
"""Jobs of all clients together, with those whose output a client has not taken yet."""
WAIT_S = 60.0

Begin = Callable[[JobEvents], Job]


class Agent:
    """The agent in the guest, for all clients; ``bridge`` is None if it has no port.

    ``is_brought`` is True if pyvmm brings the agent into the guest, False if the image may have it.
    ``clone_id`` returns the number of the clone that the machine is now.
    """

    def __init__(
        self, loop: IoLoop, bridge: AgentBridge | None, *, is_brought: bool,
        clone_id: Callable[[], UUID | None],
    ) -> None:
        self._loop = loop
        self._bridge = bridge
        self._is_brought = is_brought
        self._clone_id = clone_id
        self._jobs: list[ClientJob] = []
        self._waiting: list[tuple[Call, Deadline | None]] = []
        self._has_ended = False

    def state(self) -> dict[str, object]:
        """Return the fields of ``status`` and of the state event."""
        if self._bridge is None:
            return {"agent": "none", "problem": ""}
        link = self._bridge.link
        return {"agent": str(link.state), "problem": link.problem or _hook_problem(link)}

    def clone(self) -> dict[str, object] | None:
        """Return the agent's answer to its being in a clone; None if there is none."""
        answer = None if self._bridge is None else self._bridge.link.clone
        if answer is None or answer.clone_id != self._clone_id():
            return None
        return {
            "told": answer.is_told, "reseeded": answer.is_reseeded,
            "clock_set": answer.is_clock_set, "hook": str(answer.hook), "value": answer.value,
            "reason": answer.reason, "output": answer.output.decode("utf-8", "surrogateescape"),
        }

    def begin_again(self) -> None:
        """The end of the run was taken back."""
        self._has_ended = False

    def pump(self) -> None:
        """Move bytes between the port and the link.

        A link of before a rewind is ended, unless the port has news of that itself.
        """
        if self._bridge is not None and not self._has_ended:
            self._bridge.pump()
            if self._is_stale(self._bridge.link) and not self._bridge.has_news:
                self._bridge.link.lose("the machine was rewound")

    def _is_stale(self, link: AgentLink) -> bool:
        """True if the agent has answered before the machine was rewound."""
        return link.state is LinkState.READY and link.is_due(self._clone_id())

    def link(self) -> AgentLink:
        """Return the link; RequestError if there is none, or it is one of before a rewind."""
        link = self._present_link()
        if self._is_stale(link):
            raise RequestError("agent", "the machine was rewound: its agent has to come again")
        return link

    def _present_link(self) -> AgentLink:
        if self._has_ended:
            raise RequestError("ended", "the run has ended")
        if self._bridge is None:
            raise RequestError("agent", "this machine has no port for an agent")
        self.pump()
        return self._bridge.link

    def wait(self, call: Call, timeout_s: float | None) -> None:
        """Answer once the agent is ready."""
        link = self._present_link()
        if link.state is LinkState.READY and not self._is_stale(link):
            _answer_ready(call, link)
            return
        deadline = None
        if timeout_s is not None:
            deadline = self._loop.call_in(timeout_s, lambda: self._give_up(call, timeout_s))
        self._waiting.append((call, deadline))
        call.when_over = lambda: self._forget(call)

    def look(self) -> None:
        """The link's state may have changed."""
        if self._bridge is None or self._bridge.link.state is not LinkState.READY:
            return
        if self._is_stale(self._bridge.link):
            return
        for call, _ in list(self._waiting):
            self._forget(call)
            _answer_ready(call, self._bridge.link)

    def end(self) -> None:
        """The run has ended: no job goes on."""
        self._has_ended = True
        if self._bridge is not None:
            self._bridge.end()
        for call, _ in list(self._waiting):
            self._forget(call)
            call.refuse("ended", "agent.wait: the run has ended before an agent came forward")

    def begin(
        self,
        call: Call,
        start: Callable[[AgentLink], Begin],
        *,
        input_fd: int | None = None,
        outputs: Mapping[int, int | None] = MappingProxyType({}),
    ) -> None:
        """Begin a job, which answers ``call`` at its end."""
        link = self.link()
        if len(self._jobs) >= MAX_JOBS:
            raise RequestError(
                "limit", f"{MAX_JOBS} jobs have not ended, or their output was not read"
            )
        for fd in (input_fd, *outputs.values()):
            if fd is not None:
                check_pipe(fd, call.method)
        job = ClientJob(
            self._loop, call, input_fd=input_fd, outputs=outputs, on_over=self._jobs.remove
        )
        try:
            started = start(link)(job)
        except AgentError as error:
            raise RequestError("agent", f"{call.method}: {error}") from error
        self._jobs.append(job)
        job.begin(started)

    def refuse_later(self, call: Call, timeout_s: float) -> Deadline:
        """Refuse ``call`` in ``timeout_s``; whoever answers it before cancels that."""
        deadline = self._loop.call_in(timeout_s, lambda: call.refuse(
            "timeout", f"{call.method}: the agent has not answered within {timeout_s:g} s"
        ))
        call.when_over = deadline.cancel
        return deadline

    def kill(self, connection: Connection, number: int, signal: int) -> None:
        """Send ``signal`` to the command of a request; RequestError if it is not under way."""
        for job in self._jobs:
            if job.call.connection is connection and job.call.id == number:
                job.kill(signal)
                return
        raise RequestError("params", f"agent.kill: request {number} is no job under way")

    def _give_up(self, call: Call, timeout_s: float) -> None:
        self._forget(call)
        if call.is_over or self._bridge is None:
            return
        link = self._bridge.link
        if link.state is LinkState.LOST:
            why = link.problem
        elif link.hello is not None:
            why = f"it has not yet dealt with being in a clone; its hook {HOOK} may still run"
        elif self._is_brought:
            why = "the guest may have no driver for virtio's console, or has not booted so far"
        else:
            why = "the image has none that starts by itself: bring one in with pyvmm run --agent"
        call.refuse("timeout", f"no agent came forward within {round(timeout_s, 2):g} s: {why}")

    def _forget(self, call: Call) -> None:
        for each in self._waiting:
            if each[0] is call:
                self._waiting.remove(each)
                if each[1] is not None:
                    each[1].cancel()
                return


def _hook_problem(link: AgentLink) -> str:
    """Return why the hook of a clone has failed, "" if it has not."""
    return "" if link.clone is None or link.state is not LinkState.READY else link.clone.problem


def _answer_ready(call: Call, link: AgentLink) -> None:
    """Answer for an agent that takes orders; refuse if its guest is not fit for use."""
    hello = link.hello
    assert hello is not None  # the link is ready
    if problem := _hook_problem(link):
        call.refuse("agent", f"{call.method}: {problem}")
    else:
        call.answer({"version": hello.version, "text": hello.text, "max_jobs": hello.max_jobs})


# The methods


def _wait(agent: Agent, call: Call, params: Params) -> None:
    timeout_s = params.seconds("timeout_s", WAIT_S)
    params.end()
    agent.wait(call, timeout_s)


def _run(agent: Agent, call: Call, params: Params) -> None:
    argv = params.texts("argv", MAX_RUN_BYTES, least=1)
    env = params.pairs("env", MAX_RUN_BYTES)
    cwd = params.text("cwd", MAX_PATH, "")
    timeout_s = params.seconds("timeout_s")
    stdin = params.fd("stdin", required=False)
    outputs = {
        STDOUT: params.fd("stdout", required=False), STDERR: params.fd("stderr", required=False),
    }
    params.end()
    most_s = MAX_TIMEOUT_MS // 1000
    if timeout_s is not None and not 0.001 <= timeout_s <= most_s:
        raise params.error("timeout_s", f"must be 0.001 to {most_s} seconds, or null")
    command = RunRequest(
        argv=tuple(argv), env=env, cwd=cwd, has_input=stdin is not None,
        timeout_ms=0 if timeout_s is None else round(timeout_s * 1000),
    )
    agent.begin(
        call, lambda link: lambda events: link.run(command, events), input_fd=stdin,
        outputs=outputs,
    )


def _kill(agent: Agent, call: Call, params: Params) -> None:
    number = params.integer("request", 0, (1 << 53) - 1)
    signal = params.integer("signal", 1, LAST_SIGNAL)
    params.end()
    agent.kill(call.connection, number, signal)
    call.answer({})


def _put(agent: Agent, call: Call, params: Params) -> None:
    path = params.text("path", MAX_PATH)
    fd = params.fd("fd")
    params.end()
    agent.begin(call, lambda link: lambda events: link.put(path, events), input_fd=fd)


def _get(agent: Agent, call: Call, params: Params) -> None:
    path = params.text("path", MAX_PATH)
    outputs = {STDOUT: params.fd("fd")}
    params.end()
    agent.begin(call, lambda link: lambda events: link.get(path, events), outputs=outputs)


def _read(agent: Agent, call: Call, params: Params) -> None:
    path = params.text("path", MAX_PATH)
    outputs = {STDOUT: params.fd("fd")}
    params.end()
    agent.begin(call, lambda link: lambda events: link.read(path, events), outputs=outputs)


def _write(agent: Agent, call: Call, params: Params) -> None:
    path = params.text("path", MAX_PATH)
    mode = params.integer("mode", 0, 0o7777, 0o644)
    fd = params.fd("fd")
    params.end()
    agent.begin(call, lambda link: lambda events: link.write(path, mode, events), input_fd=fd)


def _ping(agent: Agent, call: Call, params: Params) -> None:
    timeout_s = params.seconds("timeout_s", 10.0)
    params.end()
    began_s = time.monotonic()
    deadline: Deadline | None = None

    def pong() -> None:
        if deadline is not None:
            deadline.cancel()
        call.answer({"seconds": time.monotonic() - began_s})

    try:
        agent.link().ping(pong)
    except AgentError as error:
        raise RequestError("agent", f"agent.ping: {error}") from error
    if timeout_s is not None:
        deadline = agent.refuse_later(call, timeout_s)


AGENT_METHODS: Mapping[str, Callable[[Agent, Call, Params], None]] = MappingProxyType({
    "agent.wait": _wait,
    "agent.run": _run,
    "agent.kill": _kill,
    "agent.put": _put,
    "agent.get": _get,
    "agent.read": _read,
    "agent.write": _write,
    "agent.ping": _ping,
})
