"""A table of a TOML file whose keys and types are checked; a mistake names file, key and limit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NoReturn

from pyvmm.errors import ConfigError
from pyvmm.numerals import shown
from pyvmm.report import escape
from pyvmm.startup.mistakes import did_you_mean

MAX_NAME = 40
"""Characters of an entry's name."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_KINDS = {
    str: "a text", bool: "true or false", int: "a whole number", float: "a number",
    list: "a list", dict: "a table",
}


class Table:
    """The keys and values below ``place``, such as ``commands.load``, in the file ``file``."""

    def __init__(self, file: str, place: str, values: Mapping[str, Any]) -> None:
        self.file = file
        self.place = place
        self._values = values

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    @property
    def names(self) -> list[str]:
        """Return the keys, in the file's order."""
        return list(self._values)

    def fail(self, key: str, problem: str) -> NoReturn:
        """Raise ConfigError about ``key``, or about the table itself if that is ""."""
        place = ".".join(part for part in (self.place, key) if part)
        raise ConfigError(f"{self.file}: {escape(place)}" if place else self.file, problem)

    def only(self, known: tuple[str, ...], hint: str = "") -> None:
        """Raise ConfigError for the first key that is not among ``known``."""
        for key in self._values:
            if key not in known:
                meant = did_you_mean(key, known) or f"; there are {', '.join(known)}"
                self.fail(shown(key), f"is no key here{meant}{hint}")

    def text(self, key: str, default: str = "") -> str:
        """Return the text at ``key``, never empty if it is there."""
        if key not in self._values:
            return default
        return self._as_text(key, self._values[key])

    def texts(self, key: str, default: tuple[str, ...] = ()) -> tuple[str, ...]:
        """Return the list of texts at ``key``; a text alone is a list of one."""
        if key not in self._values:
            return default
        value = self._values[key]
        if isinstance(value, str):
            return (self._as_text(key, value),)
        return self.list_of_texts(key)

    def list_of_texts(self, key: str) -> tuple[str, ...]:
        """Return the list of texts at ``key``, which is no text alone."""
        value = self._values[key]
        if not isinstance(value, list):
            self.fail(key, f"must be a list of texts, not {kind_of(value)}")
        return tuple(self._as_text(f"{key}[{at}]", one) for at, one in enumerate(value))

    def seconds(self, key: str, default: float, most: float) -> float:
        """Return the seconds at ``key``."""
        value = self._values.get(key, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (is_number and 0 < value <= most):
            self.fail(key, f"must be a number of seconds above 0, at most {most:.0f}"
                      f", not {quoted(value)}")
        return float(value)

    def numbers(self, key: str, default: tuple[int, ...], most: int) -> tuple[int, ...]:
        """Return the list of whole numbers from 1 to ``most`` at ``key``; one alone is a list."""
        if key not in self._values:
            return default
        value = self._values[key]
        found = value if isinstance(value, list) else [value]
        for one in found:
            if not isinstance(one, int) or isinstance(one, bool) or not 1 <= one <= most:
                self.fail(key, f"must be whole numbers from 1 to {most}, not {quoted(one)}")
        return tuple(found)

    def choice(self, key: str, choices: tuple[str, ...], default: str) -> str:
        """Return the text at ``key``, one of ``choices``."""
        value = self.text(key, default)
        if value not in choices:
            self.fail(key, f"must be {' or '.join(choices)}, not {quoted(value)}")
        return value

    def table(self, key: str) -> Table:
        """Return the table at ``key``, an empty one if there is none."""
        value = self._values.get(key, {})
        if not isinstance(value, dict):
            self.fail(key, f"must be a table, [{key}], not {kind_of(value)}")
        return Table(self.file, f"{self.place}.{key}" if self.place else key, value)

    def tables(self, key: str) -> list[Table]:
        """Return the tables of the list at ``key``, an empty one if there is none."""
        value = self._values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            self.fail(key, f"must be a list of tables: write [[{key}]]")
        return [Table(self.file, f"{key}[{at}]", one) for at, one in enumerate(value)]

    def _as_text(self, key: str, value: Any) -> str:
        if not isinstance(value, str):
            self.fail(key, f"must be a text, not {kind_of(value)}")
        if not value:
            self.fail(key, "is an empty text")
        if "\0" in value:
            self.fail(key, "has a NUL, which no name and no argument may have")
        return value


def check_name(table: Table, name: str) -> None:
    """Raise ConfigError unless ``name`` may be an entry's, and so a part of a file's name."""
    if len(name) > MAX_NAME or not _NAME.fullmatch(name):
        table.fail(
            shown(name), f"is no name for a run: it may have letters, digits, '_', '-' and '.', "
            f"not begin with '-' or '.', and have at most {MAX_NAME} characters"
        )


def kind_of(value: object) -> str:
    """Return how a message calls the type of ``value``."""
    return _KINDS.get(type(value), "a date or time")


def quoted(value: object) -> str:
    """Return ``value`` as a message quotes it: short, on one line."""
    if isinstance(value, (list, dict)):
        return kind_of(value)
    return escape(shown(repr(value)))
