"""The messages of the control protocol: lines of JSON, each checked before anybody acts on it.

docs/control.md describes the protocol.  A message comes from another process, so nothing in it is
believed: its length, its depth, its types and its names are checked here, and a mistake is one
``RequestError`` that names it.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping

from pyvmm.errors import PyvmmError
from pyvmm.startup.types import Record

PROTOCOL = 1
MAX_LINE_BYTES = 1 << 20
MAX_FDS = 16
"""Descriptors that one request may bring."""
MAX_ID = (1 << 53) - 1
"""The largest integer that every JSON library keeps exact."""
MAX_SECONDS = 86400.0 * 366
_SHOWN = 40


class RequestError(PyvmmError):
    """A request cannot be served; ``kind`` is one of docs/control.md's kinds of errors."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Request(Record):
    """One request: ``fds`` is the number of descriptors that came with it."""

    id: int
    method: str
    params: dict[str, object]
    fds: int


class LineReader:
    """Splits a stream of bytes into lines of at most ``limit`` bytes."""

    def __init__(self, limit: int = MAX_LINE_BYTES) -> None:
        self._limit = limit
        self._data = bytearray()
        self._searched = 0
        """No line ends before this byte."""

    def feed(self, data: bytes) -> None:
        """Add the next bytes of the stream."""
        self._data += data

    def next_line(self) -> bytes | None:
        """Return the next line without its end; None until one is complete.

        RequestError for a line over the limit: the stream is of no use then.
        """
        end = self._data.find(b"\n", self._searched)
        if end < 0:
            self._searched = len(self._data)
        if (len(self._data) if end < 0 else end) > self._limit:
            raise RequestError("request", f"a line has more than {self._limit} bytes")
        if end < 0:
            return None
        line = bytes(self._data[:end])
        del self._data[: end + 1]
        self._searched = 0
        return line

    @property
    def is_between_lines(self) -> bool:
        """True if no byte of a line without an end is here."""
        return not self._data


def encode(message: Mapping[str, object]) -> bytes:
    """Return ``message`` as one line, in ASCII."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> dict[str, object]:
    """Return the object in ``line``; RequestError if there is none."""
    try:
        found = json.loads(line.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise RequestError("request", f"byte {error.start} of the line is not UTF-8") from None
    except RecursionError:
        raise RequestError("request", "the line is nested too deeply") from None
    except ValueError as error:  # not JSON, or an integer of thousands of digits
        raise RequestError("request", f"the line is not JSON: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise RequestError("request", f"the line is a JSON {type_of(found)}, not an object")
    return found


def parse_request(line: bytes) -> Request:
    """Return the request in ``line``; RequestError, kind "request", if there is none."""
    message = decode(line)
    number = message.pop("id", None)
    if type(number) is not int or not 0 <= number <= MAX_ID:
        raise RequestError("request", f"id must be an integer of 0 to {MAX_ID}")
    try:
        return _request_of(number, message)
    except RequestError as error:
        error.args = (f"request {number}: {error}",)
        raise


def _request_of(number: int, message: dict[str, object]) -> Request:
    method, params = message.pop("method", None), message.pop("params", {})
    fds = message.pop("fds", 0)
    if not isinstance(method, str):
        raise RequestError("request", f"method must be a text, not {type_of(method)}")
    if not isinstance(params, dict):
        raise RequestError("request", f"params must be an object, not {type_of(params)}")
    if type(fds) is not int or not 0 <= fds <= MAX_FDS:
        raise RequestError("request", f"fds must be a number of descriptors, 0 to {MAX_FDS}")
    if message:
        raise RequestError("request", f"{shorten(min(message))} is unknown; a request has id, "
                           "method, params and fds")
    return Request(id=number, method=method, params=params, fds=fds)


def id_of(line: bytes) -> int | None:
    """Return the id in a line that ``parse_request`` refused; None if it has no valid one."""
    try:
        number = decode(line).get("id")
    except RequestError:
        return None
    return number if type(number) is int and 0 <= number <= MAX_ID else None


def type_of(value: object) -> str:
    """Return the JSON name of the type of ``value``."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "text"
        case list():
            return "array"
    return "object"


def shorten(text: str) -> str:
    """Return ``text`` quoted, and cut if it is long."""
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON number")


