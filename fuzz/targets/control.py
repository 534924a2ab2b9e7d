"""Requests to the control server: lines of JSON, their parameters, and what the methods answer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, cast

from fuzz.target import Target
from pyvmm.control.connection import Call, Connection
from pyvmm.control.messages import (
    LineReader,
    Params,
    RequestError,
    encode,
    id_of,
    parse_request,
)
from pyvmm.control.methods import METHODS
from pyvmm.control.session import Session
from pyvmm.run.io_loop import IoLoop
from tests.support.stand_in_target import StandInTarget

_SEEDS: tuple[tuple[str, dict[str, object]], ...] = (
    ("status", {}), ("pause", {"timeout_s": 1.5}), ("resume", {}), ("wait", {"timeout_s": None}),
    ("console.write", {"data": "bHMK"}), ("console.text", {"limit": 10}), ("outcome", {}),
    ("registers", {"vcpu": 1}), ("memory.read", {"gpa": 16, "length": 32}),
    ("agent.run", {"argv": ["ls", "\udcff"], "env": {"A": "b"}, "cwd": "/", "stdout": None}),
    ("agent.kill", {"request": 1, "signal": 9}), ("agent.put", {"path": "/tmp", "fd": 0}),
    ("snapshot", {"dir": "/a", "live": True, "diff": False}), ("checkpoint", {}),
    ("rewind", {"number": 1}),
    ("agent.write", {"path": "/f", "mode": 420, "fd": 0}), ("agent.wait", {"timeout_s": 0}),
)


class _Client:
    """Takes answers, which must be what JSON can say."""

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}

    def send(self, message: dict[str, Any]) -> None:
        """Check an answer."""
        assert json.loads(encode(message))["id"] == message["id"]

    def end_call(self, _call: Call) -> None:
        """The call is over."""


class ControlTarget(Target):
    """Every line is a request or a RequestError; every request is served or a RequestError."""

    words = (
        b'{"id":', b'"method":"', b'"params":{', b'"fds":', b"status", b"agent.run", b"\\ud800",
        b"1e309", b"NaN", b"null", b"[[[[", b"\xff", b"\n", b'"argv":[', b"\\u0000", b"-1",
        *(name.encode() for name in METHODS),
    )

    def seeds(self) -> Iterable[bytes]:
        """Return one good request of every method, and some lines at once."""
        lines = [
            encode({"id": number, "method": method, "params": params})
            for number, (method, params) in enumerate(_SEEDS)
        ]
        return [*lines, b"".join(lines)]

    def run(self, data: bytes) -> None:
        """Serve the lines of ``data``, which come in two pieces."""
        loop = IoLoop()
        try:
            session = Session(
                StandInTarget(), loop, tell=lambda event: None, take_back=lambda rewound: None,
                idle=lambda: None,
            )
            reader = LineReader(1024)
            half = len(data) // 2
            for piece in (data[:half], data[half:], b"\n"):
                reader.feed(piece)
                try:
                    while (line := reader.next_line()) is not None:
                        _serve(session, line)
                except RequestError:
                    return  # a line that is too long ends the connection
        finally:
            loop.close()


def _serve(session: Session, line: bytes) -> None:
    try:
        request = parse_request(line)
    except RequestError:
        id_of(line)
        return
    call = Call(cast(Connection, _Client()), request.id, request.method)
    params = Params(request.method, request.params, [])
    method = METHODS.get(request.method)
    if method is None:
        return
    try:
        method(session, call, params)
    except RequestError as error:
        if error.kind not in ("params", "state", "agent", "limit", "ended"):
            raise


def make() -> Target:
    """Return the target."""
    return ControlTarget()
