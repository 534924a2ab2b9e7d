"""The host's half of the agent's protocol, without input or output of its own.

``AgentLink`` takes the guest's bytes and gives those for the guest.  The guest is not trusted:
whatever it sends, nothing raises and memory stays bounded.  A guest that breaks the protocol loses
the link, with one line that says how, until it closes the port and opens it again.
"""

from __future__ import annotations

from pyvmm.agent.clone import CloneAnswer, CloneNotice, CloneTelling
from pyvmm.agent.job import Job, JobEnd, JobEvents, JobResult
from pyvmm.agent.protocol import (
    CLONE_VERSION,
    EXIT,
    EXIT_TIMED_OUT,
    HEADER,
    HELLO,
    HELLO_BEGINS,
    HOST_MAGIC,
    LAST_SIGNAL,
    MAX_JOBS,
    MAX_PAYLOAD,
    MAX_TEXT,
    MIN_WINDOW,
    OLDEST_VERSION,
    START,
    STDERR,
    STDOUT,
    U32,
    VERSION,
    WINDOW,
    ExitEnd,
    FrameType,
    RunRequest,
    frame,
    path_bytes,
    printable,
)
from pyvmm.errors import AgentError
from pyvmm.startup.types import TYPE_CHECKING, Record, StrEnum, name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from uuid import UUID

__all__ = [
    "AgentLink", "Hello", "Job", "JobEnd", "JobEvents", "JobResult", "LinkState", "RunRequest",
]

MAX_NOISE = 1 << 20
"""Bytes before HELLO that are ignored: those of other programs that had the port open."""
MAX_PINGS = 16
MAX_QUEUED = 16 << 20
"""Bytes for a guest that reads nothing: more than an honest one ever leaves, with all its jobs."""
_DATA_BYTES = 1 << 15
"""Payload of our DATA frames; Linux's virtio ports take as much at a time."""
_MOST_ERRNO = 4095


class LinkState(StrEnum):
    """The state of a link."""

    WAITING = "waiting"
    """No agent has said HELLO yet, or it has not answered that its guest is a clone."""
    READY = "ready"
    LOST = "lost"
    """The agent closed its port or broke the protocol: see ``AgentLink.problem``."""


class Hello(Record):
    """An agent's words about itself."""

    version: int
    max_jobs: int
    window: int
    """Bytes of each stream that may be on their way."""
    text: str
    """Its own words, printable: its name, and the guest's kernel."""


