"""What jailed threads really call, by strace, held against the jail's written table.

    python -m tests.support.traced [--rules] CMD...

runs CMD under strace, with all that it starts.  From the moment at which a thread takes a filter
of pyvmm's, each of its system calls is looked up in the table.  Prints each kind of call that the
table does not have, with its arguments, and with --rules also what no thread has used of the table.
The exit status is 1 if a call is missing, else that of CMD.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pyvmm.jail import bpf
from pyvmm.jail.programs import PROGRAMS
from pyvmm.jail.table import RULES
from tests.support.table_words import said

STRACE = (
    "strace", "-ff", "-qq", "-X", "raw", "-v", "-s", "0", "-e", "raw=!seccomp,clone,clone3",
    "-e", "signal=none",
)
"""Numbers for all but the calls that make threads and load filters."""
_CALL = re.compile(r"(\w+)\((.*)\) += (\?|-?[0-9a-fx]+)(.*)")
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+")
_INSTRUCTION = re.compile(
    r"BPF_(?:STMT|JUMP)\(([0-9a-fx|]+), ([0-9a-fx|]+)(?:, ([0-9a-fx]+), ([0-9a-fx]+))?\)"
)
_CLONE_FLAGS = re.compile(r"flags=([0-9a-fx|]+)")
_CLONE_THREAD = 0x0001_0000
_MAKERS = ("clone", "clone3", "fork", "vfork")
_SECCOMP_SET_MODE_FILTER = 1
Call = tuple[str, str, tuple[int, ...]]
"""The kind of a thread, a system call's name, and its arguments."""
_Thread = tuple[int, int, tuple[str, ...]]
"""A thread's number, its process's, and the kinds whose filters it has."""
_Instructions = tuple[tuple[int, ...], ...]


@dataclass
class Traced:
    """All that threads under filters have called."""

    calls: Counter[Call] = field(default_factory=Counter)

    @property
    def kinds(self) -> set[str]:
        """The kinds of threads that there were."""
        return {kind for kind, _, _ in self.calls}

    def missing(self) -> list[str]:
        """Return a line for each call that the table does not have."""
        found: Counter[str] = Counter()
        for (kind, name, arguments), count in self.calls.items():
            if said(kind, name, arguments) == bpf.KILL_PROCESS:
                found[f"{kind}: {name}({', '.join(map(hex, arguments[:4]))}, ...)"] += count
        return [f"{line} {count} times" for line, count in sorted(found.items())]

    def unused(self) -> list[str]:
        """Return a line for each rule, with the kinds of threads seen that have not used it."""
        used: set[tuple[int, str]] = set()
        for kind, name, arguments in self.calls:
            for index, rule in enumerate(RULES):
                if rule.syscall == name and kind in rule.kinds and all(
                    arguments[one.argument] & 0xFFFFFFFF & one.mask in one.values
                    for one in rule.when
                ):
                    used.add((index, kind))
        lines = []
        for index, rule in enumerate(RULES):
            kinds = [
                kind for kind in rule.kinds if kind in self.kinds and (index, kind) not in used
            ]
            if kinds:
                lines.append(f"{rule.syscall} {rule.only}: {', '.join(kinds)}")
        return lines


def _kinds_by_filter() -> dict[_Instructions, str]:
    """Return the kind that has a filter, whose process's number is 0."""
    return {
        tuple(bpf.INSTRUCTION.iter_unpack(_without_pid(data, places))): kind
        for kind, (data, places) in PROGRAMS.items()
    }


def _without_pid(data: bytes, places: Sequence[int]) -> bytes:
    blank = bytearray(data)
    for place in places:
        blank[place : place + 4] = bytes(4)
    return bytes(blank)


