"""The agent of a machine that is a clone, or was rewound: it is told before it counts as ready."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.patience import patient
from tests.support.stand_in_port import StandInPort
from tests.support.stand_in_saves import StandInSaves, problem_of, saves_of
from tests.support.stand_in_target import Served, served, wait_until


@contextmanager
def cloned(folder: Path, *, is_clone: bool = True) -> Iterator[tuple[Served, StandInPort]]:
    port = StandInPort()
    try:
        with served(folder, port) as rig:
            saves = StandInSaves(rig.target)
            rig.target.saves = saves

            def rewind() -> None:
                port.shut()
                port.open()

            saves.on_rewind = rewind
            rig.target.clone_id = uuid.uuid4() if is_clone else None
            yield rig, port
    finally:
        port.close()


def test_the_agent_of_a_clone_is_waited_for_until_its_hook_has_ended(tmp_path: Path) -> None:
    with cloned(tmp_path) as (rig, port):
        port.hook_status = None
        port.open()
        client = rig.client()
        waiting = client.begin("agent.wait")
        wait_until(lambda: len(port.notices) == 1)
        status = client.call("status")
        assert (status["agent"], status["clone"]) == ("waiting", None)
        assert problem_of(client.begin("agent.run", {"argv": ["echo", "x"]})).kind == "agent"
        error = problem_of(client.begin("agent.wait", {"timeout_s": 0.01}))
        assert "its hook /etc/pyvmm/clone may still run" in str(error)
        port.end_hook(0)
        assert waiting.result(patient(10))["text"] == "stand-in"
        assert client.call("agent.run", {"argv": ["echo", "x"]})["kind"] == "exited"
        assert rig.target.clone_id is not None
        assert port.notices[0][16:32] == rig.target.clone_id.bytes
        assert client.call("status")["clone"] == {
            "told": True, "reseeded": True, "clock_set": True, "hook": "exited", "value": 0,
            "reason": "", "output": "said by the hook",
        }


def test_a_hook_that_fails_is_the_answer_to_who_waits_and_told_by_status(tmp_path: Path) -> None:
    with cloned(tmp_path) as (rig, port):
        port.hook_status = 3
        events: list[dict[str, Any]] = []
        client = rig.client(on_event=events.append)
        client.call("subscribe", {"events": ["state"]})
        waiting = client.begin("agent.wait")
        port.open()
        for pending in (waiting, client.begin("agent.wait")):
            error = problem_of(pending)
            assert error.kind == "agent"
            assert str(error) == (
                "agent.wait: the hook for clones in the guest, /etc/pyvmm/clone, exited with "
                "status 3: said by the hook"
            )
        status = client.call("status")
        assert status["agent"] == "ready"
        assert "exited with status 3" in status["problem"]
        wait_until(lambda: any("status 3" in event.get("problem", "") for event in events))
        # It still takes orders, from whoever wants to look.
        assert client.call("agent.run", {"argv": ["echo", "x"]})["kind"] == "exited"


def test_the_agent_is_told_again_after_each_rewind(tmp_path: Path) -> None:
    with cloned(tmp_path, is_clone=False) as (rig, port):
        port.open()
        client = rig.client()
        client.call("agent.wait")
        assert port.notices == []
        client.call("checkpoint")
        seeds = set()
        for count in range(1, 4):
            client.call("rewind")
            client.call("agent.wait")
            assert client.call("agent.run", {"argv": ["echo", "x"]})["kind"] == "exited"
            assert len(port.notices) == count
            seeds.add(port.notices[-1][32:])
        assert len(seeds) == 3


def test_a_command_from_before_a_rewind_is_lost(tmp_path: Path) -> None:
    with cloned(tmp_path) as (rig, port):
        port.open()
        client = rig.client()
        client.call("agent.wait")
        client.call("checkpoint")
        running = client.begin("agent.run", {"argv": ["sleep"]})
        client.call("status")
        client.call("rewind")
        assert running.result(patient(10))["kind"] == "lost"
        client.call("agent.wait")


def test_a_link_that_has_not_seen_the_rewind_yet_takes_no_orders(tmp_path: Path) -> None:
    """The port closes a moment after the rewind was answered."""
    with cloned(tmp_path) as (rig, port):
        saves = saves_of(rig)
        saves.on_rewind = lambda: None
        port.open()
        client = rig.client()
        client.call("agent.wait")
        client.call("checkpoint")
        client.call("rewind")
        error = problem_of(client.begin("agent.run", {"argv": ["echo", "x"]}))
        assert "the machine was rewound" in str(error)
        waiting = client.begin("agent.wait")
        port.shut()
        port.open()
        waiting.result(patient(10))
        assert len(port.notices) == 2
