"""Disks as objects: each opens a backend when a machine is built, and may be used again.

``RawDisk``, ``NbdDisk``, ``MemoryDisk``, ``Overlay`` and ``FaultyDisk`` are descriptions.
``DiskWrapper`` is for people who write a backend of their own around another.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence

from pyvmm.errors import ConfigError
from pyvmm.startup.types import TYPE_CHECKING, Protocol
from pyvmm.storage.memory import MemoryBackend
from pyvmm.storage.open import DiskSource, open_backend, open_overlay

if TYPE_CHECKING:
    from os import PathLike

    from pyvmm.storage.backend import BlockBackend

MAX_MEMORY_DISK_BYTES = 1 << 40


class Disk(Protocol):
    """A description of a disk: ``MachineConfig.disks`` takes objects of this kind."""

    @property
    def name(self) -> str:
        """The disk in messages."""

    @property
    def read_only(self) -> bool:
        """True if the guest cannot write."""

    @property
    def is_shared(self) -> bool:
        """True if others may use the same bytes, because no guest writes them."""

    def open(
        self, *, report: Callable[[str], None], until_s: float | None, made: contextlib.ExitStack
    ) -> BlockBackend:
        """Return a new backend; the caller closes it.  ``storage.open.open_backend`` has the rest.
        """


class _File:
    """A file or an NBD server's disk."""

    def __init__(self, location: str, *, read_only: bool, any_format: bool) -> None:
        self.source = DiskSource(location=location, read_only=read_only, is_raw=any_format)

    @property
    def name(self) -> str:
        """See ``Disk.name``."""
        return self.source.location

    @property
    def read_only(self) -> bool:
        """See ``Disk.read_only``."""
        return self.source.read_only

    @property
    def is_shared(self) -> bool:
        """See ``Disk.is_shared``."""
        return self.source.is_shared

    def open(
        self, *, report: Callable[[str], None], until_s: float | None = None,
        made: contextlib.ExitStack | None = None,
    ) -> BlockBackend:
        """See ``Disk.open``."""
        return open_backend(self.source, report=report, until_s=until_s, made=made)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


class RawDisk(_File):
    """The bytes of the file or block device ``path``.

    The file is locked while a machine has it: exclusively, or with ``read_only`` shared with
    other readers.  An image of another format (qcow2 and its like) is refused unless
    ``any_format``: then its bytes are the disk.
    """

    def __init__(
        self, path: str | PathLike[str], *, read_only: bool = False, any_format: bool = False
    ) -> None:
        super().__init__(_path("RawDisk", path), read_only=read_only, any_format=any_format)


class NbdDisk(_File):
    """A disk of an NBD server: ``uri`` is ``nbd://host/name`` or ``nbd+unix:///name?socket=PATH``.
    """

    def __init__(self, uri: str, *, read_only: bool = False) -> None:
        from pyvmm.storage.nbd_uri import is_nbd_uri

        if not isinstance(uri, str) or not is_nbd_uri(uri):
            raise ConfigError(f"NbdDisk({uri!r})", "is no nbd:// or nbd+unix:// URI")
        super().__init__(uri, read_only=read_only, any_format=True)


class MemoryDisk:
    """A disk in memory: ``content`` are its first bytes, or its size in bytes, all zero.

    ``data`` is what the guest has made of it; it lasts as long as this object, so that a second
    machine finds what the first one wrote.  The size is a multiple of 512 bytes.
    """

    def __init__(self, content: bytes | bytearray | int, *, read_only: bool = False) -> None:
        if isinstance(content, bool) or not isinstance(content, (bytes, bytearray, int)):
            raise TypeError(
                f"MemoryDisk takes bytes, or its size as an int, not {type(content).__name__}"
            )
        size = content if isinstance(content, int) else len(content)
        if not 512 <= size <= MAX_MEMORY_DISK_BYTES or size % 512:
            raise ConfigError(
                "MemoryDisk", f"has {size} bytes; it takes a multiple of 512 up to 1T"
            )
        self.read_only = self.is_shared = read_only
        self.name = f"MemoryDisk at {id(self):#x}"
        self.data = bytearray(content)

    def open(
        self, *, report: Callable[[str], None], until_s: float | None = None,
        made: contextlib.ExitStack | None = None,
    ) -> BlockBackend:
        """See ``Disk.open``."""
        return MemoryBackend(self.data, read_only=self.read_only)

    def __repr__(self) -> str:
        return f"MemoryDisk({len(self.data)})"


