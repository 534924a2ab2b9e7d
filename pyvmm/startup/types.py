"""The boot path's substitutes for ``typing``, ``dataclasses``, ``enum`` and ``pathlib``.

``typing`` and ``dataclasses``, with their imports and the code that ``@dataclass`` writes and
compiles at every start, took a third of the time to the first guest instruction.  Making the
classes of 25 enumerations took another tenth.  docs/architecture.md, "What the boot path may
import", has the rule; tests/test_imports.py holds the code to it.

``TYPE_CHECKING`` is false, but type checkers take it for true because of its name.  Names that only
annotations use are imported under it.  Type checkers also see the real ``Protocol``, and give a
``Record`` the constructor and the immutability of a frozen keyword-only dataclass.

Type checkers take ``IntEnum``, ``IntFlag`` and ``StrEnum`` for the standard library's.  At run time
a member is the plain integer or text to which it was set.  It does not know its class, and has no
``name`` and no ``value`` of its own (``name_of`` finds a name).
"""

from __future__ import annotations

import functools
import os

TYPE_CHECKING = False
__all__ = [
    "TYPE_CHECKING", "IntEnum", "IntFlag", "Protocol", "Record", "StrEnum", "cache_path",
    "configuration_paths", "name_of",
]

if TYPE_CHECKING:
    from enum import Enum, IntEnum, IntFlag, StrEnum
    from typing import Any, ClassVar, Protocol, Self, dataclass_transform
else:
    Protocol = object

    class _Enumeration(type):
        """A class used as an enumeration: called, iterated over and indexed by name."""

        def __call__(cls, value):
            # Return the member itself, because the code compares with `is`.
            for member in cls:
                if member == value:
                    return member
            if cls._any_bits:
                return value
            raise ValueError(f"{value!r} is not a valid {cls.__name__}")

        def __iter__(cls):
            return (value for name, value in vars(cls).items() if name[0] != "_")

        def __getitem__(cls, name):
            if name in vars(cls) and name[0] != "_":
                return vars(cls)[name]
            raise KeyError(name)

    class IntEnum(metaclass=_Enumeration):
        """Integers with names."""

        _any_bits = False

    class IntFlag(metaclass=_Enumeration):
        """Bits with names; any combination is valid."""

        _any_bits = True

    class StrEnum(metaclass=_Enumeration):
        """Texts with names."""

        _any_bits = False

    def dataclass_transform(**_options):
        """Return a decorator that does nothing: only type checkers heed it."""
        return lambda kind: kind


def name_of(kind: type[Enum], value: object) -> str:
    """Return the name of the member of ``kind`` that equals ``value``; "" if none does."""
    names = (name for name in vars(kind) if name[0] != "_" and kind[name] == value)
    return next(names, "")


@dataclass_transform(kw_only_default=True, frozen_default=True)
class _RecordType(type):
    """Makes the annotated names of a class its slots, and their values in it the defaults."""

    def __new__(
        mcs,
        name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        *,
        kw_only: bool = True,
    ) -> _RecordType:
        annotations: dict[str, str] = namespace.get("__annotations__", {})
        fields = [name for name, kind in annotations.items() if not kind.startswith("ClassVar")]
        defaults = {field: namespace.pop(field) for field in fields if field in namespace}
        namespace |= {
            "__slots__": fields, "_fields": tuple(fields), "_defaults": defaults,
            "_kw_only": kw_only,
        }
        return super().__new__(mcs, name, bases, namespace)

    @property
    def __signature__(cls) -> object:
        """Return the fields as ``inspect.Signature``: ``help`` and editors show it."""
        from inspect import Parameter, Signature, get_annotations

        fields, annotations = cls.__dict__["_fields"], get_annotations(cls)
        defaults = cls.__dict__["_defaults"]
        kind = Parameter.KEYWORD_ONLY if cls.__dict__["_kw_only"] else (
            Parameter.POSITIONAL_OR_KEYWORD
        )
        return Signature([
            Parameter(
                field, kind, default=defaults.get(field, Parameter.empty),
                annotation=annotations[field],
            )
            for field in fields
        ])


