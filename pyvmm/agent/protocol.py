"""The agent's protocol, version 2: numbers and layouts (docs/agent.md; guest/agent/agent.h).

Both sides send frames over one virtio-console port.  A frame has a header of 12 bytes, little-
endian: bytes of the payload, type, stream, id of the job.  Its payload follows.
"""

from __future__ import annotations

import struct

from pyvmm.errors import AgentError
from pyvmm.startup.types import IntEnum, IntFlag, Record

VERSION = 2
OLDEST_VERSION = 1
CLONE_VERSION = 2
"""From this version on the agent understands CLONE."""
PORT_NAME = "org.pyvmm.agent"
"""The virtio-console port by which agent and host find each other."""
GUEST_MAGIC = b"PYVMMAGT"
"""The first bytes of HELLO's payload."""
HOST_MAGIC = b"PYVMMHST"
"""The first bytes of START's payload."""
MAX_PAYLOAD = 1 << 16
MAX_JOBS = 16
"""Commands and transfers at a time."""
WINDOW = 1 << 18
"""Bytes of each stream that may be on their way: the most that HELLO may ask for."""
MIN_WINDOW = 1 << 12
MAX_TEXT = 1024
"""Bytes of the text in EXIT, and behind HELLO's numbers."""
MAX_RUN_BYTES = MAX_PAYLOAD - 64
"""Bytes of a command's working directory, arguments and environment together."""
MAX_PATH = 4095
"""Bytes of a path in PUT, GET, READ or WRITE."""
LAST_SIGNAL = 64
MAX_TIMEOUT_MS = (1 << 32) - 1

TO_GUEST = 0
"""The stream of a command's standard input, or of what PUT and WRITE take."""
STDOUT = 1
"""The stream of a command's standard output, or of what GET and READ give."""
STDERR = 2

HEADER = struct.Struct("<IHHI")
"""Bytes of the payload, type, stream, id."""
HELLO = struct.Struct("<8sHHI")
"""Magic, version, jobs at a time, window in bytes; a text follows."""
START = struct.Struct("<8sH")
"""Magic, version."""
RUN = struct.Struct("<IIHH")
"""Flags, time limit in ms (0: none), number of arguments, of variables; NUL-ended texts follow."""
U32 = struct.Struct("<I")
EXIT = struct.Struct("<BBHI")
"""End, flags, zero, value; a text follows."""

HELLO_BEGINS = struct.pack("<HHI", 1, 0, 0) + GUEST_MAGIC
"""By these bytes the host finds the first frame behind what others have written to the port."""


class FrameType(IntEnum):
    """Frames of the agent are below 16, those of the host above."""

    HELLO = 1
    DATA = 2
    CREDIT = 3
    EXIT = 4
    PONG = 5
    START = 16
    RUN = 17
    PUT = 18
    GET = 19
    READ = 20
    WRITE = 21
    KILL = 22
    PING = 23
    CLONE = 24


class RunFlag(IntFlag):
    """Flags of RUN."""

    HAS_INPUT = 1
    """The host sends a standard input; without it the command reads end of file at once."""
    EXACT_ENV = 2
    """The variables are all that there is; without it they are added to the agent's defaults."""


class ExitEnd(IntEnum):
    """How a job ended: the first byte of EXIT."""

    EXITED = 0
    SIGNALLED = 1
    FAILED = 2


EXIT_TIMED_OUT = 1
"""The flag of EXIT: the time limit was over, and the agent killed the process group."""


class RunRequest(Record):
    """A command for the guest: arguments, variables, working directory, input, time limit.

    ``argv`` and ``env`` take text or bytes; text with surrogate escapes stands for its bytes.
    ``env`` is added to the agent's defaults (PATH, HOME, TERM), or with ``is_env_exact`` it is
    all there is.  ``cwd`` is "/" if empty.  ``timeout_ms`` is 0 for no limit.
    """

    argv: tuple[str | bytes, ...]
    env: tuple[tuple[str | bytes, str | bytes], ...] | None = None
    is_env_exact: bool = False
    cwd: str | bytes = ""
    timeout_ms: int = 0
    has_input: bool = False

    def payload(self) -> bytes:
        """Return the payload of RUN; AgentError if the agent could not take it."""
        if not self.argv or not self.argv[0]:
            raise AgentError("a command for the guest needs a program: its first argument is empty")
        if not 0 <= self.timeout_ms <= MAX_TIMEOUT_MS:
            raise AgentError(
                f"a command's time limit must be 0 to {MAX_TIMEOUT_MS} ms, not {self.timeout_ms}"
            )
        variables = [_variable(*pair) for pair in self.env or ()]
        texts = [
            text_bytes(self.cwd, "a working directory"),
            *(text_bytes(word, "an argument") for word in self.argv), *variables,
        ]
        size = sum(map(len, texts)) + len(texts)
        if size > MAX_RUN_BYTES:
            raise AgentError(
                f"arguments and environment of {printable(self.argv[0])} are {size} bytes; the "
                f"agent takes {MAX_RUN_BYTES}: put long data into a file or the standard input"
            )
        flags = (RunFlag.HAS_INPUT if self.has_input else 0) | (
            RunFlag.EXACT_ENV if self.is_env_exact else 0
        )
        head = RUN.pack(flags, self.timeout_ms, len(self.argv), len(variables))
        return head + b"".join(text + b"\0" for text in texts)


def _variable(name: str | bytes, value: str | bytes) -> bytes:
    """Return ``NAME=VALUE``; AgentError if that would be another variable."""
    name_bytes = text_bytes(name, "a variable's name")
    if not name_bytes or b"=" in name_bytes:
        raise AgentError(f"{printable(name)!r} cannot be the name of an environment variable")
    return name_bytes + b"=" + text_bytes(value, "a variable")


def text_bytes(text: str | bytes, subject: str) -> bytes:
    """Return ``text`` as the guest gets it; AgentError if it has a NUL."""
    try:
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise AgentError(f"{subject} for the guest is no text: {printable(text)}") from None
    if b"\0" in data:
        raise AgentError(f"{subject} for the guest has a zero byte: {printable(data)}")
    return data


def path_bytes(path: str | bytes) -> bytes:
    """Return an absolute path of the guest as its bytes, or raise AgentError."""
    data = text_bytes(path, "a path")
    if not data.startswith(b"/"):
        raise AgentError(f"a path in the guest must begin with /, not {printable(data)!r}")
    if len(data) > MAX_PATH:
        raise AgentError(f"a path in the guest has at most {MAX_PATH} bytes, not {len(data)}")
    return data


def printable(text: str | bytes, limit: int = 80) -> str:
    """Return ``text`` for an error's line: escaped, and cut to about ``limit`` characters."""
    from pyvmm.report import escape

    words = text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text
    return escape(words if len(words) <= limit else f"{words[:limit]}...")


def frame(kind: int, stream: int, job: int, payload: bytes = b"") -> bytes:
    """Return a frame; ``payload`` has at most MAX_PAYLOAD bytes."""
    return HEADER.pack(len(payload), kind, stream, job) + payload