class Overlay:
    """``base`` with everything the guest writes kept apart; ``base`` itself is never written.

    Writes go to the file ``path``, which a later run continues; without one they are gone with
    the machine.  ``base`` is a path, or a description that can be opened read-only.
    """

    read_only = False
    is_shared = True

    def __init__(
        self, base: str | PathLike[str] | Disk, path: str | PathLike[str] | None = None
    ) -> None:
        self.base = as_disk(base, read_only=True)
        self.path = "" if path is None else _path("Overlay", path)

    @property
    def name(self) -> str:
        """See ``Disk.name``."""
        return self.base.name

    def open(
        self, *, report: Callable[[str], None], until_s: float | None = None,
        made: contextlib.ExitStack | None = None,
    ) -> BlockBackend:
        """See ``Disk.open``."""
        made = contextlib.ExitStack() if made is None else made
        with contextlib.ExitStack() as stack:
            base = self.base.open(report=report, until_s=until_s, made=made)
            stack.callback(base.close)
            overlay = open_overlay(
                base, location=self.base.name, path=self.path, stack=stack, report=report,
                made=made,
            )
            stack.pop_all()
            return overlay

    def __repr__(self) -> str:
        return f"Overlay({self.base!r}{f', {self.path!r}' if self.path else ''})"


class FaultyDisk:
    """``disk`` with faults: the text ``script`` says which request fails and how (docs/disks.md).

    Every machine begins to count requests anew.
    """

    def __init__(self, disk: str | PathLike[str] | Disk, script: str) -> None:
        from pyvmm.storage.fault_script import parse_script

        self.disk = as_disk(disk)
        self.script = script
        self._faults = parse_script(script, "FaultyDisk's script")

    @property
    def name(self) -> str:
        """See ``Disk.name``."""
        return self.disk.name

    @property
    def read_only(self) -> bool:
        """See ``Disk.read_only``."""
        return self.disk.read_only

    @property
    def is_shared(self) -> bool:
        """See ``Disk.is_shared``."""
        return self.disk.is_shared

    def open(
        self, *, report: Callable[[str], None], until_s: float | None = None,
        made: contextlib.ExitStack | None = None,
    ) -> BlockBackend:
        """See ``Disk.open``."""
        from pyvmm.storage.faulty import FaultyBackend

        made = contextlib.ExitStack() if made is None else made
        return FaultyBackend(
            self.disk.open(report=report, until_s=until_s, made=made), self._faults
        )

    def __repr__(self) -> str:
        return f"FaultyDisk({self.disk!r})"


