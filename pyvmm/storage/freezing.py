"""Freeze a disk that a device uses, and take it back: by its kind (docs/disks.md, "Frozen disks").

A disk can be frozen if nobody writes it in place.  The device keeps its backend object: the layers
below are exchanged.
"""

from __future__ import annotations

from pyvmm.errors import SnapshotError
from pyvmm.storage.backend import BlockBackend
from pyvmm.storage.bitmap import BlockBitmap
from pyvmm.storage.faulty import FaultyBackend
from pyvmm.storage.frozen import FrozenDisk, duplicate_base
from pyvmm.storage.memory import MemoryBackend
from pyvmm.storage.overlay import OverlayBackend
from pyvmm.storage.private import PrivateDisk
from pyvmm.storage.raw import RawBackend
from pyvmm.storage.saving import copy_blocks
from pyvmm.storage.scratch import snapshot_directory, take_stripe

_READABLE_TWICE = (RawBackend, MemoryBackend)


def check_freezable(
    backend: BlockBackend, *, into_directory: bool, to_rewind: bool = False
) -> None:
    """Raise SnapshotError, naming the disk and the remedy, unless ``backend`` can be frozen.

    A snapshot in a directory needs more of it, and so does one to which the machine that goes on
    shall be able to return.
    """
    problem = _problem(backend, into_directory, to_rewind)
    if problem:
        raise SnapshotError(_subject(backend), problem)


def _problem(backend: BlockBackend, into_directory: bool, to_rewind: bool) -> str:
    """Return why ``backend`` cannot be frozen, and the remedy; "" if it can."""
    if isinstance(backend, FaultyBackend):
        if into_directory:
            return (
                "has faults=, whose counts are not kept in a directory; leave it out, or take the "
                "snapshot in memory"
            )
        return _problem(backend.inner, into_directory, to_rewind)
    base = backend
    if isinstance(backend, PrivateDisk):
        base = backend.frozen.base
    elif isinstance(backend, OverlayBackend):
        base = backend.base
        if to_rewind:
            return (
                "has overlay=FILE, and a rewind would undo writes that were flushed to that file; "
                "use ,snapshot instead"
            )
    elif not (backend.read_only and isinstance(backend, _READABLE_TWICE)) and not _is_nbd(base):
        remedy = (
            "add ,snapshot (in a script: pyvmm.Overlay without a path)" if to_rewind else
            "add ,snapshot or ,overlay=FILE (in a script: pyvmm.Overlay)"
        )
        return f"is written in place, so a snapshot would change with it; {remedy}"
    if _is_nbd(base):
        return "is on an NBD server, where others could change it; copy it to a file"
    if isinstance(backend, OverlayBackend) and not isinstance(base, _READABLE_TWICE):
        return "has overlay=FILE over a disk that cannot be read twice; use a file as the base"
    if into_directory and not isinstance(base, RawBackend):
        return (
            "lives in this process, and a directory can only name files; use a file, or take the "
            "snapshot in memory"
        )
    return ""


def freeze(backend: BlockBackend) -> FrozenDisk:
    """Return ``backend`` as it is now, immutable, for the caller to close.

    ``backend`` goes on with layers of its own.  Nobody uses it meanwhile.  SnapshotError as of
    ``check_freezable``, or if there is no room.
    """
    check_freezable(backend, into_directory=False)
    if isinstance(backend, FaultyBackend):
        inner = freeze(backend.inner)
        try:
            return inner.with_faults(backend.save())
        finally:
            inner.close()
    if isinstance(backend, PrivateDisk):
        frozen = backend.freeze()
        if frozen.faults is None:
            return frozen
        try:  # a frozen disk behind faults, which are not this one's
            return frozen.with_faults(None)
        finally:
            frozen.close()
    if isinstance(backend, OverlayBackend):
        try:
            return _copied(backend)
        except OSError as error:
            raise SnapshotError(
                _subject(backend), f"its overlay cannot be copied to {snapshot_directory()}: "
                f"{error.strerror}; TMPDIR names another directory"
            ) from error
    return FrozenDisk.of_base(duplicate_base(backend), _subject(backend), read_only=True)


def _copied(overlay: OverlayBackend) -> FrozenDisk:
    """Return a copy of the blocks that the store of ``overlay`` holds, over the same base.

    The store stays the place of the overlay's writes, because a flush must end there.
    """
    base = duplicate_base(overlay.base)
    below = FrozenDisk.of_base(base, _subject(overlay.base), read_only=False)
    stripe = None
    try:
        bitmap, (store, data) = BlockBitmap(), overlay.place
        for start, length in overlay.held_runs():
            if stripe is None:
                stripe = take_stripe(None, below.stripe_bytes, overlay.report)
            copy_blocks(store, data + start, stripe.store, stripe.offset + start, length)
            bitmap.hold(start, length)
        if stripe is None:
            return below.share()
        frozen = below.with_layer(stripe, bitmap)
        stripe = None
        return frozen
    finally:
        if stripe is not None:
            stripe.free()
        below.close()


def check_revertible(backend: BlockBackend, frozen: FrozenDisk) -> None:
    """Raise SnapshotError if ``backend`` cannot become ``frozen``, or that is no state of it."""
    check_freezable(backend, into_directory=False, to_rewind=True)
    if isinstance(backend, FaultyBackend):
        if frozen.faults is None:
            raise SnapshotError(_subject(backend), "has faults, and had none in the snapshot")
        check_revertible(backend.inner, frozen)
    elif isinstance(backend, PrivateDisk) and frozen.size_bytes != backend.size_bytes:
        raise SnapshotError(
            _subject(backend),
            f"has {backend.size_bytes} bytes, and {frozen.size_bytes} in the snapshot",
        )


def revert(backend: BlockBackend, frozen: FrozenDisk) -> None:
    """Make ``backend`` the same as ``frozen`` again, and forget what was written since.

    Nobody uses it meanwhile.  SnapshotError as of ``check_revertible``, and nothing is done.
    """
    check_revertible(backend, frozen)
    if isinstance(backend, FaultyBackend):
        assert frozen.faults is not None  # else the check has failed
        revert(backend.inner, frozen)
        backend.restore(frozen.faults)
    elif isinstance(backend, PrivateDisk):
        backend.revert(frozen)
    elif isinstance(backend, (RawBackend, MemoryBackend)):
        backend.size_bytes = frozen.size_bytes  # it may have grown


def _subject(backend: BlockBackend) -> str:
    """Return the disk's name in messages."""
    if isinstance(backend, FaultyBackend):
        return _subject(backend.inner)
    if isinstance(backend, PrivateDisk):
        return backend.frozen.location
    if isinstance(backend, OverlayBackend):
        return _subject(backend.base)
    return str(getattr(backend, "path", None) or getattr(backend, "uri", type(backend).__name__))


def _is_nbd(backend: BlockBackend) -> bool:
    """True for an NBD server's disk; its module need not be loaded for that."""
    return type(backend).__module__ == "pyvmm.storage.nbd"
