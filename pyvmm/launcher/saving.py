"""Snapshots, checkpoints and rewinds of a machine in another process."""

from __future__ import annotations

import os

from pyvmm.api.arguments import check_checkpoint, check_flag, check_path_or_none
from pyvmm.control.client import ControlError, Pending
from pyvmm.errors import HostError, SnapshotError
from pyvmm.launcher.clones import Clones
from pyvmm.launcher.session import Session
from pyvmm.report import escape
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike
    from typing import Any

WORK_TIMEOUT_S = 900.0
"""Time for a snapshot to be written, behind those of other clients."""


def snapshot(
    session: Session, directory: str | PathLike[str] | None, *, live: bool, diff: bool
) -> Clones:
    """Save the machine and return the clones of it; see ``Vm.snapshot``."""
    check_path_or_none("directory", directory)
    check_flag("live", live)
    check_flag("diff", diff)

    def make(path: str) -> None:
        _call(session, "snapshot", {"dir": path, "live": live, "diff": diff})

    if directory is None:
        return Clones.in_temporary_directory(make)
    path = os.path.abspath(directory)
    make(path)
    return Clones(path)


def checkpoint(session: Session) -> int:
    """See ``Vm.checkpoint``."""
    number: int = _call(session, "checkpoint", {})["number"]
    return number


def rewind(session: Session, number: int | None) -> None:
    """See ``Vm.rewind``."""
    check_checkpoint(number)
    session.check_open("rewind()")
    session.state.refuse_own_thread("rewind()")
    session.state.raise_if_failed()
    # Not as other calls: it is for a run that has ended, too.
    pending = session.begin("rewind", {"number": number})
    try:
        _result(pending)
    except ControlError as error:
        if error.kind == "closed":
            session.state.wait_for_notice()
            session.state.raise_if_over("rewind()")
        raise


def _call(session: Session, method: str, params: dict[str, object]) -> dict[str, Any]:
    session.check_open(f"{method}()")
    session.state.refuse_own_thread(f"{method}()")
    pending = session.send(method, params)
    try:
        return _result(pending)
    except ControlError as error:
        if error.kind in ("closed", "ended"):
            session.state.wait_for_notice()
            session.state.raise_if_over(f"{method}()")
        raise


def _result(pending: Pending) -> dict[str, Any]:
    """Return the answer to a request that may take long; raise the error of the machine's process.
    """
    try:
        return pending.result(WORK_TIMEOUT_S)
    except TimeoutError:
        raise HostError(
            f"the process of the VM has not answered in {WORK_TIMEOUT_S:g} s"
        ) from None
    except ControlError as error:
        if error.kind == "snapshot" and error.details:
            raise SnapshotError(
                escape(str(error.details["subject"])), escape(str(error.details["problem"]))
            ) from None
        if error.kind == "host":
            raise HostError(escape(str(error))) from None
        raise
