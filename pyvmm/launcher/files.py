"""Files and directories of the guest: ``put``, ``get``, ``read`` and ``write`` of a ``Vm``."""

from __future__ import annotations

import errno
import os

from pyvmm.control.packing import pack, put_place
from pyvmm.control.unpacking import Unpacker
from pyvmm.errors import AgentError, ConfigError
from pyvmm.launcher.errors import OutputLimitError
from pyvmm.launcher.session import Session
from pyvmm.launcher.transfer import CHUNK_BYTES, Transfer
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike

MAX_READ_BYTES = 64 << 20
"""The most that ``read`` keeps in memory."""


def put(session: Session, source: str | PathLike[str], target: str, timeout_s: float) -> None:
    """See ``Vm.put``."""
    _check_path("put", target)
    local = os.fsdecode(source)
    what = f"put {local} to {target}"
    is_directory = target.endswith("/") or _is_directory(session, target, timeout_s, what)
    place, name = put_place(local, target, target_is_directory=is_directory)
    skipped: list[str] = []
    pieces = pack(local, name, skipped)
    with Transfer(
        session, "agent.put", {"path": place}, is_input=True, timeout_s=timeout_s, what=what
    ) as transfer:
        for piece in pieces:
            transfer.write(piece)
        transfer.finish()
    _tell(session, skipped)


def get(session: Session, source: str, target: str | PathLike[str], timeout_s: float) -> None:
    """See ``Vm.get``."""
    _check_path("get", source)
    local = os.fsdecode(target)
    with Unpacker(local) as unpacker, Transfer(
        session, "agent.get", {"path": source}, is_input=False, timeout_s=timeout_s,
        what=f"get {source} to {local}",
    ) as transfer:
        while data := transfer.read(CHUNK_BYTES):
            unpacker.feed(data)
        transfer.finish()  # first, because the agent's reason explains a stream that is not whole
        unpacker.end()
    _tell(session, unpacker.skipped)


def read(session: Session, path: str, timeout_s: float) -> bytes:
    """See ``Vm.read``."""
    _check_path("read", path)
    data = bytearray()
    with Transfer(
        session, "agent.read", {"path": path}, is_input=False, timeout_s=timeout_s,
        what=f"read {path}",
    ) as transfer:
        while piece := transfer.read(CHUNK_BYTES):
            data += piece
            if len(data) > MAX_READ_BYTES:
                raise OutputLimitError(
                    f"read {path}: has more than {MAX_READ_BYTES >> 20} MiB; use get"
                )
        transfer.finish()
    return bytes(data)


def write(
    session: Session, path: str, data: bytes | str, mode: int, timeout_s: float
) -> None:
    """See ``Vm.write``."""
    _check_path("write", path)
    data = data.encode() if isinstance(data, str) else data
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"write takes str or bytes, not {type(data).__name__}")
    with Transfer(
        session, "agent.write", {"path": path, "mode": mode}, is_input=True, timeout_s=timeout_s,
        what=f"write {path}",
    ) as transfer:
        transfer.write(bytes(data))
        transfer.finish()


def _is_directory(session: Session, path: str, timeout_s: float, what: str) -> bool:
    """True if the guest has a directory ``path``, or a link to one.

    Reading ``PATH/.`` fails in any case: the error says why.
    """
    with Transfer(
        session, "agent.read", {"path": f"{path}/."}, is_input=False, timeout_s=timeout_s,
        what=what,
    ) as transfer:
        try:
            transfer.finish()
        except AgentError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
                return error.errno == errno.EISDIR
            raise
    return True


def _tell(session: Session, skipped: list[str]) -> None:
    for line in skipped:
        session.report(line)


def _check_path(call: str, path: object) -> None:
    """Raise unless ``path`` is an absolute path of the guest."""
    if not isinstance(path, str):
        raise TypeError(f"{call}: the guest's path must be str, not {type(path).__name__}")
    if not path.startswith("/"):
        raise ConfigError(f"{call} {path}", "a path in the guest must begin with /")
