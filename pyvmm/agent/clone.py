"""The notice to a guest that it is a clone, or was rewound, and the agent's answer.

Two machines that go on from one state have the same random numbers to come, and the same date.  So
the agent is told before anything else: it gives the kernel new random bytes, sets the clock if it
is told to, and runs the image's own hook (docs/agent.md, "Clones").
"""

from __future__ import annotations

import os
import struct
import time

from pyvmm.agent.job import Job, JobEnd, JobResult
from pyvmm.agent.protocol import STDOUT, printable
from pyvmm.startup.types import TYPE_CHECKING, Record, StrEnum

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

HOOK = "/etc/pyvmm/clone"
"""The hook's place in the guest."""
HOOK_TIMEOUT_S = 30.0
MAX_HOOK_OUTPUT = 16 << 10
"""Bytes of the hook's output that are kept; the rest is dropped."""
SEED_BYTES = 64
SET_CLOCK = 1
"""The flag of CLONE: set the clock."""
RESEEDED, CLOCK_SET, HAS_HOOK = 1, 2, 4
"""Flags in the first byte of its output."""
_CLONE = struct.Struct("<IIQ16s")
"""Flags, the hook's time limit in ms, nanoseconds since 1970, the clone's number; the seed follows.
"""
_SHOWN = 400


class CloneNotice(Record):
    """The notice that the guest is now the clone ``clone_id``."""

    clone_id: UUID
    sets_clock: bool = False
    """True if the guest's date must become this host's."""
    hook_timeout_s: float = HOOK_TIMEOUT_S

    def payload(self) -> bytes:
        """Return the payload of CLONE, with random bytes that nobody else has."""
        head = _CLONE.pack(
            SET_CLOCK if self.sets_clock else 0, max(1, round(self.hook_timeout_s * 1000)),
            time.time_ns() if self.sets_clock else 0, self.clone_id.bytes,
        )
        return head + os.urandom(SEED_BYTES)


class HookEnd(StrEnum):
    """How the hook ended."""

    NONE = "none"
    """The image has none."""
    EXITED = "exited"
    SIGNALLED = "signalled"
    TIMED_OUT = "timed out"
    """It was killed at its time limit, with its process group."""
    FAILED = "failed"
    """It could not be started: see ``CloneAnswer.reason``."""


class CloneAnswer(Record):
    """The agent's answer to a notice."""

    clone_id: UUID
    is_told: bool = True
    """False if the agent is too old to understand a notice: nothing was done in the guest."""
    is_reseeded: bool = False
    """True if the kernel's random numbers start anew."""
    is_clock_set: bool = False
    hook: HookEnd = HookEnd.NONE
    value: int = 0
    """The hook's exit status, or the signal that ended it."""
    reason: str = ""
    output: bytes = b""
    """The first bytes that the hook wrote, to both streams."""

    @property
    def problem(self) -> str:
        """One printable line that says why the clone is not fit for use; "" if it is."""
        match self.hook:
            case HookEnd.EXITED if self.value:
                how = f"exited with status {self.value}"
            case HookEnd.SIGNALLED:
                how = f"was ended by signal {self.value}"
            case HookEnd.TIMED_OUT:
                how = "took too long and was killed"
            case HookEnd.FAILED:
                return f"the hook for clones in the guest did not run: {self.reason}"
            case _:
                return ""
        said = printable(self.output.strip()[-_SHOWN:], 2 * _SHOWN)
        return f"the hook for clones in the guest, {HOOK}, {how}{f': {said}' if said else ''}"


class CloneTelling:
    """The job that tells a guest of its being a clone: see ``JobEvents``.

    ``on_answer`` is called once, unless the link is lost before.
    """

    def __init__(self, notice: CloneNotice, on_answer: Callable[[CloneAnswer], None]) -> None:
        self.notice = notice
        self.job: Job | None = None
        self._on_answer = on_answer
        self._done: int | None = None
        """The flags of the answer."""
        self._output = bytearray()

    def on_data(self, stream: int, data: bytes) -> None:
        """Take the flags and the hook's output."""
        kept = data
        if stream == STDOUT and self._done is None and data:
            self._done, kept = data[0], data[1:]
        self._output += kept[: MAX_HOOK_OUTPUT - len(self._output)]
        if self.job is not None and data:
            self.job.consumed(stream, len(data))

    def on_room(self) -> None:
        """A notice has no input."""

    def on_exit(self, result: JobResult) -> None:
        """Give the answer."""
        if result.kind is JobEnd.LOST:
            return
        done = self._done or 0
        ends = {JobEnd.EXITED: HookEnd.EXITED, JobEnd.SIGNALLED: HookEnd.SIGNALLED}
        end = ends.get(result.kind, HookEnd.FAILED)
        if result.is_timeout:
            end = HookEnd.TIMED_OUT
        elif end is HookEnd.EXITED and not done & HAS_HOOK:
            end = HookEnd.NONE
        self._on_answer(CloneAnswer(
            clone_id=self.notice.clone_id, is_reseeded=bool(done & RESEEDED),
            is_clock_set=bool(done & CLOCK_SET), hook=end, value=result.value,
            reason=result.reason, output=bytes(self._output),
        ))