class DiskWrapper:
    """A backend that passes everything on to ``inner``: derive from it and override some.

    It owns ``inner`` and closes it.  Merging and discarding stay as ``inner`` has them.
    """

    def __init__(self, inner: BlockBackend) -> None:
        self.inner = inner

    @property
    def size_bytes(self) -> int:
        """See ``BlockBackend.size_bytes``."""
        return self.inner.size_bytes

    @property
    def read_only(self) -> bool:
        """See ``BlockBackend.read_only``."""
        return self.inner.read_only

    @property
    def block_size(self) -> int:
        """See ``BlockBackend.block_size``."""
        return self.inner.block_size

    @property
    def can_discard(self) -> bool:
        """See ``BlockBackend.can_discard``."""
        return self.inner.can_discard

    @property
    def can_write_zeroes(self) -> bool:
        """See ``BlockBackend.can_write_zeroes``."""
        return self.inner.can_write_zeroes

    @property
    def merges(self) -> bool:
        """See ``BlockBackend.merges``."""
        return self.inner.merges

    @property
    def extra_calls(self) -> int:
        """See ``BlockBackend.extra_calls``."""
        return self.inner.extra_calls

    def readv(self, buffers: Sequence[memoryview], offset: int) -> None:
        """See ``BlockBackend.readv``."""
        self.inner.readv(buffers, offset)

    def writev(
        self, buffers: Sequence[memoryview], offset: int, *, durable: bool = False
    ) -> None:
        """See ``BlockBackend.writev``."""
        self.inner.writev(buffers, offset, durable=durable)

    def flush(self) -> None:
        """See ``BlockBackend.flush``."""
        self.inner.flush()

    def discard(self, offset: int, length: int) -> None:
        """See ``BlockBackend.discard``."""
        self.inner.discard(offset, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """See ``BlockBackend.write_zeroes``."""
        self.inner.write_zeroes(offset, length, unmap=unmap)

    def refresh_size(self) -> int:
        """See ``BlockBackend.refresh_size``."""
        return self.inner.refresh_size()

    def hurry(self, until_s: float) -> None:
        """See ``BlockBackend.hurry``."""
        self.inner.hurry(until_s)

    def close(self) -> None:
        """See ``BlockBackend.close``."""
        self.inner.close()


class OwnBackend:
    """A backend that somebody else wrote, as a description; the machine closes it at its end."""

    def __init__(self, backend: BlockBackend) -> None:
        missing = [name for name in _BACKEND_NAMES if not hasattr(backend, name)]
        if isinstance(backend, type):
            raise TypeError(
                f"a disk is the class {backend.__name__}: make an object of it, with ()"
            )
        if missing:
            lacks = f": it lacks {', '.join(missing)}" if missing != [*_BACKEND_NAMES] else ""
            raise TypeError(
                f"a disk of type {type(backend).__name__} is no path, no disk of pyvmm, and no "
                f"BlockBackend{lacks}"
            )
        self._backend = backend

    @property
    def name(self) -> str:
        """See ``Disk.name``."""
        return f"{type(self._backend).__name__} at {id(self._backend):#x}"

    is_shared = False

    @property
    def read_only(self) -> bool:
        """See ``Disk.read_only``."""
        return self._backend.read_only

    def open(
        self, *, report: Callable[[str], None], until_s: float | None = None,
        made: contextlib.ExitStack | None = None,
    ) -> BlockBackend:
        """See ``Disk.open``."""
        return self._backend

    def __repr__(self) -> str:
        return repr(self._backend)


_BACKEND_NAMES = (
    "size_bytes", "read_only", "block_size", "can_discard", "can_write_zeroes", "merges",
    "extra_calls", "readv", "writev", "flush", "discard", "write_zeroes", "refresh_size", "hurry",
    "close",
)


def as_disk(what: object, *, read_only: bool = False) -> Disk:
    """Return ``what`` as a description: a path, a description or a ``BlockBackend``.

    A path is opened ``read_only``.  TypeError if it is none of these.
    """
    if isinstance(what, (str, os.PathLike)):
        return RawDisk(what, read_only=read_only)
    if isinstance(what, (RawDisk, NbdDisk)) and read_only:
        return type(what)(what.name, read_only=True)
    if isinstance(what, (_File, MemoryDisk, Overlay, FaultyDisk)):
        return what
    return OwnBackend(what)  # type: ignore[arg-type]  # it looks


def _path(kind: str, path: object) -> str:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{kind} takes a path, not {type(path).__name__}")
    text = os.fspath(path)
    if not isinstance(text, str) or not text or "\0" in text:
        raise ConfigError(f"{kind}({text!r})", "names no file")
    return text
