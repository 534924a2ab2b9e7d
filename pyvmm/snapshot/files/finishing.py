"""The end of a snapshot's directory in the making, whichever process opens its files."""

from __future__ import annotations

import os
from collections.abc import Mapping

from pyvmm.errors import SnapshotError
from pyvmm.snapshot.files import layout
from pyvmm.snapshot.files.records import encode
from pyvmm.startup.types import Protocol


class InTheMaking(Protocol):
    """The part of a writer that ``write_state`` needs."""

    @property
    def path(self) -> str:
        """See ``Writer``."""

    def create(self, name: str) -> int:
        """See ``Writer``."""

    def settle(self) -> Mapping[str, int]:
        """See ``Writer``."""

    def publish(self) -> None:
        """See ``Writer``."""

    def abort(self) -> None:
        """See ``Writer``."""

    def failed(self, error: OSError, name: str = ...) -> SnapshotError:
        """See ``Writer``."""


def write_state(writer: InTheMaking, state: Mapping[str, object]) -> None:
    """Settle the files, write ``state`` with their CRCs, and publish; see ``Writer.finish``."""
    try:
        data = encode(
            {**state, layout.FILES: dict(writer.settle())}, name=f"{writer.path}/{layout.STATE}",
            versions=layout.RECORDS,
        )
        fd = writer.create(layout.STATE)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        except OSError as error:
            raise writer.failed(error, layout.STATE) from error
        finally:
            os.close(fd)
    except BaseException:
        writer.abort()
        raise
    writer.publish()


def write_failed(path: str, error: OSError | ValueError, name: str = "") -> SnapshotError:
    """Return the exception to raise after ``error`` at ``name`` in the directory ``path``."""
    subject = f"{path}/{name}" if name else path
    if isinstance(error, ValueError):
        return SnapshotError(repr(subject), f"is no file name: {error}")
    return SnapshotError(subject, f"cannot be written: {error.strerror}")
