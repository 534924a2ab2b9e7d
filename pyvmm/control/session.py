"""All that the methods of the control server act upon: the machine, its console, its end."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable

from pyvmm.agent.clone import HOOK_TIMEOUT_S, CloneNotice
from pyvmm.control.agent_bridge import AgentBridge
from pyvmm.control.agent_methods import Agent
from pyvmm.control.connection import Call
from pyvmm.control.console_log import ConsoleLog
from pyvmm.control.saves import Rewound
from pyvmm.control.target import Target
from pyvmm.control.worker import Worker
from pyvmm.errors import PyvmmError
from pyvmm.run.io_loop import Deadline, IoLoop
from pyvmm.run.outcome import Kind, Outcome
from pyvmm.startup.types import name_of

LAB_SLOWNESS = 5
"""The lab's emulated processor is slow: a hook has more time there."""
_IN_THE_LAB = "PYVMM_LAB"
"""``pyvmm.lab.INSIDE``, without the imports of the lab."""
FIRST_LOOK_S, LAST_LOOK_S = 0.001, 0.05
"""Seconds between two looks whether the guest has paused: the pauses grow."""


class Session:
    """The state of one run, for all clients; every method is called in the thread of ``loop``.

    ``tell`` sends an event to those who subscribed to its kind.  ``take_back`` is called when the
    machine was rewound, ``idle`` when no work is left that was done beside the loop.
    """

    def __init__(
        self, target: Target, loop: IoLoop, *, tell: Callable[[dict[str, object]], None],
        take_back: Callable[[Rewound], None], idle: Callable[[], None],
    ) -> None:
        self.target = target
        self.loop = loop
        self.console = ConsoleLog()
        self.worker = Worker(loop, idle)
        port = target.agent_port
        bridge = None if port is None else AgentBridge(
            port, wake=loop.wake, on_state=self._agent_changed, notice=self._notice
        )
        self.agent = Agent(
            loop, bridge, is_brought=target.facts.get("agent_way") == "inject",
            clone_id=lambda: target.clone_id,
        )
        self.ended: dict[str, object] | None = None
        """The event that tells of the end; None before it."""
        self._tell, self._take_back = tell, take_back
        self._waiting: list[Call] = []
        self._told: dict[str, object] = self.state()

    # Pausing

    def state(self) -> dict[str, object]:
        """Return the event that tells of the present state."""
        return {
            "event": "state", "paused": self.target.is_paused, **self.agent.state(),
            **self.clone_state(),
        }

    def look(self) -> None:
        """Look at what other threads have brought, and tell of a state that has changed."""
        self.agent.pump()
        if (now := self.state()) != self._told:
            self._told = now
            self._tell(now)

    def _agent_changed(self) -> None:
        self.agent.look()
        # Not at once: a link that is lost tells its jobs of it first.
        self.loop.call_soon(self.look)

    def pause(self, call: Call, timeout_s: float | None) -> None:
        """Pause the guest; answer once every vCPU is out of it."""
        self.target.begin_pause()
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._await_pause(call, until_s, FIRST_LOOK_S)
        self.look()

    def _await_pause(self, call: Call, until_s: float | None, delay_s: float) -> None:
        if call.is_over:
            return
        if self.ended is not None:
            call.refuse("ended", "pause: the run has ended")
        elif not self.target.is_paused:
            call.refuse("state", "pause: another client has resumed the guest meanwhile")
        elif self.target.is_at_rest:
            call.answer({"paused": True})
        elif until_s is not None and time.monotonic() >= until_s:
            call.refuse(
                "timeout", "pause: a vCPU is still at a device, say at a full console; the pause "
                "stays asked for"
            )
        else:
            after_s = min(delay_s * 2, LAST_LOOK_S)
            self.loop.call_in(delay_s, lambda: self._await_pause(call, until_s, after_s))

    # Clones and rewinds

    def clone_state(self) -> dict[str, object]:
        """Return the field that tells which clone the machine is."""
        clone_id = self.target.clone_id
        return {"clone_id": None if clone_id is None else str(clone_id)}

    def rewound(self, call: Call, rewound: Rewound) -> None:
        """The machine was rewound: take back its end, and have its agent told."""
        if rewound.had_ended:
            self.ended = None
            self.agent.begin_again()
        self._take_back(rewound)
        self._tell({
            "event": "rewound", "paused": self.target.is_paused, **self.clone_state(),
            "unfinished": base64.b64encode(rewound.unfinished).decode(),
        })
        call.answer({"paused": self.target.is_paused, **self.clone_state()})
        self.look()

    def _notice(self) -> CloneNotice | None:
        """Return the notice to the guest of a clone."""
        clone_id = self.target.clone_id
        if clone_id is None:
            return None
        slowness = LAB_SLOWNESS if os.environ.get(_IN_THE_LAB) else 1
        return CloneNotice(
            clone_id=clone_id, sets_clock=self.target.sets_clock,
            hook_timeout_s=HOOK_TIMEOUT_S * slowness,
        )

    # The end

    def wait(self, call: Call, timeout_s: float | None) -> None:
        """Answer with the outcome once the run has ended; with null after ``timeout_s``."""
        if self.ended is not None:
            call.answer({"outcome": self.ended["outcome"]})
            return
        deadline: Deadline | None = None

        def give_up() -> None:
            if call.is_over:  # the run has ended
                return
            self._waiting.remove(call)
            call.answer({"outcome": None})

        def forget() -> None:
            self._waiting.remove(call)
            if deadline is not None:  # a client may ask for a year, and go, again and again
                deadline.cancel()

        self._waiting.append(call)
        call.when_over = forget
        if timeout_s is not None:
            deadline = self.loop.call_in(timeout_s, give_up)

    def end(self, ended: dict[str, object]) -> None:
        """The run has ended: answer all who wait for it."""
        self.ended = ended
        self.agent.end()
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            call.answer({"outcome": ended["outcome"]})


def outcome_message(outcome: Outcome) -> dict[str, object]:
    """Return ``outcome`` as JSON values; ``kind`` is the name of a member of ``Kind``."""
    return {
        "kind": name_of(Kind, outcome.kind), "value": outcome.value, "detail": outcome.detail,
        "exit_status": outcome.exit_status, "text": str(outcome),
    }


def ended_event(target: Target, outcome: Outcome) -> dict[str, object]:
    """Return the event that tells of the end; the vCPUs are at rest."""
    registers, texts = [], []
    for vcpu in range(target.vcpu_count):
        try:
            found = target.registers(vcpu)
        except (PyvmmError, RuntimeError, OSError):
            continue  # a thread is stuck in KVM: its registers are not known
        registers.append({name: hex(getattr(found, name)) for name in found._fields})
        texts.append(f"vcpu{vcpu}: {found}")
    return {
        "event": "ended", "outcome": outcome_message(outcome), "evidence": target.evidence(),
        "registers": texts, "register_values": registers,
        "kernel": {
            name.removeprefix("kernel_"): target.facts[name]
            for name in ("kernel", "kernel_release", "kernel_version", "is_linux")
        },
    }
