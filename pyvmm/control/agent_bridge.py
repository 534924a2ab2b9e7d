"""Bytes between the port, which the device's thread serves, and the link in the control thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from pyvmm.agent.clone import CloneNotice
from pyvmm.agent.link import AgentLink, LinkState
from pyvmm.startup.types import Protocol

MAX_WAITING_BYTES = 256 << 10
"""Bytes of the guest that may wait for the control thread; the rest waits in the guest's ring."""
MAX_NEWS = 64
"""Times that the port may be opened or closed before all but the last are forgotten."""
_OUTPUT_BYTES = 64 << 10


class Port(Protocol):
    """The part of ``virtio.port.device.PortDevice`` that a bridge needs."""

    def connect(
        self,
        *,
        on_data: Callable[[bytes], int],
        on_room: Callable[[], None],
        on_open: Callable[[bool], None],
    ) -> None:
        """See ``PortDevice.connect``."""

    def receive(self, data: bytes) -> int:
        """See ``PortDevice.receive``."""

    def more_room(self) -> None:
        """See ``PortDevice.more_room``."""

    def hang_up(self) -> None:
        """See ``PortDevice.hang_up``."""


class AgentBridge:
    """Connects ``port`` with a link of its own.

    ``wake`` has ``pump`` called in the control thread; ``on_state`` is called there after each
    change of the link's state.  ``notice`` is the link's.
    """

    def __init__(
        self, port: Port, *, wake: Callable[[], None], on_state: Callable[[], None],
        notice: Callable[[], CloneNotice | None],
    ) -> None:
        self._port = port
        self._wake = wake
        self._on_state = on_state
        self._lock = threading.Lock()
        self._news: deque[bytes | bool] = deque()
        """Bytes of the guest, and between them True and False: it opened or closed the port."""
        self._waiting_bytes = 0
        self._is_short = False
        """True if the port holds bytes back until there is room for them."""
        self._hears_port = False
        """True while the link is told that the guest opened or closed the port."""
        self.link = AgentLink(on_state=self._state_changed, wake=wake, notice=notice)
        port.connect(on_data=self._take, on_room=wake, on_open=self._open)

    # The device's thread

    def _take(self, data: bytes) -> int:
        with self._lock:
            taken = data[: MAX_WAITING_BYTES - self._waiting_bytes]
            self._is_short = len(taken) < len(data)
            if taken:
                self._news.append(taken)
                self._waiting_bytes += len(taken)
        self._wake()
        return len(taken)

    def _open(self, is_open: bool) -> None:
        with self._lock:
            if len(self._news) >= MAX_NEWS and False in self._news:
                # Whatever was said before the port was closed is lost with the link.
                self._news.clear()
                self._waiting_bytes = 0
                self._news.append(False)
            self._news.append(is_open)
        self._wake()

    # The control thread

    def pump(self) -> None:
        """Move what waits, in both directions."""
        while True:
            with self._lock:
                if not self._news:
                    break
                news = self._news.popleft()
                if isinstance(news, bytes):
                    self._waiting_bytes -= len(news)
                has_room_again = self._is_short and self._waiting_bytes < MAX_WAITING_BYTES // 2
                self._is_short = self._is_short and not has_room_again
            if isinstance(news, bytes):
                self.link.feed(news)
            else:
                self._hears_port = True
                self.link.opened(news)
                self._hears_port = False
            if has_room_again:
                self._port.more_room()
                break  # the other clients have their turn before the next bytes
        while data := self.link.output(_OUTPUT_BYTES):
            taken = self._port.receive(data)
            self.link.sent(taken)
            if taken < len(data):
                break  # there will be room, or no link
        if self._news:
            self._wake()

    @property
    def has_news(self) -> bool:
        """True if the port has told what the link does not know yet."""
        return bool(self._news)

    def end(self) -> None:
        """The run has ended: take the guest's last bytes, then lose the link."""
        for news in list(self._news):
            if isinstance(news, bytes):
                self.link.feed(news)
            else:
                self.link.opened(news)
        self._news.clear()
        self.link.opened(False)

    def _state_changed(self) -> None:
        # A port that the guest has closed may be open again by now, for the next agent.
        if self.link.state is LinkState.LOST and not self._hears_port:
            self._port.hang_up()
        self._on_state()
