"""A user of the driver half: queues over a transport, one region of data memory, and waiting that
ends."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from pyvmm.driver.memory import SharedMemory
from pyvmm.driver.queue import DRIVER_FEATURES, VirtioBlkQueue
from pyvmm.driver.request import Completion
from pyvmm.driver.transport import Transport
from tests.support.patience import patient

TIMEOUT_S = 10.0


class Client:
    """``queues`` over ``transport``, which it closes, and ``memory`` for data.

    ``buffer(i, length)`` is the i-th of the buffers of ``buffer_bytes`` that memory is cut into.
    ``serve`` has the device do its work, where that is in this process.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        queues: int = 1,
        size: int = 64,
        features: int = DRIVER_FEATURES,
        buffers: int = 64,
        buffer_bytes: int = 16384,
        serve: Callable[[], object] = lambda: None,
    ) -> None:
        self.transport = transport
        self._serve = serve
        self.buffer_bytes = buffer_bytes
        self._views: list[memoryview] = []
        self.memory = SharedMemory(buffers * buffer_bytes)
        try:
            self.queues = VirtioBlkQueue.setup_queues(transport, queues, size, features=features)
            transport.map_mem_region(self.memory.address, self.memory.length, self.memory.fd)
        except BaseException:
            self.close()
            raise

    @property
    def queue(self) -> VirtioBlkQueue:
        """The first one."""
        return self.queues[0]

    def buffer(self, number: int, length: int = 0) -> memoryview:
        """``length`` bytes of buffer ``number``, all of it by default; released by ``close``."""
        start = number * self.buffer_bytes
        view = self.memory.view[start : start + (length or self.buffer_bytes)]
        self._views.append(view)
        return view

    def notify(self, index: int = 0) -> None:
        """Tell the device of the requests queued, if it wants to be told."""
        if self.queues[index].avail_notif_needed():
            self.transport.notify(index)

    def collect(self, count: int, index: int = 0) -> list[Completion]:
        """Notify, then the next ``count`` completions of queue ``index``, however long the
        device takes; what ``Transport.check`` raises if it goes meanwhile."""
        self.notify(index)
        done: list[Completion] = []
        until_s = time.monotonic() + patient(TIMEOUT_S)
        fd, other = self.transport.completion_fd(index), self.transport.fileno()
        while True:
            self._serve()
            done += self.queues[index].completions()
            if len(done) >= count:
                assert len(done) == count, done
                return done
            left_s = until_s - time.monotonic()
            assert left_s > 0, f"{len(done)} of {count} requests completed in {TIMEOUT_S} s"
            ready, _, _ = select.select([fd, other], [], [], left_s)
            if other in ready:
                self.transport.check()
            if fd in ready:
                os.eventfd_read(fd)

    def ret(self, index: int = 0) -> int:
        """How the one request that is in flight in queue ``index`` ends."""
        (completion,) = self.collect(1, index)
        return completion.ret

    def rets(self, count: int, index: int = 0) -> dict[Any, int]:
        """How the next ``count`` requests of queue ``index`` end, by context."""
        done = self.collect(count, index)
        rets = dict(done)
        assert len(rets) == count, done
        return rets

    def read(self, offset: int, length: int, index: int = 0) -> bytes:
        """What the disk holds there."""
        buffer = self.buffer(0, length)
        self.queues[index].read(offset, buffer, "read")
        assert self.ret(index) == 0
        return bytes(buffer)

    def write(self, offset: int, data: bytes, index: int = 0) -> None:
        """Write ``data``, successfully."""
        buffer = self.buffer(0, len(data))
        buffer[:] = data
        self.queues[index].write(offset, buffer, "write")
        assert self.ret(index) == 0

    def close(self) -> None:
        """Close the transport and the memory; idempotent."""
        self.transport.close()
        for view in self._views:
            view.release()
        self.memory.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
