"""Read the fields of a saved state (docs/architecture.md, "State"), each with its type and limit.

A state may come from a file, so nothing in it is believed.  A part first reads all fields, then
takes them: a state that is refused leaves the part as it was.
"""

from __future__ import annotations

from pyvmm.errors import StateError


class Fields:
    """The fields of ``data``, the state of ``part``; StateError if it is no dict with text keys.

    ``end`` comes last: it refuses fields that nobody has read.
    """

    def __init__(self, part: str, data: object) -> None:
        self._part = part
        if not isinstance(data, dict) or not {str}.issuperset(map(type, data)):
            raise StateError(part, "the state is no dict with text keys")
        self._data: dict[str, object] = dict(data)

    def error(self, name: str, problem: str) -> StateError:
        """Return the error that says so of the field ``name``."""
        return StateError(self._part, f"{name} {problem}")

    def integer(self, name: str, least: int, most: int) -> int:
        """Return an integer of ``least`` to ``most``, both included."""
        value = self.take(name)
        if type(value) is not int or not least <= value <= most:
            raise self.error(name, f"is not an integer of {least} to {most}")
        return value

    def optional_integer(self, name: str, least: int, most: int) -> int | None:
        """Return an integer as ``integer`` does, or None."""
        if self._data.get(name, 0) is None:
            del self._data[name]
            return None
        return self.integer(name, least, most)

    def boolean(self, name: str) -> bool:
        """Return True or False."""
        value = self.take(name)
        if not isinstance(value, bool):
            raise self.error(name, "is not a boolean")
        return value

    def octets(self, name: str, least: int, most: int) -> bytes:
        """Return ``least`` to ``most`` bytes, both included."""
        value = self.take(name)
        if not isinstance(value, bytes) or not least <= len(value) <= most:
            limit = f"{most}" if least == most else f"{least} to {most}"
            raise self.error(name, f"is not {limit} bytes")
        return value

    def optional_octets(self, name: str, length: int) -> bytes | None:
        """Return ``length`` bytes, or None."""
        if self._data.get(name, 0) is None:
            del self._data[name]
            return None
        return self.octets(name, length, length)

    def optional_text(self, name: str, most: int) -> str | None:
        """Return a text of up to ``most`` characters, or None."""
        value = self.take(name)
        if value is not None and (not isinstance(value, str) or len(value) > most):
            raise self.error(name, f"is not None or a text of at most {most} characters")
        return value

    def pairs(self, name: str, most: int, limits: tuple[int, int]) -> list[tuple[int, int]]:
        """Return up to ``most`` pairs of integers from 0 to ``limits``, each a list of two."""
        value = self.take(name)
        if not isinstance(value, list) or len(value) > most:
            raise self.error(name, f"is not a list of at most {most} pairs")
        if not all(type(pair) is list and len(pair) == 2 for pair in value):
            raise self.error(name, "has an element that is not a list of two integers")
        for place, limit in enumerate(limits):
            numbers = [pair[place] for pair in value]
            is_right = {int}.issuperset(map(type, numbers))
            if not is_right or (numbers and not 0 <= min(numbers) <= max(numbers) <= limit):
                raise self.error(name, f"has an element that is not 0 to {limit:#x}")
        return [(first, second) for first, second in value]

    def take(self, name: str) -> object:
        """Return the field ``name`` unchecked."""
        if name not in self._data:
            raise self.error(name, "is missing")
        return self._data.pop(name)

    def end(self) -> None:
        """Raise StateError if there are fields that nobody has read."""
        if self._data:
            name = min(self._data)
            shown = repr(name if len(name) <= 40 else f"{name[:40]}...")
            raise StateError(self._part, f"has no field {shown}")
