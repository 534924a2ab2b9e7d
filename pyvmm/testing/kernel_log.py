"""The kernel's log as ``/dev/kmsg`` gives it: the level of each message, and who wrote it.

Documentation/ABI/testing/dev-kmsg has the format: ``6,339,5140900,-;text``, then lines that begin
with a space.
"""

from __future__ import annotations

from pyvmm.startup.types import Record
from pyvmm.testing.fail_on import Classifier, FailOn
from pyvmm.testing.line_judge import LINES_BEFORE, Finding, shown_line

WARN_LEVEL = 4
MAX_RECORDS = 100_000
_KERNEL = 0  # the facility of printk's own messages; others are programs'


class KernelMessage(Record):
    """A message of the log; ``text`` is escaped, ``is_kernel`` False if a program wrote it."""

    level: int
    at_s: float
    text: str
    is_kernel: bool

    def __str__(self) -> str:
        return f"[{self.at_s:12.6f}] {self.text}"


def kernel_messages(data: bytes) -> list[KernelMessage]:
    """Return the messages in ``data``, which was read from /dev/kmsg; others are left out."""
    found = []
    for line in data.split(b"\n", MAX_RECORDS):
        head, semicolon, text = line.partition(b";")
        fields = head.split(b",")
        if not semicolon or len(fields) < 3 or not all(f.isdigit() for f in fields[:3]):
            continue
        priority, microseconds = int(fields[0][:9]), int(fields[2][:18])
        found.append(KernelMessage(
            level=priority & 7, at_s=microseconds / 1e6, text=shown_line(_plain(text)),
            is_kernel=priority >> 3 == _KERNEL,
        ))
    return found


def warnings_of(messages: list[KernelMessage]) -> tuple[str, ...]:
    """Return the kernel's own messages of level warn and worse, as dmesg shows them."""
    return tuple(str(one) for one in messages if one.is_kernel and one.level <= WARN_LEVEL)


def bad_message(messages: list[KernelMessage], fail_on: FailOn) -> Finding | None:
    """Return the first message of the kernel that fails a test; None without one.

    A user's patterns are for the console: they do not count here.
    """
    classifier = Classifier(fail_on.replace(patterns=()))
    for place, message in enumerate(messages):
        if message.is_kernel:
            kind, _ = classifier.class_of([message.text], message.text)
            if kind:
                before = messages[max(0, place - LINES_BEFORE) : place]
                return Finding(
                    kind=kind, line=str(message), before=tuple(map(str, before)),
                    trace=tuple(map(str, messages[place + 1 : place + LINES_BEFORE])),
                )
    return None


def _plain(text: bytes) -> bytes:
    r"""Return ``text`` without the escapes of /dev/kmsg: ``\x09`` is a tab."""
    return text.replace(b"\\x09", b"\t").replace(b"\\x5c", b"\\")