class Record(metaclass=_RecordType):
    """Base of immutable values: a class's annotated names are its fields, given by keyword.

    In a class made with ``kw_only=False`` fields may be given by position too.  Defaults are
    shared, so they must be immutable as well.  ``__post_init__`` runs last and may refuse values.
    Records are equal if their class is the same and their fields are equal.  A class that inherits
    fields cannot be constructed: put one record into another instead.

    A record takes 2 us to make: fine for a few hundred objects, not for one per request.
    """

    _fields: ClassVar[tuple[str, ...]]
    _defaults: ClassVar[dict[str, object]]
    _kw_only: ClassVar[bool]

    def __init__(self, *by_position: object, **values: object) -> None:
        kind = type(self)
        if by_position:
            if kind._kw_only or len(by_position) > len(kind._fields):
                first = "" if not kind._fields else f": write {kind._fields[0]}=..."
                raise TypeError(f"{kind.__name__}: too many arguments without a name{first}")
            for name, value in zip(kind._fields, by_position, strict=False):
                if name in values:
                    raise TypeError(f"{kind.__name__}: {name} is given twice")
                values[name] = value
        given = {**kind._defaults, **values}
        if given.keys() != set(kind._fields):
            if unknown := ", ".join(sorted(given.keys() - set(kind._fields))):
                known = ", ".join(kind._fields)
                raise TypeError(f"{kind.__name__}: unknown: {unknown}; there are {known}")
            missing = ", ".join(sorted(set(kind._fields) - given.keys()))
            raise TypeError(f"{kind.__name__}: missing: {missing}")
        for name, value in given.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    def __post_init__(self) -> None:
        """Check the fields; a class may override this and raise."""

    def replace(self, **changes: Any) -> Self:
        """Return a copy with ``changes``, new values by the names of fields."""
        return type(self)(**{**self._values(), **changes})

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        # To be copied and pickled by: a copy's fields are set as those of any other record.
        return functools.partial(type(self), **self._values()), ()

    def _values(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self._fields}

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} cannot be set: records do not change")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} cannot be deleted")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self._fields)

    def __hash__(self) -> int:
        return hash((type(self), *self._values().values()))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self._values().items())
        return f"{type(self).__name__}({fields})"


def cache_path() -> str:
    """Return the cache directory: ``$PYVMM_CACHE``, else ``$XDG_CACHE_HOME/pyvmm``, else
    ``~/.cache/pyvmm``.

    The directory need not exist, and may be another user's (``linux.trust``).
    """
    if chosen := os.environ.get("PYVMM_CACHE"):
        return os.path.abspath(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(_own_home(), ".cache")
    return os.path.join(base, "pyvmm")


def _own_home() -> str:
    """Return ``$HOME``; if that is another user's, as under ``sudo -E``, our own account's home.

    Root must not run files from a user's cache, nor leave files there that the user cannot remove.
    """
    home = os.environ.get("HOME", "")
    try:
        is_own = os.stat(home).st_uid in (0, os.geteuid())
    except OSError:
        is_own = bool(home)  # not there yet
    if is_own:
        return home
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        return home or "/"


def configuration_paths(kernel: str | os.PathLike[str], version: str) -> list[str]:
    """Return the absolute paths at which to look, in order, for the configuration of ``kernel``.

    They are ``config-VERSION`` in the kernel's directory, as distributions have it, with VERSION
    from the kernel's name or from the kernel itself; and ``.config`` of the source tree in which
    the kernel was built.  ``version`` is the kernel's own text, "" if unknown.
    """
    release = version.split(" ", 1)[0]
    found = []
    for path in dict.fromkeys((os.path.abspath(kernel), os.path.realpath(kernel))):
        folder, _, name = path.rpartition("/")
        _, dash, suffix = name.partition("-")
        if dash:
            found.append(f"{folder}/config-{suffix}")
        if release and "/" not in release:
            found.append(f"{folder}/config-{release}")
        if name == "vmlinux":
            found.append(f"{folder}/.config")
        for boot in ("/arch/x86/boot", "/arch/x86_64/boot"):
            if folder.endswith(boot):
                found.append(f"{folder.removesuffix(boot)}/.config")
    return list(dict.fromkeys(found))
