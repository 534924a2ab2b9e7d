"""One job of the guest's agent, as the host sees it: a command or a transfer."""

from __future__ import annotations

from pyvmm.agent.protocol import LAST_SIGNAL
from pyvmm.errors import AgentError
from pyvmm.startup.types import TYPE_CHECKING, Protocol, Record, StrEnum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.agent.link import AgentLink


class JobEnd(StrEnum):
    """How a job ended."""

    EXITED = "exited"
    """``value`` is the command's exit status; of a transfer that went well it is 0."""
    SIGNALLED = "signalled"
    """``value`` is the signal that killed the command."""
    FAILED = "failed"
    """The agent could not do it: ``value`` is an errno of Linux, ``reason`` says why."""
    LOST = "lost"
    """The agent went away or broke the protocol: nobody knows how far the job went."""


class JobResult(Record):
    """The end of a job."""

    kind: JobEnd
    value: int = 0
    is_timeout: bool = False
    """The time limit was over, and the agent killed the command's process group."""
    reason: str = ""
    """One line of printable text, for FAILED and LOST."""


class JobEvents(Protocol):
    """The user's side of a job.  ``AgentLink`` calls it in the thread that calls the link.

    A call may use the link and its jobs, but must not raise.
    """

    def on_data(self, stream: int, data: bytes) -> None:
        """Take ``data`` of ``stream``: STDOUT or STDERR; b"" is its end.

        ``Job.consumed`` must follow, now or later, for the guest to send more.
        """

    def on_room(self) -> None:
        """``Job.room`` grew."""

    def on_exit(self, result: JobResult) -> None:
        """The job is over: the last call."""


class Job:
    """A job that the agent was asked to do.  All calls of a job that is over do nothing."""

    def __init__(
        self, link: AgentLink, number: int, events: JobEvents, *, room: int, outputs: Sequence[int]
    ) -> None:
        self.id = number
        self.events = events
        self._link = link
        self._room = room
        self._has_input = self._is_input_open = room > 0
        self._unread = dict.fromkeys(outputs, 0)
        """Bytes of each output that came and are not given back to the guest as credit."""
        self._consumed = dict.fromkeys(outputs, 0)
        """Those of them that may be given back."""
        self._open_outputs = set(outputs)
        self._kills: dict[int, int] = {}
        self._is_over = False

    @property
    def room(self) -> int:
        """Return how many bytes ``write`` takes now; 0 once the input is closed."""
        return self._room if self._is_input_open else 0

    @property
    def is_over(self) -> bool:
        """True once ``on_exit`` was called, or is being called."""
        return self._is_over

    def write(self, data: bytes) -> None:
        """Send ``data``, at most ``room`` bytes, to the command's standard input or the transfer.

        ValueError if there is more, or if the input is closed.  b"" does nothing.
        """
        if self._is_over or not data:
            return
        if len(data) > self.room:
            raise ValueError(f"{len(data)} bytes for a job that takes {self.room}")
        self._room -= len(data)
        self._link._send_data(self.id, data)

    def close_input(self) -> None:
        """Tell the guest that the input ends here; more calls do nothing."""
        if self._is_input_open and not self._is_over:
            self._is_input_open = False
            self._link._send_data(self.id, b"")

    def kill(self, signal: int) -> None:
        """Send a Linux signal to the command's process group; any signal ends a transfer.

        AgentError if there is no such signal.  ``on_exit`` tells how the command took it.
        """
        if not 0 < signal <= LAST_SIGNAL:
            raise AgentError(f"a signal of Linux is 1 to {LAST_SIGNAL}, not {signal}")
        # A guest that reads nothing must not make a user who asks again and again fill our memory.
        if not self._is_over and not self._link._is_queued(self._kills.get(signal)):
            self._kills[signal] = self._link._send_kill(self.id, signal)

    def consumed(self, stream: int, count: int) -> None:
        """Let the guest send ``count`` bytes more, because as many of ``stream`` are dealt with.

        ValueError if the guest has not sent as many.
        """
        if self._is_over:
            return
        self._consumed[stream] += count
        if not 0 <= count <= self._consumed[stream] <= self._unread[stream]:
            raise ValueError(f"{count} bytes consumed, which the guest has not sent")
        # In portions: each costs the guest a frame to read.
        window = self._link.window
        if stream in self._open_outputs and self._consumed[stream] >= window // 4:
            self._link._send_credit(self.id, stream, self._consumed[stream])
            self._unread[stream] -= self._consumed[stream]
            self._consumed[stream] = 0

    def _take_data(self, stream: int, data: bytes) -> str:
        """Take a DATA frame; return how it breaks the protocol, or ""."""
        if stream not in self._unread:
            return f"data on stream {stream}, which its job does not have"
        if stream not in self._open_outputs:
            return f"data behind the end of stream {stream}"
        if len(data) > self._link.window - self._unread[stream]:
            return f"more data on stream {stream} than it had credit for"
        self._unread[stream] += len(data)
        if not data:
            self._open_outputs.discard(stream)
        self.events.on_data(stream, data)
        return ""

    def _take_credit(self, stream: int, count: int) -> str:
        """Take a CREDIT frame; return how it breaks the protocol, or ""."""
        if stream != 0 or not 0 < count <= self._link.window - self._room:
            return f"{count} bytes of credit on stream {stream}, more than were sent"
        if not self._has_input:
            return "credit for a job without an input"
        self._room += count
        if self._is_input_open:
            self.events.on_room()
        return ""

    def _end(self, result: JobResult) -> None:
        """Tell the user the end, once."""
        if not self._is_over:
            self._is_over = True
            self.events.on_exit(result)