class AgentLink:
    """A link to one guest's agent.  Its methods are called by one thread, or under one lock.

    ``on_state()`` is called after every change of ``state``; ``wake()`` when ``output`` has
    something after it had nothing.  Neither may raise.

    ``notice()`` returns the notice to a guest that is a clone, None for any other.  An agent that
    has not answered it is told before it is READY, and again after the number has changed.
    """

    def __init__(
        self, *, on_state: Callable[[], None], wake: Callable[[], None],
        notice: Callable[[], CloneNotice | None] = lambda: None,
    ) -> None:
        self.state = LinkState.WAITING
        self.problem = ""
        """One printable line that says why the link is LOST."""
        self.hello: Hello | None = None
        self.clone: CloneAnswer | None = None
        """The guest's answer to the last notice."""
        self._on_state = on_state
        self._wake = wake
        self._notice = notice
        self._is_open = False
        self._in = bytearray()
        self._noise = 0
        self._out = bytearray()
        self._sent = 0
        """Bytes that went before those in ``_out``."""
        self._jobs: dict[int, Job] = {}
        self._last_id = 0
        self._pings: dict[bytes, Callable[[], None]] = {}
        self._last_ping = 0

    @property
    def window(self) -> int:
        """Return the bytes of each stream that may be on their way."""
        return self.hello.window if self.hello else WINDOW

    @property
    def free_jobs(self) -> int:
        """Return how many jobs more the agent takes now; 0 unless READY."""
        if self.state is not LinkState.READY or self.hello is None:
            return 0
        return self.hello.max_jobs - len(self._jobs)

    def opened(self, is_open: bool) -> None:
        """Take the news that the guest opened or closed the port."""
        if is_open:
            if self._is_open:
                self.lose("the agent in the guest closed its port")
            self._is_open = True
            self._forget()
            if self.state is LinkState.LOST:
                self.state, self.problem = LinkState.WAITING, ""
                self._on_state()
        elif self._is_open:
            self._is_open = False
            if self.hello is not None:
                self.lose("the agent in the guest closed its port: it was killed, or the guest "
                           "is going down")

    def feed(self, data: bytes) -> None:
        """Take bytes from the guest.  All are taken; those of a lost link are dropped."""
        if not self._is_open or self.state is LinkState.LOST:
            return
        self._in += data
        if self.hello is None and not self._find_hello():
            return
        taken, at = self._in, 0
        while len(taken) - at >= HEADER.size and self._in is taken:
            length, kind, stream, number = HEADER.unpack_from(taken, at)
            if length > MAX_PAYLOAD:
                self._broken(f"a frame of {length} bytes; the limit is {MAX_PAYLOAD}")
                return
            end = at + HEADER.size + length
            if end > len(taken):
                break
            payload = bytes(memoryview(taken)[at + HEADER.size : end])
            at = end
            if problem := self._take(kind, stream, number, payload):
                self._broken(problem)
                return
        if self._in is taken:
            del taken[:at]

    def output(self, limit: int) -> bytes:
        """Return up to ``limit`` bytes for the guest, b"" if there are none; see ``sent``."""
        return bytes(memoryview(self._out)[:limit])

    def sent(self, count: int) -> None:
        """Drop the first ``count`` bytes of ``output``: the guest's port has them."""
        count = min(count, len(self._out))  # an end of the link may have dropped them
        del self._out[:count]
        self._sent += count

    def run(self, command: RunRequest, events: JobEvents) -> Job:
        """Have the guest run ``command``.

        This and the transfers raise AgentError if the agent is not ready, has as many jobs as it
        takes, or could never do it.
        """
        payload = command.payload()
        return self._begin(FrameType.RUN, payload, events, command.has_input, (STDOUT, STDERR))

    def put(self, path: str | bytes, events: JobEvents) -> Job:
        """Have the guest unpack a tar stream, the job's input, below the directory ``path``."""
        return self._begin(FrameType.PUT, path_bytes(path), events, True, ())

    def get(self, path: str | bytes, events: JobEvents) -> Job:
        """Have the guest send the file or directory ``path`` as a tar stream, on STDOUT."""
        return self._begin(FrameType.GET, path_bytes(path), events, False, (STDOUT,))

    def read(self, path: str | bytes, events: JobEvents) -> Job:
        """Have the guest send what it reads from ``path``, to its end, on STDOUT."""
        return self._begin(FrameType.READ, path_bytes(path), events, False, (STDOUT,))

    def write(self, path: str | bytes, mode: int, events: JobEvents) -> Job:
        """Have the guest write the job's input into file ``path``; ``mode`` is for a new file."""
        if not 0 <= mode <= 0o7777:
            raise AgentError(f"the mode of a file is 0 to 0o7777, not {mode:#o}")
        payload = U32.pack(mode) + path_bytes(path)
        return self._begin(FrameType.WRITE, payload, events, True, ())

    def ping(self, on_pong: Callable[[], None]) -> None:
        """Ask the agent for a sign of life: ``on_pong`` is called once, unless the link is lost.

        AgentError if it is not ready, or if MAX_PINGS are unanswered.
        """
        self._check_ready()
        if len(self._pings) >= MAX_PINGS:
            raise AgentError(f"the agent in the guest has not answered {MAX_PINGS} signs of life")
        self._last_ping = (self._last_ping + 1) & 0xFFFF_FFFF
        payload = U32.pack(self._last_ping)
        self._pings[payload] = on_pong
        self._send(frame(FrameType.PING, 0, 0, payload))

    def _check_ready(self) -> None:
        if self.state is LinkState.LOST:
            raise AgentError(self.problem)
        if self.hello is not None and self.state is not LinkState.READY:
            raise AgentError("the agent in the guest has not yet dealt with being in a clone")
        if self.state is not LinkState.READY:
            raise AgentError("no agent in the guest has come forward yet")

    def _begin(
        self,
        kind: FrameType,
        payload: bytes,
        events: JobEvents,
        has_input: bool,
        outputs: Sequence[int],
    ) -> Job:
        self._check_ready()
        if len(self._out) > MAX_QUEUED:
            raise AgentError("the agent in the guest reads nothing of what it was sent")
        if self.free_jobs <= 0:
            raise AgentError(
                f"the agent in the guest has {len(self._jobs)} jobs, as many as it takes: wait "
                "for one to end"
            )
        return self._start(kind, payload, events, self.window if has_input else 0, outputs)

    def _start(
        self, kind: FrameType, payload: bytes, events: JobEvents, room: int, outputs: Sequence[int]
    ) -> Job:
        self._last_id = self._last_id % 0xFFFF_FFFF + 1
        while self._last_id in self._jobs:
            self._last_id = self._last_id % 0xFFFF_FFFF + 1
        job = Job(self, self._last_id, events, room=room, outputs=outputs)
        self._jobs[job.id] = job
        self._send(frame(kind, 0, job.id, payload))
        return job

    def _send(self, data: bytes) -> int:
        """Queue ``data``; return the number of bytes that went and will go up to its end."""
        had_some = bool(self._out)
        self._out += data
        position = self._sent + len(self._out)
        if not had_some:
            self._wake()
        return position

    def _send_data(self, number: int, data: bytes) -> None:
        frames = [
            frame(FrameType.DATA, 0, number, data[at : at + _DATA_BYTES])
            for at in range(0, len(data) or 1, _DATA_BYTES)
        ]
        self._send(b"".join(frames))

    def _send_credit(self, number: int, stream: int, count: int) -> None:
        self._send(frame(FrameType.CREDIT, stream, number, U32.pack(count)))
        if len(self._out) > MAX_QUEUED:  # it sends on without reading that it may
            self._broken("data, and read nothing of what it was sent")

    def _send_kill(self, number: int, signal: int) -> int:
        return self._send(frame(FrameType.KILL, 0, number, U32.pack(signal)))

    def _is_queued(self, position: int | None) -> bool:
        """True if bytes up to ``position``, one of ``_send``'s, are still to be sent."""
        return position is not None and position > self._sent

    def _find_hello(self) -> bool:
        """Drop what comes before HELLO; True if HELLO is at the beginning of what is left.

        Programs other than the agent may have written to the port before, and an agent that was
        killed may have left half a frame.
        """
        # The length comes first, and is HELLO's own.
        at = self._in.find(HELLO_BEGINS, U32.size) - U32.size
        is_found = at >= 0
        if not is_found:
            at = max(0, len(self._in) - U32.size - len(HELLO_BEGINS))
        del self._in[:at]
        self._noise += at
        if self._noise > MAX_NOISE:
            self._broken(f"no HELLO in its first {MAX_NOISE} bytes")
            return False
        return is_found

    def _take(self, kind: int, stream: int, number: int, payload: bytes) -> str:
        """Take a frame; return how it breaks the protocol, or ""."""
        if self.hello is None:
            return self._take_hello(payload)
        job = self._jobs.get(number)
        match kind:
            case FrameType.DATA | FrameType.CREDIT | FrameType.EXIT if job is None:
                return f"{name_of(FrameType, kind)} for job {number}, which does not run"
            case FrameType.DATA if job is not None:
                return job._take_data(stream, payload)
            case FrameType.CREDIT if job is not None:
                if len(payload) != U32.size:
                    return f"CREDIT of {len(payload)} bytes"
                return job._take_credit(stream, U32.unpack(payload)[0])
            case FrameType.EXIT if job is not None:
                return self._take_exit(job, payload)
            case FrameType.PONG:
                if (on_pong := self._pings.pop(payload, None)) is None:
                    return "PONG without a PING"
                on_pong()
                return ""
            case FrameType.HELLO:
                return "a second HELLO"
        return f"a frame of unknown type {kind}"

    def _take_hello(self, payload: bytes) -> str:
        if not HELLO.size <= len(payload) <= HELLO.size + MAX_TEXT:
            return f"HELLO of {len(payload)} bytes"
        _magic, version, max_jobs, window = HELLO.unpack_from(payload)
        if version < OLDEST_VERSION:
            return f"version {version} of the protocol; this host speaks {VERSION}"
        if not 0 < max_jobs <= MAX_JOBS or not MIN_WINDOW <= window <= WINDOW:
            return f"HELLO with {max_jobs} jobs at a time and a window of {window} bytes"
        text = printable(payload[HELLO.size :], MAX_TEXT)
        self.hello = Hello(version=version, max_jobs=max_jobs, window=window, text=text)
        self._send(frame(FrameType.START, 0, 0, START.pack(HOST_MAGIC, VERSION)))
        notice = self._notice()
        if notice is None or not self.is_due(notice.clone_id):
            self._get_ready(self.clone)
        elif version < CLONE_VERSION:
            self._get_ready(CloneAnswer(clone_id=notice.clone_id, is_told=False))
        else:
            telling = CloneTelling(notice, self._get_ready)
            telling.job = self._start(
                FrameType.CLONE, notice.payload(), telling, 0, (STDOUT, STDERR)
            )
        return ""

    def is_due(self, clone_id: UUID | None) -> bool:
        """True if the guest has not answered that it is the clone ``clone_id``."""
        told = None if self.clone is None else self.clone.clone_id
        return clone_id is not None and clone_id != told

    def _get_ready(self, clone: CloneAnswer | None) -> None:
        self.clone = clone
        self.state = LinkState.READY
        self._on_state()

    def _take_exit(self, job: Job, payload: bytes) -> str:
        if not EXIT.size <= len(payload) <= EXIT.size + MAX_TEXT:
            return f"EXIT of {len(payload)} bytes"
        how, flags, _zero, value = EXIT.unpack_from(payload)
        most = {ExitEnd.EXITED: 255, ExitEnd.SIGNALLED: LAST_SIGNAL, ExitEnd.FAILED: _MOST_ERRNO}
        least = 0 if how == ExitEnd.EXITED else 1
        if how not in most or not least <= value <= most[how]:
            return f"EXIT with end {how}, value {value}"
        ends = {ExitEnd.EXITED: JobEnd.EXITED, ExitEnd.SIGNALLED: JobEnd.SIGNALLED}
        reason = printable(payload[EXIT.size :], MAX_TEXT)
        if how == ExitEnd.FAILED and not reason:
            reason = f"errno {value}"
        del self._jobs[job.id]
        job._end(JobResult(
            kind=ends.get(how, JobEnd.FAILED), value=value,
            is_timeout=bool(flags & EXIT_TIMED_OUT), reason=reason,
        ))
        return ""

    def _broken(self, how: str) -> None:
        """End the link with a guest that lies."""
        self.lose(f"the agent in the guest broke its protocol: it sent {how}")

    def lose(self, problem: str) -> None:
        """End the link, with every job, until the guest opens the port anew."""
        jobs = list(self._jobs.values())
        self._forget()
        if self.state is not LinkState.LOST:
            self.state, self.problem = LinkState.LOST, problem
            self._on_state()
        for job in jobs:
            job._end(JobResult(kind=JobEnd.LOST, reason=problem))

    def _forget(self) -> None:
        """Drop all that belongs to the agent that was there."""
        self._in, self._noise = bytearray(), 0
        self._sent += len(self._out)
        self._out.clear()
        self._jobs.clear()
        self._pings.clear()
        self.hello = None
