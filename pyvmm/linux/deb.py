"""Debian packages as files, read without dpkg: an ar archive of two tar archives (deb(5)).

The package is not trusted: names stay below the directory, and what comes out is bounded.
"""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pyvmm.errors import ConfigError
from pyvmm.linux.compression import UnpackError, pieces
from pyvmm.linux.work import PATIENT_CPU_S, Budget

MAX_PACKAGE_BYTES = 1 << 30
MAX_UNPACKED_BYTES = 4 << 30
_MAX_CONTROL_BYTES = 16 << 20
_MAGIC = b"!<arch>\n"
_HEADER_BYTES = 60
_TREES = (("boot",), ("lib", "modules"), ("usr", "lib", "modules"))
"""The parts of a kernel's package that are unpacked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deb:
    """A package file: fields of its control file, and the packed archive of its files."""

    path: Path
    name: str
    version: str
    architecture: str
    depends: str
    data: bytes


def read(path: Path) -> Deb:
    """Return the package in the file ``path``; ConfigError if it is none, or is damaged.

    HostError if this host has no program that unpacks it.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_PACKAGE_BYTES + 1)
    except OSError as error:
        raise ConfigError(str(path), str(error.strerror)) from error
    if len(content) > MAX_PACKAGE_BYTES:
        raise ConfigError(str(path), f"is larger than the limit of {MAX_PACKAGE_BYTES} bytes")
    members = dict(_members(path, content))
    control = next((data for name, data in members.items() if name.startswith("control.tar")), b"")
    data = next((data for name, data in members.items() if name.startswith("data.tar")), b"")
    if not control or not data:
        raise ConfigError(str(path), "is no Debian package (control.tar or data.tar is missing)")
    fields = _fields(path, control)
    return Deb(
        path=path, name=fields.get("Package", ""), version=fields.get("Version", ""),
        architecture=fields.get("Architecture", ""), depends=fields.get("Depends", ""), data=data,
    )


def unpack(deb: Deb, into: Path) -> None:
    """Unpack the regular files of a kernel's package ``deb``: those of /boot, and modules."""
    stream = _Stream(deb.data, MAX_UNPACKED_BYTES)
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                parts = tuple(part for part in PurePosixPath(member.name).parts if part != "/")
                wanted = any(parts[: len(tree)] == tree for tree in _TREES)
                if not wanted or not member.isreg() or ".." in parts:
                    continue
                target = into.joinpath(*parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                source = archive.extractfile(member)
                assert source is not None, "a regular file has contents"
                with target.open("wb") as file:
                    shutil.copyfileobj(source, file)
    except (tarfile.TarError, UnpackError, EOFError, ValueError) as error:
        raise ConfigError(str(deb.path), f"is damaged: {error}") from error


def _members(path: Path, content: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each member of the ar archive."""
    if not content.startswith(_MAGIC):
        raise ConfigError(str(path), "is no Debian package (no ar archive)")
    at = len(_MAGIC)
    while at + _HEADER_BYTES <= len(content):
        header = content[at : at + _HEADER_BYTES]
        size = header[48:58].strip()
        if not size.isdigit() or header[58:60] != b"`\n":
            raise ConfigError(str(path), f"is damaged: no member begins at byte {at}")
        at += _HEADER_BYTES
        end = at + int(size)
        if end > len(content):
            raise ConfigError(str(path), "is cut off")
        yield header[:16].decode("ascii", "replace").strip().rstrip("/"), content[at:end]
        at = end + end % 2


def _fields(path: Path, control: bytes) -> dict[str, str]:
    """Return the fields of the control file in the packed archive ``control``."""
    try:
        with tarfile.open(fileobj=_Stream(control, _MAX_CONTROL_BYTES), mode="r|") as archive:
            for member in archive:
                if PurePosixPath(member.name).name == "control" and member.isreg():
                    source = archive.extractfile(member)
                    assert source is not None, "a regular file has contents"
                    text = source.read(_MAX_CONTROL_BYTES).decode("utf-8", "replace")
                    pairs = (line.partition(":") for line in text.splitlines())
                    return {name: value.strip() for name, _, value in pairs if value}
    except (tarfile.TarError, UnpackError, EOFError, ValueError) as error:
        raise ConfigError(str(path), f"is damaged: {error}") from error
    raise ConfigError(str(path), "is no Debian package (its control file is missing)")


class _Stream(io.RawIOBase):
    """The unpacked bytes of ``packed``, for tarfile's stream mode."""

    def __init__(self, packed: bytes, limit: int) -> None:
        super().__init__()
        self._pieces = pieces(packed, limit=limit, budget=Budget(cpu_s=PATIENT_CPU_S))
        self._rest = b""

    def readable(self) -> bool:
        """Return True."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Return ``size`` bytes, fewer only at the end."""
        parts, have = [self._rest], len(self._rest)
        while size < 0 or have < size:
            piece = next(self._pieces, b"")
            if not piece:
                break
            parts.append(piece)
            have += len(piece)
        data = b"".join(parts)
        if size < 0:
            size = len(data)
        data, self._rest = data[:size], data[size:]
        return data
