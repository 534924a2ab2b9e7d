"""The methods of the control protocol, but for the agent's; docs/control.md describes each."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType

from pyvmm.control.agent_methods import AGENT_METHODS, Agent
from pyvmm.control.connection import Call
from pyvmm.control.messages import Params, RequestError
from pyvmm.control.session import Session
from pyvmm.control.snapshot_methods import SNAPSHOT_METHODS
from pyvmm.control.target import MAX_TYPED_BYTES
from pyvmm.errors import GuestMemoryError
from pyvmm.run.outcome import Kind, Outcome

Method = Callable[[Session, Call, Params], None]

MAX_MEMORY_BYTES = 512 << 10
"""Of guest memory in one answer: base64 of it fits into a line."""
MAX_CONSOLE_TEXT = 512 << 10


def _status(session: Session, call: Call, params: Params) -> None:
    params.end()
    target = session.target
    started_s = target.facts["started_s"]
    assert isinstance(started_s, float)
    call.answer({
        **{name: value for name, value in target.facts.items() if name != "started_s"},
        "running_s": round(time.clock_gettime(time.CLOCK_BOOTTIME) - started_s, 3),
        "cpus": target.vcpu_count,
        "paused": target.is_paused,
        **session.agent.state(),
        **session.clone_state(),
        "clone": session.agent.clone(),
        **({} if target.saves is None else target.saves.facts()),
        "console_bytes": session.console.end,
        "evidence": target.evidence(),
        "outcome": None if session.ended is None else session.ended["outcome"],
    })


def _pause(session: Session, call: Call, params: Params) -> None:
    timeout_s = params.seconds("timeout_s", 10.0)
    params.end()
    _refuse_after_end(session, "pause")
    session.pause(call, timeout_s)


def _resume(session: Session, call: Call, params: Params) -> None:
    params.end()
    _refuse_after_end(session, "resume")
    session.target.resume()
    call.answer({"paused": False})
    session.look()


def _stop(session: Session, call: Call, params: Params) -> None:
    params.end()
    session.target.finish(Outcome(Kind.STOPPED))
    session.wait(call, None)


def _wait(session: Session, call: Call, params: Params) -> None:
    timeout_s = params.seconds("timeout_s")
    params.end()
    session.wait(call, timeout_s)


def _outcome(session: Session, call: Call, params: Params) -> None:
    params.end()
    call.answer({"outcome": None if session.ended is None else session.ended["outcome"]})


def _console_write(session: Session, call: Call, params: Params) -> None:
    data = params.data("data", MAX_TYPED_BYTES)
    params.end()
    _refuse_after_end(session, "console.write")
    if not session.target.type(data):
        raise RequestError(
            "limit", f"console.write: the guest does not read; at most {MAX_TYPED_BYTES} bytes "
            "may wait for it"
        )
    call.answer({})


def _console_text(session: Session, call: Call, params: Params) -> None:
    limit = params.integer("limit", 1, MAX_CONSOLE_TEXT, 64 << 10)
    params.end()
    end = session.console.end
    at, data = session.console.read(max(0, end - limit), limit)
    call.answer({"at": at, "data": base64.b64encode(data).decode()})


def _refresh(session: Session, call: Call, params: Params) -> None:
    params.end()
    _refuse_after_end(session, "disks.refresh")
    session.target.refresh_disks()
    call.answer({})


def _registers(session: Session, call: Call, params: Params) -> None:
    vcpu = params.integer("vcpu", 0, session.target.vcpu_count - 1, 0)
    params.end()
    try:
        found = session.target.registers(vcpu)
    except RuntimeError:
        raise RequestError("state", "registers: the guest runs; pause it first") from None
    call.answer({
        "values": {name: hex(getattr(found, name)) for name in found._fields}, "text": str(found),
    })


def _memory_read(session: Session, call: Call, params: Params) -> None:
    gpa = params.integer("gpa", 0, (1 << 64) - 1)
    length = params.integer("length", 0, MAX_MEMORY_BYTES)
    params.end()
    try:
        data = session.target.memory(gpa, length)
    except GuestMemoryError as error:
        raise RequestError("params", f"memory.read: {error}") from None
    call.answer({"data": base64.b64encode(data).decode()})


def _on_agent(method: Callable[[Agent, Call, Params], None]) -> Method:
    return lambda session, call, params: method(session.agent, call, params)


def _refuse_after_end(session: Session, method: str) -> None:
    if session.ended is not None:
        outcome = session.ended["outcome"]
        assert isinstance(outcome, dict)
        raise RequestError("ended", f"{method}: the run has ended: {outcome['text']}")


METHODS: Mapping[str, Method] = MappingProxyType({
    "status": _status,
    "pause": _pause,
    "resume": _resume,
    "stop": _stop,
    "wait": _wait,
    "outcome": _outcome,
    "console.write": _console_write,
    "console.text": _console_text,
    "disks.refresh": _refresh,
    "registers": _registers,
    "memory.read": _memory_read,
    **SNAPSHOT_METHODS,
    **{name: _on_agent(method) for name, method in AGENT_METHODS.items()},
})
