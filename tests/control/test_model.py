"""Random legal use by several clients at once, against a model of what each must be told."""

from __future__ import annotations

import base64
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvmm.control.client import Client, ControlError, Pending
from pyvmm.run.outcome import Kind, Outcome
from tests.support.patience import patient
from tests.support.stand_in_port import StandInPort
from tests.support.stand_in_saves import StandInSaves
from tests.support.stand_in_target import Served, served, wait_until

SEEDS = range(4)
STEPS = 250


@pytest.fixture
def port() -> Iterator[StandInPort]:
    found = StandInPort()
    yield found
    found.close()


class Subscriber:
    """A client that takes all events, and the model of what it must have heard."""

    def __init__(self, rig: Served) -> None:
        self.heard = bytearray()
        self.states: list[dict[str, Any]] = []
        self.rewound: list[str] = []
        self.ended: list[dict[str, Any]] = []
        self.client = rig.client(on_event=self._take)
        answer = self.client.call("subscribe", {
            "events": ["console", "state", "ended", "rewound"],
        })
        self.start = answer["at"]

    def _take(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "console":
                assert event["at"] == self.start + len(self.heard)
                self.heard += base64.b64decode(event["data"])
            case "state":
                self.states.append(event)
            case "rewound":
                self.rewound.append(event["clone_id"])
            case "ended":
                self.ended.append(event)


class Model:
    """The clients, the machine, and all that was asked for and not answered yet."""

    def __init__(self, rig: Served, port: StandInPort, chance: random.Random) -> None:
        self.rig, self.port, self.chance = rig, port, chance
        self.subscribers = [Subscriber(rig) for _ in range(3)]
        self.printed = bytearray()
        self.is_paused = False
        self.typed = b""
        self.waiting: list[Pending] = []
        self.sleeping: list[tuple[Client, Pending]] = []
        self.floods: list[tuple[Pending, int, threading.Thread, list[int]]] = []
        self.saves = StandInSaves(rig.target)
        self.saves.on_rewind = self._reconnect
        rig.target.saves = self.saves
        self.checkpoints = 0
        self.clones: list[str] = []

    def _reconnect(self) -> None:
        """The port of a machine that was rewound is closed, and its agent comes forward again."""
        self.port.shut()
        self.port.open()

    @property
    def client(self) -> Client:
        """Return any client."""
        return self.chance.choice(self.subscribers).client

    def print_out(self) -> None:
        data = self.chance.randbytes(self.chance.choice((1, 100, 5000, 40_000)))
        self.printed += data
        self.rig.target.print_out(data)

    def pause(self) -> None:
        assert self.client.call("pause") == {"paused": True}
        self.is_paused = True

    def resume(self) -> None:
        assert self.client.call("resume") == {"paused": False}
        self.is_paused = False

    def registers(self) -> None:
        vcpu = self.chance.randrange(2)
        try:
            found = self.client.call("registers", {"vcpu": vcpu})
        except ControlError as error:
            if self.is_paused or error.kind != "state":
                raise
        else:
            assert self.is_paused
            assert int(found["values"]["rax"], 16) == vcpu

    def type(self) -> None:
        data = self.chance.randbytes(10)
        self.client.call("console.write", {"data": base64.b64encode(data).decode()})
        self.typed += data
        assert self.rig.target.typed == self.typed

    def status(self) -> None:
        status = self.client.call("status")
        assert status["paused"] == self.is_paused
        assert status["console_bytes"] == len(self.printed)
        assert status["agent"] == "ready"

    def wait(self) -> None:
        self.waiting.append(self.client.begin("wait"))

    def echo(self) -> None:
        assert self.client.call("agent.run", {"argv": ["echo", "x"]})["value"] == 0

    def sleep(self) -> None:
        if len(self.sleeping) < 5:
            client = self.client
            self.sleeping.append((client, client.begin("agent.run", {"argv": ["sleep"]})))
            client.call("status")  # a rewind that another client asks for comes behind it

    def kill(self) -> None:
        if self.sleeping:
            client, pending = self.sleeping.pop(self.chance.randrange(len(self.sleeping)))
            number = self.chance.randrange(1, 32)
            client.call("agent.kill", {"request": pending.id, "signal": number})
            assert pending.result(patient(20))["value"] == number

    def flood(self) -> None:
        if len(self.floods) >= 5:
            return
        size = self.chance.randrange(300_000)
        reads, writes = os.pipe()
        client = self.client
        pending = client.begin(
            "agent.run", {"argv": ["flood", str(size)], "stdout": 0}, [writes]
        )
        os.close(writes)
        client.call("status")
        counts: list[int] = []

        def read() -> None:
            total = 0
            while data := os.read(reads, 5000):
                total += len(data)
            os.close(reads)
            counts.append(total)

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        self.floods.append((pending, size, thread, counts))

    def end_flood(self) -> None:
        if self.floods:
            pending, size, thread, counts = self.floods.pop(0)
            assert pending.result(patient(20))["value"] == 0
            thread.join(patient(20))
            assert counts == [size]

    def checkpoint(self) -> None:
        self.checkpoints += 1
        assert self.client.call("checkpoint") == {"number": self.checkpoints}

    def snapshot(self) -> None:
        taken = self.client.call("snapshot", {"dir": "/a", "live": self.chance.random() < 0.5})
        assert self.client.call("status")["snapshot"] == taken

    def rewind(self) -> None:
        if not self.saves.can_rewind:
            return
        self.clones.append(self.client.call("rewind")["clone_id"])
        for _, pending in self.sleeping:
            assert pending.result(patient(20))["kind"] == "lost"
        for pending, size, thread, counts in self.floods:
            kind = pending.result(patient(20))["kind"]
            thread.join(patient(20))
            assert counts[0] <= size
            assert kind == "lost" or counts == [size]
        self.sleeping, self.floods = [], []
        self.client.call("agent.wait")
        assert len(self.port.notices) == len(self.clones)
        assert self.client.call("status")["clone_id"] == self.clones[-1]

    def come_and_go(self) -> None:
        """A fourth client leaves a command behind, which is killed."""
        with self.rig.client() as client:
            before = len(self.port.killed)
            client.begin("agent.run", {"argv": ["sleep"]})
            client.call("status")
        wait_until(lambda: len(self.port.killed) > before)
        assert self.port.killed[-1][1] == 9

    def check(self) -> None:
        """After the end, everybody has been told everything."""
        for subscriber in self.subscribers:
            assert bytes(subscriber.heard) == bytes(self.printed[subscriber.start :])
            assert len(subscriber.ended) == 1
            for one, next_one in zip(subscriber.states, subscriber.states[1:], strict=False):
                assert one != next_one
            assert subscriber.rewound == self.clones
        for pending in self.waiting:
            assert pending.result(patient(20))["outcome"]["kind"] == "POWER_OFF"
        for _, pending in self.sleeping:
            assert pending.result(patient(20))["kind"] == "lost"


@pytest.mark.parametrize("seed", SEEDS)
def test_any_legal_use_is_answered_as_the_model_says(
    tmp_path: Path, port: StandInPort, seed: int
) -> None:
    chance = random.Random(seed)
    with served(tmp_path, port) as rig:
        port.open()
        with rig.client() as client:
            client.call("agent.wait")
        model = Model(rig, port, chance)
        steps: list[Callable[[], None]] = [
            model.print_out, model.print_out, model.pause, model.resume, model.registers,
            model.type, model.status, model.wait, model.echo, model.sleep, model.kill,
            model.flood, model.end_flood, model.come_and_go, model.checkpoint, model.snapshot,
            model.rewind,
        ]
        for _ in range(STEPS):
            chance.choice(steps)()
        while model.floods:
            model.end_flood()
        for each in model.subscribers:
            each.client.call("status")  # all that was asked for is under way
        rig.target.finish(Outcome(Kind.POWER_OFF))
        rig.end()
        wait_until(lambda: all(each.client.is_closed for each in model.subscribers))
        model.check()
