"""Memory that the driver shares with a device: its queues and its data buffers."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
from types import TracebackType

from pyvmm.driver.errors import TransportError
from pyvmm.memory import PAGE_SIZE, map_aligned

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SharedMemory:
    """``length`` bytes, rounded up to whole pages and zeroed, that another process can map.

    They are a sealed memfd: neither we nor the receiver of ``fd`` can shrink it under the other.
    ``view`` is all of them, writable.  ``address`` is the first byte's place in this process, and
    also for a device once ``Transport.map_mem_region`` made it known.  ``offset`` is its place in
    ``fd``: always 0.  ``address`` is a multiple of 2 MiB, so that a device's IOMMU and the host can
    use huge pages.  TransportError if there is no such memory.
    """

    offset = 0

    def __init__(self, length: int) -> None:
        if length <= 0:
            raise TransportError(f"shared memory of {length} bytes")
        self.length = -(-length // PAGE_SIZE) * PAGE_SIZE
        self.fd = -1
        try:
            self.fd = os.memfd_create("pyvmm-driver", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.fd, self.length)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._map, start = map_aligned(self.length, self.fd)
        except (OSError, ValueError, OverflowError) as error:
            if self.fd >= 0:
                os.close(self.fd)
            raise TransportError(f"cannot share {self.length} bytes: {error}") from error
        self.view = memoryview(self._map)[start : start + self.length]
        self.address = address_of(self.view)

    def close(self) -> None:
        """Unmap the memory and close ``fd``; idempotent.

        BufferError while views taken from ``view`` are alive: drop them and call again.
        """
        self.view.release()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        try:
            self._map.close()
        except BufferError:
            raise BufferError(
                f"views of the {self.length} bytes of shared memory are still in use: release"
                " them first (with memory.view[a:b] as buffer: ...)"
            ) from None

    def __enter__(self) -> SharedMemory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # An exception under way keeps alive the frames that it came through, and views in them.
        with contextlib.suppress(*([BufferError] if value else [])):
            self.close()


def address_of(buffer: bytearray | memoryview | mmap.mmap) -> int:
    """Return the address of the first byte of ``buffer`` in this process.

    TypeError if it is read-only or not contiguous, ValueError if it is empty.
    """
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
