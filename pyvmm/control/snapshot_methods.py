"""The methods of the control protocol that save a machine and go back; see docs/control.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from pyvmm.agent.protocol import MAX_PATH
from pyvmm.control.connection import Call
from pyvmm.control.messages import Params, RequestError
from pyvmm.control.saves import Saved, Saves
from pyvmm.control.session import Session

MAX_NUMBER = (1 << 53) - 1


def _snapshot(session: Session, call: Call, params: Params) -> None:
    directory = params.optional_text("dir", MAX_PATH)
    is_live, is_diff = params.boolean("live"), params.boolean("diff")
    params.end()
    if directory is not None and not directory.startswith("/"):
        raise params.error("dir", "must be an absolute path: the machine may be elsewhere")
    saves = _saves(session, call)

    def done(saved: Saved) -> None:
        call.answer({"id": saved.id, "path": saved.path})

    session.worker.submit(
        call, lambda: saves.snapshot(directory, is_live=is_live, is_diff=is_diff), done
    )


def _checkpoint(session: Session, call: Call, params: Params) -> None:
    params.end()
    session.worker.submit(
        call, _saves(session, call).checkpoint, lambda number: call.answer({"number": number})
    )


def _rewind(session: Session, call: Call, params: Params) -> None:
    number = params.optional_integer("number", 0, MAX_NUMBER)
    params.end()
    saves = _saves(session, call)
    session.worker.submit(
        call, lambda: saves.rewind(number), lambda rewound: session.rewound(call, rewound)
    )


def _saves(session: Session, call: Call) -> Saves:
    saves = session.target.saves
    if saves is None:
        raise RequestError("snapshot", f"{call.method}: this machine cannot be saved")
    return saves


SNAPSHOT_METHODS: Mapping[str, Callable[[Session, Call, Params], None]] = MappingProxyType({
    "snapshot": _snapshot,
    "checkpoint": _checkpoint,
    "rewind": _rewind,
})
