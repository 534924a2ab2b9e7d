"""Files and directories of the guest: ``put``, ``get``, ``read`` and ``write`` of a ``Vm``."""

from __future__ import annotations

import errno
import os
import posixpath
import tarfile
from typing import IO, cast

from pyvmm.errors import AgentError, ConfigError, HostError
from pyvmm.launcher.errors import OutputLimitError
from pyvmm.launcher.extract import Extractor
from pyvmm.launcher.session import Session
from pyvmm.launcher.tar_reader import TarError, TarReader
from pyvmm.launcher.transfer import CHUNK_BYTES, RefusedError, Transfer
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike

MAX_READ_BYTES = 64 << 20
"""The most that ``read`` keeps in memory."""


def put(session: Session, source: str | PathLike[str], target: str, timeout_s: float) -> None:
    """See ``Vm.put``."""
    _check_path("put", target)
    path = os.path.realpath(os.fspath(source))
    if not os.path.lexists(path):
        raise ConfigError(f"put {os.fspath(source)}", "there is no such file or directory")
    own_name = os.path.basename(os.path.abspath(os.fspath(source)))
    if target.endswith("/") or _is_directory(session, target, timeout_s):
        place, name = target, own_name
    else:
        place, name = posixpath.split(target)
    what = f"put {os.fspath(source)} to {target}"
    with Transfer(
        session, "agent.put", {"path": place}, is_input=True, timeout_s=timeout_s, what=what
    ) as transfer:
        try:
            with tarfile.open(
                fileobj=cast("IO[bytes]", transfer), mode="w|", format=tarfile.GNU_FORMAT,
                bufsize=CHUNK_BYTES,
            ) as archive:
                archive.add(path, arcname=name, filter=_owned_by_root)
        except OSError as error:
            raise ConfigError(what, f"cannot be read: {error}") from error
        transfer.finish()


def get(session: Session, source: str, target: str | PathLike[str], timeout_s: float) -> None:
    """See ``Vm.get``."""
    _check_path("get", source)
    local = os.fspath(target)
    own_name = posixpath.basename(posixpath.normpath(source)) or "root"
    if local.endswith("/") or os.path.isdir(local):
        place, name = local, own_name
    else:
        place, name = os.path.split(local)
    what = f"get {source} to {local}"
    if not os.path.isdir(place or "."):
        raise ConfigError(what, f"there is no directory {place}")
    with Transfer(
        session, "agent.get", {"path": source}, is_input=False, timeout_s=timeout_s, what=what
    ) as transfer:
        try:
            Extractor(place or ".", name, session.report).extract(TarReader(transfer.read))
        except TarError as error:
            transfer.finish()  # the agent's own reason comes first
            raise AgentError(f"{what}: the guest sent {error}") from None
        except OSError as error:
            raise HostError(f"{what}: {error}") from error
        transfer.finish()


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


def _is_directory(session: Session, path: str, timeout_s: float) -> bool:
    """True if the guest has a directory ``path``, or a link to one.

    Reading ``PATH/.`` fails in any case: the error says why.
    """
    with Transfer(
        session, "agent.read", {"path": f"{path}/."}, is_input=False, timeout_s=timeout_s,
        what=f"put to {path}",
    ) as transfer:
        try:
            transfer.finish()
        except RefusedError as error:
            return error.errno == errno.EISDIR
    return True


def _owned_by_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def _check_path(call: str, path: object) -> None:
    """Raise unless ``path`` is an absolute path of the guest."""
    if not isinstance(path, str):
        raise TypeError(f"{call}: the guest's path must be str, not {type(path).__name__}")
    if not path.startswith("/"):
        raise ConfigError(f"{call} {path}", "a path in the guest must begin with /")
