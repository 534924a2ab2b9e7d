"""A jailed machine's half of a snapshot's writer: files come from the attendant, opened."""

from __future__ import annotations

import contextlib

from pyvmm.attendant.messages import Ask
from pyvmm.errors import SnapshotError
from pyvmm.snapshot.files import layout
from pyvmm.snapshot.files.finishing import write_failed, write_state
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

    from pyvmm.attendant.messages import Value
    from pyvmm.attendant.remote_files import Channel


class RemoteWriter:
    """See ``client.SnapshotWriter``.  Owns ``channel``, with whose end the attendant aborts."""

    def __init__(self, channel: Channel, path: str, temporary_path: str) -> None:
        self.path = path
        self.temporary_path = temporary_path
        self.held_bytes = 0
        self._channel = channel
        self._is_finished = False

    def create(self, name: str) -> int:
        """See ``SnapshotWriter``."""
        return self._ask_for_file(Ask.CREATE, name)

    def reopen(self, name: str) -> int:
        """See ``SnapshotWriter``."""
        return self._ask_for_file(Ask.REOPEN, name)

    def size_of(self, name: str) -> int:
        """See ``SnapshotWriter``."""
        (size,) = self._ask(Ask.SIZE, name, shape=(int,), name=name)
        return int(size)

    def failed(self, error: OSError, name: str = layout.RAM) -> SnapshotError:
        """See ``SnapshotWriter``."""
        return write_failed(self.path, error, name)

    def settle(self) -> dict[str, int]:
        """See ``snapshot.files.writer.Writer``."""
        values = self._ask(Ask.SETTLE, shape=None)
        return {
            str(name): int(crc) for name, crc in zip(values[::2], values[1::2], strict=True)
        }

    def publish(self) -> None:
        """See ``snapshot.files.writer.Writer``."""
        (self.held_bytes,) = map(int, self._ask(Ask.PUBLISH, shape=(int,)))
        self._is_finished = True

    def finish(self, state: Mapping[str, object]) -> None:
        """See ``SnapshotWriter``."""
        write_state(self, state)

    def abort(self) -> None:
        """See ``SnapshotWriter``."""
        if not self._is_finished:
            with contextlib.suppress(OSError, SnapshotError):
                self._channel.ask(Ask.ABORT)
            self._channel.close()

    def close(self) -> None:
        """Have no more files opened, and abort unless ``finish`` was called; idempotent."""
        self.abort()
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _ask(
        self, kind: Ask, *values: Value, shape: tuple[type, ...] | None, name: str = ""
    ) -> tuple[Value, ...]:
        try:
            return self._channel.ask(kind, *values, shape=shape)
        except OSError as error:
            raise write_failed(self.path, error, name) from error

    def _ask_for_file(self, kind: Ask, name: str) -> int:
        try:
            return self._channel.ask_for_file(kind, name)[0]
        except OSError as error:
            raise write_failed(self.path, error, name) from error
