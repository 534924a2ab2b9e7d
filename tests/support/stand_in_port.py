"""A stand-in for the agent's port and for the guest behind it: no KVM, no Linux.

The guest's side is a thread, as the device's is.  Its agent speaks the real protocol and knows a
few commands of its own, which honour credit: ``echo``, ``both``, ``cat``, ``flood N``, ``sleep``,
``lie``, ``die``.  Files are a dictionary.
"""

from __future__ import annotations

import queue
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from pyvmm.agent import protocol
from pyvmm.agent.protocol import FrameType, frame

_PIECE = 16 << 10
_START = frame(FrameType.START, 0, 0, protocol.START.pack(protocol.HOST_MAGIC, protocol.VERSION))
_ROOM = 32 << 10
"""Bytes that the port takes for the guest at a time."""


@dataclass
class GuestJob:
    """A job on the guest's side."""

    number: int
    words: list[str]
    room: dict[int, int]
    left: int = 0
    """Bytes of a flood that are not sent yet."""
    waiting: bytearray = field(default_factory=bytearray)
    """Input that has not been sent back yet."""
    taken: bytearray = field(default_factory=bytearray)
    path: str = ""
    input_has_ended: bool = False


class StandInPort:
    """``Port`` with a guest behind it; ``open`` begins with HELLO, ``close`` ends the thread."""

    def __init__(self, *, window: int = 1 << 16) -> None:
        self.files: dict[str, bytes] = {}
        self.killed: list[tuple[int, int]] = []
        """Jobs and signals."""
        self.hang_ups = 0
        self.notices: list[bytes] = []
        """The notices of clones that the agent got, and how its hook ends: None is never."""
        self.hook_status: int | None = 0
        self._held_notice = 0
        self.is_deaf = False
        """True if the guest reads nothing."""
        self._window = window
        self._on_data: Callable[[bytes], int] = len
        self._on_room: Callable[[], None] = lambda: None
        self._on_open: Callable[[bool], None] = lambda is_open: None
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._out = bytearray()
        self._in = bytearray()
        self._held = 0
        self._is_started = False
        self._jobs: dict[int, GuestJob] = {}
        self.most_on_the_way = 0
        """The most bytes that waited for the host at a time."""
        self._thread = threading.Thread(target=self._run, name="stand-in guest", daemon=True)
        self._thread.start()

    # The host's side

    def connect(
        self,
        *,
        on_data: Callable[[bytes], int],
        on_room: Callable[[], None],
        on_open: Callable[[bool], None],
    ) -> None:
        self._on_data, self._on_room, self._on_open = on_data, on_room, on_open

    def receive(self, data: bytes) -> int:
        if self.is_deaf:
            return 0
        taken = data[: max(0, _ROOM - self._held)]
        self._held += len(taken)
        if taken:
            self._todo.put(lambda: self._take(taken))
        return len(taken)

    def more_room(self) -> None:
        self._todo.put(self._send)

    def hang_up(self) -> None:
        self.hang_ups += 1

    # The test's side

    def open(self) -> None:
        """An agent comes forward."""

        def act() -> None:
            self._in.clear()
            self._is_started = False
            self._on_open(True)
            self._say(FrameType.HELLO, 0, 0, protocol.HELLO.pack(
                protocol.GUEST_MAGIC, protocol.VERSION, 16, self._window
            ) + b"stand-in")

        self._todo.put(act)

    def shut(self) -> None:
        """The agent goes away."""

        def act() -> None:
            self._jobs.clear()
            self._out.clear()
            self._on_open(False)

        self._todo.put(act)

    def end_hook(self, status: int) -> None:
        """The hook that ran on ends."""
        self._todo.put(lambda: self._end_hook(status))

    def _end_hook(self, status: int) -> None:
        number = self._held_notice
        self._say(FrameType.DATA, 1, number, b"\x07said by the hook")
        self._say(FrameType.EXIT, 0, number, protocol.EXIT.pack(0, 0, 0, status))

    def hear(self) -> None:
        """The guest reads again."""
        self.is_deaf = False
        self._on_room()

    def close(self) -> None:
        self._todo.put(None)
        self._thread.join()

    # The guest

    def _run(self) -> None:
        while (act := self._todo.get()) is not None:
            act()

    def _say(self, kind: int, stream: int, number: int, payload: bytes = b"") -> None:
        self._out += frame(kind, stream, number, payload)
        self.most_on_the_way = max(self.most_on_the_way, len(self._out))
        self._send()

    def _send(self) -> None:
        while self._out:
            piece = bytes(self._out[:_PIECE])
            taken = self._on_data(piece)
            del self._out[:taken]
            if taken < len(piece):
                return

    def _take(self, data: bytes) -> None:
        self._held -= len(data)
        self._in += data
        if not self._is_started:
            # As the agent does: what comes before START was for the one before it.
            at = self._in.find(_START)
            if at < 0:
                del self._in[: -len(_START)]
                self._on_room()
                return
            del self._in[:at]
            self._is_started = True
        while len(self._in) >= protocol.HEADER.size:
            length, kind, stream, number = protocol.HEADER.unpack_from(self._in)
            end = protocol.HEADER.size + length
            if len(self._in) < end:
                break
            payload = bytes(self._in[protocol.HEADER.size : end])
            del self._in[:end]
            self._serve(kind, stream, number, payload)
        self._on_room()

    def _serve(self, kind: int, stream: int, number: int, payload: bytes) -> None:
        job = self._jobs.get(number)
        if kind == FrameType.RUN:
            _flags, _ms, argc, _envc = protocol.RUN.unpack_from(payload)
            texts = payload[protocol.RUN.size :].decode("utf-8", "surrogateescape").split("\0")
            self._begin(number, texts[1 : 1 + argc])
        elif kind in (FrameType.PUT, FrameType.GET, FrameType.READ, FrameType.WRITE):
            skipped = 4 if kind == FrameType.WRITE else 0
            self._begin(number, [f"*{kind}"], payload[skipped:].decode())
        elif kind == FrameType.CLONE:
            self.notices.append(payload)
            self._held_notice = number
            if self.hook_status is not None:
                self._end_hook(self.hook_status)
        elif kind == FrameType.PING:
            self._say(FrameType.PONG, 0, 0, payload)
        elif job is None:
            return
        elif kind == FrameType.CREDIT:
            job.room[stream] += struct.unpack("<I", payload)[0]
            self._go_on(job)
        elif kind == FrameType.KILL:
            signal = struct.unpack("<I", payload)[0]
            self.killed.append((number, signal))
            self._exit(job, 1, signal)
        elif kind == FrameType.DATA:
            self._take_input(job, payload)

    def _begin(self, number: int, words: list[str], path: str = "") -> None:
        job = GuestJob(number, words, {1: self._window, 2: self._window}, path=path)
        self._jobs[number] = job
        match words:
            case ["echo", *rest]:
                text = " ".join(rest).encode(errors="surrogateescape")
                self._say(FrameType.DATA, 1, number, text)
                self._exit(job, 0, 0)
            case ["both", out, err]:
                self._say(FrameType.DATA, 1, number, out.encode())
                self._say(FrameType.DATA, 2, number, err.encode())
                self._exit(job, 0, 3)
            case ["flood", size]:
                job.left = int(size)
                self._go_on(job)
            case ["lie"]:
                self._say(99, 0, 0)
            case ["*19" | "*20"]:
                if path not in self.files:
                    self._exit(job, 2, 2, b"no such file")
                    return
                job.waiting += self.files[path]
                job.input_has_ended = True
                self._go_on(job)
            case ["cat" | "sleep" | "*18" | "*21"]:
                pass
            case _:
                self._exit(job, 2, 2, b"no such program")

    def _take_input(self, job: GuestJob, payload: bytes) -> None:
        if not payload:
            job.input_has_ended = True
        elif job.words == ["cat"]:
            job.waiting += payload
        else:
            job.taken += payload
        if payload:
            self._say(FrameType.CREDIT, 0, job.number, struct.pack("<I", len(payload)))
        self._go_on(job)

    def _go_on(self, job: GuestJob) -> None:
        if job.words[0] == "flood":
            while job.left and (piece := min(job.left, job.room[1], _PIECE)):
                job.left -= piece
                job.room[1] -= piece
                self._say(FrameType.DATA, 1, job.number, b"x" * piece)
            if not job.left:
                self._exit(job, 0, 0)
            return
        while job.waiting and (piece := min(len(job.waiting), job.room[1], _PIECE)):
            self._say(FrameType.DATA, 1, job.number, bytes(job.waiting[:piece]))
            del job.waiting[:piece]
            job.room[1] -= piece
        if job.input_has_ended and not job.waiting:
            if job.words[0] in ("*18", "*21"):
                self.files[job.path] = bytes(job.taken)
            self._exit(job, 0, 0)

    def _exit(self, job: GuestJob, how: int, value: int, text: bytes = b"") -> None:
        del self._jobs[job.number]
        self._say(FrameType.EXIT, 0, job.number, protocol.EXIT.pack(how, 0, 0, value) + text)