class _Reader:
    """Reads the files of one trace, each of one thread, beginning at the first process's."""

    def __init__(self, prefix: Path) -> None:
        self._files = {
            int(path.suffix[1:]): path for path in prefix.parent.glob(f"{prefix.name}.*")
        }
        self._by_filter = _kinds_by_filter()
        self._pid_places = {
            kind: {place // bpf.INSTRUCTION.size for place in places}
            for kind, (_, places) in PROGRAMS.items()
        }
        self.found = Traced()

    def read_all(self) -> Traced:
        """Return what all threads have called."""
        # A thread's parent has a file of its own, which has to be read first.  Numbers wrap round.
        children = set().union(*map(self._children, self._files))
        waiting: list[_Thread] = [
            (thread, thread, ()) for thread in self._files if thread not in children
        ]
        begun: set[int] = set()
        while waiting:
            thread, process, kinds = waiting.pop()
            if thread in self._files and thread not in begun:
                begun.add(thread)
                waiting += self._read(thread, process, kinds)
        return self.found

    def _children(self, thread: int) -> set[int]:
        """Return the threads and processes that ``thread`` has made."""
        with self._files[thread].open(errors="replace") as lines:
            calls = filter(None, map(_CALL.match, lines))
            return {
                int(call[3]) for call in calls if call[1] in _MAKERS and call[3].isdecimal()
            }

    def _read(
        self, thread: int, process: int, kinds: tuple[str, ...]
    ) -> Iterator[_Thread]:
        """Note the calls of ``thread``; yield the threads that it makes."""
        with self._files[thread].open(errors="replace") as lines:
            for line in lines:
                call = _CALL.match(line)
                if call is None:
                    continue
                name, text, result, _ = call.groups()
                if kinds:
                    self._note(kinds, name, text, process)
                if name == "seccomp" and result == "0":
                    kind = self._kind_of(text)
                    kinds = (*kinds, kind) if kind else kinds
                elif name in _MAKERS and result.isdecimal():
                    flags = _CLONE_FLAGS.search(text)
                    is_thread = flags is not None and _sum(flags[1]) & _CLONE_THREAD
                    yield int(result), process if is_thread else int(result), kinds

    def _note(self, kinds: tuple[str, ...], name: str, text: str, process: int) -> None:
        if name in ("clone", "clone3", "seccomp"):
            flags = _CLONE_FLAGS.search(text)
            first = int(text.split(",")[0], 0) if name == "seccomp" else 0
            numbers = [_sum(flags[1]) | _exit_signal(text) if flags else first]
        else:
            numbers = [int(one, 0) for one in _NUMBER.findall(text)]
        if name in ("kill", "tgkill") and numbers[0] == process:
            numbers[0] = bpf.OWN_PID
        arguments = tuple((numbers + [0] * 6)[:6])
        for kind in kinds:
            self.found.calls[kind, name, _without_addresses(kind, name, arguments)] += 1

    def _kind_of(self, text: str) -> str:
        """Return the kind whose filter was loaded; "" for a filter that is not pyvmm's."""
        found = []
        for code, constant, if_true, if_false in _INSTRUCTION.findall(text):
            found.append(tuple(_sum(part or "0") for part in (code, if_true, if_false, constant)))
        for kind, places in self._pid_places.items():
            blank = tuple(
                (*one[:3], 0) if at in places else one for at, one in enumerate(found)
            )
            if self._by_filter.get(blank) == kind:
                return kind
        return ""


def _sum(text: str) -> int:
    return sum(int(part, 0) for part in text.split("|"))


def _exit_signal(text: str) -> int:
    found = re.search(r"exit_signal=(\d+)", text)
    return int(found[1]) if found else 0


def _without_addresses(kind: str, name: str, arguments: tuple[int, ...]) -> tuple[int, ...]:
    """Keep only the arguments that some rule looks at: else no two calls are the same."""
    wanted = {
        one.argument for rule in RULES if rule.syscall == name for one in rule.when
    }
    return tuple(value if at in wanted else 0 for at, value in enumerate(arguments))


def trace(command: Sequence[str], folder: Path, **options: object) -> tuple[int, Traced]:
    """Run ``command`` under strace; return its exit status, and what its threads have called.

    ``folder`` takes the trace, which is removed; ``options`` are subprocess.run's.
    """
    prefix = folder / "trace"
    done = subprocess.run(
        [*STRACE, "-o", str(prefix), "--", *command], check=False, **options  # type: ignore[call-overload]
    )
    found = _Reader(prefix).read_all()
    for path in folder.glob("trace.*"):
        path.unlink()
    return done.returncode, found


def main(words: Sequence[str]) -> int:
    """See the module; return the exit status."""
    shows_rules = words[:1] == ["--rules"]
    with tempfile.TemporaryDirectory(prefix="pyvmm-traced-", dir="/var/tmp") as folder:
        status, found = trace(words[shows_rules:], Path(folder))
    print(f"traced: {sum(found.calls.values())} calls of threads of {len(found.kinds)} kinds: "
          f"{', '.join(sorted(found.kinds))}")
    missing = found.missing()
    for line in missing:
        print(f"not in the table: {line}")
    if shows_rules:
        for line in found.unused():
            print(f"not used: {line}")
    return 1 if missing else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