class Params:
    """The parameters of one request; RequestError, kind "params", for every mistake.

    ``fds`` are the descriptors that came with the request.  ``end`` comes last: it refuses
    parameters that nobody has read.
    """

    def __init__(self, method: str, values: Mapping[str, object], fds: list[int]) -> None:
        self._method = method
        self._values = dict(values)
        self._fds: list[int | None] = [*fds]

    def error(self, name: str, problem: str) -> RequestError:
        """Return the error that says so of the parameter ``name``."""
        return RequestError("params", f"{self._method}: {name} {problem}")

    def integer(self, name: str, least: int, most: int, default: int | None = None) -> int:
        """Return an integer of ``least`` to ``most``, both included."""
        value = self._take(name, default)
        if type(value) is not int or not least <= value <= most:
            raise self.error(name, f"must be an integer of {least} to {most}")
        return value

    def optional_integer(self, name: str, least: int, most: int) -> int | None:
        """Return an integer as ``integer`` does; None if it is missing or null."""
        if self._values.get(name) is None:
            self._values.pop(name, None)
            return None
        return self.integer(name, least, most)

    def seconds(self, name: str, default: float | None = None) -> float | None:
        """Return a number of seconds; ``default`` if it is missing, None if it is null."""
        if name not in self._values:
            return default
        value = self._values.pop(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(name, f"must be a number of seconds, not {type_of(value)}")
        if not math.isfinite(value) or not 0 <= value <= MAX_SECONDS:
            raise self.error(name, f"must be 0 to {MAX_SECONDS:.0f} seconds")
        return float(value)

    def text(self, name: str, most: int, default: str | None = None) -> str:
        """Return a text of at most ``most`` bytes without NUL; bytes that are no UTF-8 are
        written as Python's surrogateescape does."""
        return self._text(name, self._take(name, default), most)

    def optional_text(self, name: str, most: int) -> str | None:
        """Return a text as ``text`` does; None if it is missing or null."""
        if self._values.get(name) is None:
            self._values.pop(name, None)
            return None
        return self.text(name, most)

    def boolean(self, name: str) -> bool:
        """Return true or false; False if it is missing."""
        value = self._values.pop(name, False)
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, not {type_of(value)}")
        return value

    def data(self, name: str, most: int) -> bytes:
        """Return at most ``most`` bytes, which are written in base64."""
        value = self._take(name, None)
        if not isinstance(value, str):
            raise self.error(name, f"must be base64 text, not {type_of(value)}")
        try:
            found = base64.b64decode(value, validate=True)
        except ValueError:
            raise self.error(name, "is not base64") from None
        if len(found) > most:
            raise self.error(name, f"has {len(found)} bytes; the limit is {most}")
        return found

    def texts(self, name: str, most: int, least: int = 0) -> list[str]:
        """Return an array of texts, of ``most`` bytes together; empty if missing or null."""
        value = self._values.pop(name, None)
        if value is None and not least:
            return []
        if not isinstance(value, list) or len(value) < least:
            raise self.error(name, f"must be an array of at least {least} texts")
        found = [self._text(f"{name}[{index}]", each, most) for index, each in enumerate(value)]
        self._check_sum(name, found, most)
        return found

    def pairs(self, name: str, most: int) -> tuple[tuple[str, str], ...] | None:
        """Return an object of texts as pairs, of ``most`` bytes together; None if missing."""
        value = self._values.pop(name, None)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, f"must be an object of texts, not {type_of(value)}")
        found = []
        for key, each in value.items():
            if not key or "=" in key:
                raise self.error(name, f"has a name that cannot be one: {shorten(key)}")
            found.append((
                self._text(f"{name}: a name", key, most),
                self._text(f"{name}[{shorten(key)}]", each, most),
            ))
        self._check_sum(name, [text for pair in found for text in pair], most)
        return tuple(found)

    def fd(self, name: str, *, required: bool = True) -> int | None:
        """Return the descriptor at the index that ``name`` gives; it is the caller's from now on.

        None if it is missing or null and not ``required``.
        """
        value = self._values.pop(name, None)
        if value is None and not required:
            return None
        if type(value) is not int or not 0 <= value < len(self._fds):
            raise self.error(
                name, f"must be the index of one of the {len(self._fds)} descriptors of the request"
            )
        fd = self._fds[value]
        if fd is None:
            raise self.error(name, f"is descriptor {value}, which another parameter has already")
        self._fds[value] = None
        return fd

    def end(self) -> None:
        """Raise RequestError if there are parameters that nobody has read."""
        if self._values:
            name = min(self._values)
            raise RequestError("params", f"{self._method}: has no parameter {shorten(name)}")

    @property
    def unused_fds(self) -> list[int]:
        """The descriptors that no parameter has named."""
        return [fd for fd in self._fds if fd is not None]

    def _take(self, name: str, default: object) -> object:
        value = self._values.pop(name, default)
        if value is None:
            raise self.error(name, "is missing")
        return value

    def _text(self, name: str, value: object, most: int) -> str:
        if not isinstance(value, str):
            raise self.error(name, f"must be a text, not {type_of(value)}")
        if "\0" in value:
            raise self.error(name, "has a NUL character")
        self._check_sum(name, [value], most)
        return value

    def _check_sum(self, name: str, texts: list[str], most: int) -> None:
        try:
            length = sum(len(text.encode("utf-8", "surrogateescape")) + 1 for text in texts)
        except UnicodeEncodeError:
            raise self.error(name, "has half of a surrogate pair") from None
        if length > most + 1:
            raise self.error(name, f"has {length} bytes; the limit is {most}")
