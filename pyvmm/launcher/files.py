"""Files and directories of the guest: ``put``, ``get``, ``read`` and ``write`` of a ``Vm``."""

from __future__ import annotations

from pyvmm.launcher.session import Session
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike


def put(session: Session, source: str | PathLike[str], target: str, timeout_s: float) -> None:
    """See ``Vm.put``."""
    raise NotImplementedError


def get(session: Session, source: str, target: str | PathLike[str], timeout_s: float) -> None:
    """See ``Vm.get``."""
    raise NotImplementedError


def read(session: Session, path: str, timeout_s: float) -> bytes:
    """See ``Vm.read``."""
    raise NotImplementedError


def write(
    session: Session, path: str, data: bytes | str, mode: int, timeout_s: float
) -> None:
    """See ``Vm.write``."""
    raise NotImplementedError
