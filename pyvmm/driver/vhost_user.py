"""A virtio-blk device in another process, behind a vhost-user socket.

The back end shares this process's memory and is told through eventfds, so nothing is sent over the
socket while queues are served.  ``pyvmm.vhost_user.frontend`` speaks there.  A back end that has
gone does not come back: connect again, with a new transport.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

from pyvmm.driver.errors import DeviceBrokenError, TransportError
from pyvmm.driver.eventfds import QueueEventFds
from pyvmm.driver.transport import MappedRegion, QueueLayout, Transport
from pyvmm.errors import RequestRefusedError, VhostUserError
from pyvmm.vhost_user.frontend import STOP_TIMEOUT_S, TIMEOUT_S, Frontend
from pyvmm.vhost_user.protocol import MemoryRegion
from pyvmm.virtio.ring.rings import first_base

MAX_QUEUE_SIZE = 1024
"""Entries.  The protocol has no message to ask for it.  Back ends built on libvhost-user, such as
qemu-storage-daemon, take descriptor chains apart in tables of that size."""


class VhostUserTransport(Transport):
    """The back end that listens on the Unix socket ``path``, connected.

    It has ``timeout_s`` for an answer.  It has ``stop_timeout_s`` to stop its queues, because it
    first finishes the requests that it has begun.  Its refusal is a TransportError and changes
    nothing.  If it breaks the protocol, does not answer or hangs up, that is a DeviceBrokenError,
    then and in every later call.  Both name the socket and the message.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        timeout_s: float = TIMEOUT_S,
        stop_timeout_s: float = STOP_TIMEOUT_S,
    ) -> None:
        super().__init__()
        if timeout_s <= 0 or stop_timeout_s <= 0:
            raise TransportError(f"timeouts of {timeout_s} s and {stop_timeout_s} s: be patient")
        self._events = QueueEventFds()
        try:
            self._frontend = Frontend.connect(
                os.fspath(path), timeout_s=timeout_s, stop_timeout_s=stop_timeout_s
            )
        except VhostUserError as error:
            raise TransportError(str(error)) from None

    # The device's abilities

    @property
    def features(self) -> int:
        """See ``Transport.features``."""
        return self._frontend.features

    @property
    def max_queues(self) -> int:
        """See ``Transport.max_queues``; 1 if the back end does not have MQ."""
        return self._frontend.max_queues

    @property
    def max_queue_size(self) -> int:
        """See ``Transport.max_queue_size``."""
        return MAX_QUEUE_SIZE

    @property
    def max_mem_regions(self) -> int:
        """See ``Transport.max_mem_regions``."""
        return self._frontend.max_mem_regions

    def get_config(self, offset: int, length: int) -> bytes:
        """See ``Transport.get_config``.  A back end decides itself where its space ends, and
        refuses to be asked for bytes beyond."""
        self._check_open()
        with _as_driver_error():
            return self._frontend.get_config(offset, length)

    # Setting it up

    def _negotiate(self, features: int) -> None:
        with _as_driver_error():
            self._frontend.set_features(features)

    def _map_region(self, region: MappedRegion) -> None:
        with _as_driver_error():
            self._frontend.add_region(_described(region), region.fd)

    def _unmap_region(self, region: MappedRegion) -> None:
        with _as_driver_error():
            self._frontend.remove_region(_described(region))

    def _setup_queues(self, queues: Sequence[QueueLayout]) -> None:
        self._events.open(len(queues))
        begun = 0
        try:
            with _as_driver_error():
                for index, queue in enumerate(queues):
                    begun += 1
                    self._frontend.start_queue(
                        index,
                        size=queue.size,
                        descriptor=queue.descriptor,
                        driver=queue.driver,
                        device=queue.device,
                        base=first_base(self.acked_features),
                        kick_fd=self._events.kicks[index],
                        call_fd=self._events.calls[index],
                    )
        except BaseException:
            self._stop_queues(begun)
            self._events.close()
            raise

    # While it runs

    def notify(self, queue_index: int) -> None:
        """See ``Transport.notify``.  A back end that is gone is not noticed here."""
        self._events.notify(queue_index)

    def submission_fd(self, queue_index: int) -> int:
        """See ``Transport.submission_fd``."""
        return self._events.kick(queue_index)

    def completion_fd(self, queue_index: int) -> int:
        """See ``Transport.completion_fd``."""
        return self._events.call(queue_index)

    def fileno(self) -> int:
        """See ``Transport.fileno``: the socket."""
        return self._frontend.fileno()

    def check(self) -> None:
        """See ``Transport.check``."""
        self._check_open()
        with _as_driver_error():
            self._frontend.check()

    # The end

    def _stop(self) -> None:
        self._stop_queues(len(self._events.kicks))

    def _stop_queues(self, count: int) -> None:
        """Send GET_VRING_BASE: its answer comes once all requests taken from the queue are done."""
        with contextlib.suppress(VhostUserError):
            for index in range(count):
                self._frontend.stop_queue(index)

    def _close(self) -> None:
        self._frontend.close()
        self._events.close()


def _described(region: MappedRegion) -> MemoryRegion:
    """Return ``region`` as messages have it: its descriptors hold addresses of this process,
    too."""
    return MemoryRegion(region.address, region.length, region.address, region.offset)


@contextlib.contextmanager
def _as_driver_error() -> Iterator[None]:
    """Turn errors of the session into those of the driver half."""
    try:
        yield
    except RequestRefusedError as error:
        raise TransportError(str(error)) from error
    except VhostUserError as error:
        raise DeviceBrokenError(str(error)) from error
    except ValueError as error:  # a value that no message can carry
        raise TransportError(str(error)) from None
