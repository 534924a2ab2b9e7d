"""The script of a faulty disk: what goes wrong, and when.  docs/disks.md has the grammar.

    read 3: EIO                         # the third read
    write 5-7 sectors 2048-4095: ENOSPC # the 5th to 7th write that touches these sectors
    write 10: torn 512                  # stores 512 bytes and says all is well
    flush 2+: lost                      # from the second on
    any *: delay 0.01                   # seconds
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from enum import Enum

from pyvmm.errors import ConfigError
from pyvmm.numerals import decimal_number, shown, whole_number
from pyvmm.storage.backend import SECTOR_SIZE


class Operation(Enum):
    """The operations that a fault can meet."""

    READ = "read"
    WRITE = "write"
    FLUSH = "flush"
    DISCARD = "discard"
    ZEROES = "zeroes"


class Effect(Enum):
    """The effects that a fault can have."""

    ERROR = "error"
    TORN = "torn"
    SHORT = "short"
    LOST = "lost"
    DELAY = "delay"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """``effect`` on matching operations ``first`` to ``last`` (None: for ever).

    An operation matches if it is one of ``operations`` and, unless ``sectors`` is None, touches one
    of them.  A torn write or a short read still transfers ``length`` bytes.  ``error`` is the errno
    reported, 0 for success; a delay lasts ``delay_s``.
    """

    operations: frozenset[Operation]
    first: int
    last: int | None
    effect: Effect
    sectors: range | None = None
    length: int = 0
    error: int = 0
    delay_s: float = 0.0

    def matches(self, operation: Operation, offset: int, length: int) -> bool:
        """True if the operation, on ``length`` bytes at ``offset``, counts for this fault."""
        if operation not in self.operations:
            return False
        if self.sectors is None:
            return True
        first, end = offset // SECTOR_SIZE, -(-(offset + length) // SECTOR_SIZE)
        return first < self.sectors.stop and self.sectors.start < end


_LINE = re.compile(
    r"(?P<operation>\w+)\s+(?P<which>\*|\d+(?:\+|-\d+)?)"
    r"(?:\s+sectors?\s+(?P<low>\d+)(?:-(?P<high>\d+))?)?\s*:\s*(?P<effect>.+)",
    re.ASCII,
)
_EFFECT = re.compile(
    r"(?P<name>torn|short|lost|delay)?(?:\b\s*(?P<number>\d+(?:\.\d+)?))?\s*(?P<error>E[A-Z0-9]+)?",
    re.ASCII,
)
MAX_FAULTS = 1000
"""Faults of one script: each operation looks at every fault."""
MAX_DELAY_S = 3600
_MAX_COUNT = 10**15
_MAX_BYTES = (1 << 63) - 1
_MAX_SECTOR = _MAX_BYTES // SECTOR_SIZE
_ERRNOS = {name: number for number, name in errno.errorcode.items()}
_EXAMPLE = "write 3: EIO"


def parse_script(text: str, name: str) -> tuple[Fault, ...]:
    """Return a script's faults, a line each; ConfigError names the script ``name`` and the line."""
    faults: list[Fault] = []
    for number, line in enumerate(text.splitlines(), 1):
        statement = line.partition("#")[0].strip()
        if statement:
            if len(faults) == MAX_FAULTS:
                raise ConfigError(name, f"line {number}: a script has at most {MAX_FAULTS} faults")
            try:
                faults.append(_parse_line(statement))
            except ValueError as error:
                raise ConfigError(name, f"line {number}: {error}") from error
    return tuple(faults)


def _parse_line(statement: str) -> Fault:
    found = _LINE.fullmatch(statement)
    if not found:
        raise ValueError(f"{shown(statement)!r} is no fault; write one like {_EXAMPLE!r}")
    operations = _operations(found["operation"])
    first, last = _which(found["which"])
    sectors = None
    if found["low"]:
        low = _number("sector", found["low"], _MAX_SECTOR)
        high = _number("sector", found["high"], _MAX_SECTOR) if found["high"] else low
        sectors = range(low, high + 1)
        if not sectors:
            raise ValueError(f"sectors {low}-{high} are none")
        if operations == {Operation.FLUSH}:
            raise ValueError("a flush touches no sectors")
        operations -= {Operation.FLUSH}
    effect, length, error, delay_s = _effect(found["effect"], operations)
    return Fault(
        operations=operations, first=first, last=last, sectors=sectors,
        effect=effect, length=length, error=error, delay_s=delay_s,
    )


def _operations(word: str) -> frozenset[Operation]:
    if word == "any":
        return frozenset(Operation)
    try:
        return frozenset({Operation(word)})
    except ValueError:
        names = ", ".join(operation.value for operation in Operation)
        raise ValueError(f"no operation {shown(word)!r}; there are {names} and any") from None


def _which(text: str) -> tuple[int, int | None]:
    """Return first and last, counted from 1, of ``3``, ``3-5``, ``3+`` or ``*``."""
    if text == "*":
        return 1, None
    low, dash, high = text.removesuffix("+").partition("-")
    first = _number("count", low, _MAX_COUNT)
    last = _number("count", high, _MAX_COUNT) if dash else None if text.endswith("+") else first
    if not first or (last is not None and last < first):
        raise ValueError(f"{text} is no count; the first operation is 1")
    return first, last


def _effect(text: str, operations: frozenset[Operation]) -> tuple[Effect, int, int, float]:
    """Parse ``EIO``, ``torn 512 [EIO]``, ``short 512``, ``lost`` or ``delay 0.5``."""
    found = _EFFECT.fullmatch(text)
    if not found:
        raise ValueError(
            f"no effect {shown(text)!r}; there are torn, short, lost, delay and errors"
        )
    word, number, error_name = found["name"], found["number"], found["error"]
    if error_name and error_name not in _ERRNOS:
        raise ValueError(f"no error is called {shown(error_name)}")
    error = _ERRNOS[error_name] if error_name else 0
    if word is None and error and number is None:
        return Effect.ERROR, 0, error, 0.0
    if word == "delay" and number and not error:
        delay_s = decimal_number(number, 0, MAX_DELAY_S)
        if delay_s is None:
            raise ValueError(f"delay {shown(number)} is over the limit of {MAX_DELAY_S} seconds")
        return Effect.DELAY, 0, 0, delay_s
    if word == "lost" and number is None and not error:
        if Operation.READ in operations:
            raise ValueError("a read cannot be lost")
        return Effect.LOST, 0, 0, 0.0
    if word in ("torn", "short") and number and number.isdigit():
        effect, only = (
            (Effect.TORN, Operation.WRITE) if word == "torn" else (Effect.SHORT, Operation.READ)
        )
        if operations != {only}:
            raise ValueError(f"only a {only.value} can be {word}")
        length = _number("length", number, _MAX_BYTES)
        return effect, length, error or (errno.EIO if word == "short" else 0), 0.0
    raise ValueError(
        f"{shown(text)!r} is no effect; write EIO, torn 512, short 512, lost or delay 0.5"
    )


def _number(what: str, digits: str, highest: int) -> int:
    number = whole_number(digits, 0, highest)
    if number is None:
        raise ValueError(f"{what} {shown(digits)} is over the limit of {highest}")
    return number
