"""A table of options, and two readers of it.

``parse`` is for a command line that is well formed, as nearly all are.  Whatever it does not
understand at once, ``--help`` and every mistake, is for argparse, which is built from the same
table and decides: it has the messages, and is imported only then.  Where ``parse`` gives a
result, argparse gives the same (tests/startup/test_options.py).
"""

from __future__ import annotations

from types import SimpleNamespace

from pyvmm.errors import ConfigError
from pyvmm.startup.types import TYPE_CHECKING, Record

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, NoReturn


class Option(Record):
    """``name`` with a value shown as ``metavar``; without ``metavar`` a flag, which is counted.

    ``many`` collects the values in a list.  ``short`` is a flag's other name, as ``-v``.
    """

    name: str
    help: str
    metavar: str = ""
    default: str | None = None
    short: str = ""
    required: bool = False
    many: bool = False

    @property
    def attribute(self) -> str:
        """What the result calls it."""
        return self.name.removeprefix("--").replace("-", "_")

    @property
    def absent(self) -> Any:
        """Its value where it is not given."""
        if not self.metavar:
            return 0
        return [] if self.many else self.default


class Command(Record):
    """A subcommand of ``pyvmm``: its options, and what ``--help`` says around them."""

    name: str
    description: str
    epilog: str
    options: tuple[Option, ...]


def parse_options(command: Command, argv: Sequence[str]) -> SimpleNamespace:
    """The options in ``argv``, as attributes.  ConfigError for a mistake; ``--help`` exits."""
    values = parse(command.options, argv)
    return values if values is not None else parse_by_argparse(command, argv)


def parse(options: Sequence[Option], argv: Sequence[str]) -> SimpleNamespace | None:
    """``argv`` if it is nothing but known options with their values; None if argparse must say.

    ``--name VALUE``, ``--name=VALUE`` and flags; a VALUE of its own does not begin with a dash.
    """
    by_name = {option.name: option for option in options}
    by_name |= {option.short: option for option in options if option.short}
    values: dict[str, Any] = {option.attribute: option.absent for option in options}
    missing = {option.attribute for option in options if option.required}
    rest = iter(argv)
    for word in rest:
        name, has_value, value = word.partition("=")
        option = by_name.get(name)
        if option is None or (has_value and not (option.metavar and name == option.name)):
            return None
        if not option.metavar:
            values[option.attribute] += 1
            continue
        if not has_value:
            following = next(rest, None)
            if following is None or following.startswith("-"):
                return None
            value = following
        elif value == "--":
            return None  # argparse takes it for the end of the options
        if option.many:
            values[option.attribute].append(value)
        else:
            values[option.attribute] = value
        missing.discard(option.attribute)
    return None if missing else SimpleNamespace(**values)


def parse_by_argparse(command: Command, argv: Sequence[str]) -> SimpleNamespace:
    """The same by argparse.  ConfigError for a mistake; ``--help`` exits."""
    import argparse

    class Parser(argparse.ArgumentParser):
        """argparse whose errors are ours: one line, status 125."""

        def error(self, message: str) -> NoReturn:
            raise ConfigError(command.name, f"{message} (pyvmm {command.name} --help)")

    parser = Parser(
        prog=f"pyvmm {command.name}",
        description=command.description,
        epilog=command.epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for option in command.options:
        names = [option.short, option.name] if option.short else [option.name]
        if option.metavar:
            parser.add_argument(
                *names, metavar=option.metavar, required=option.required, default=option.absent,
                action="append" if option.many else "store", help=option.help,
            )
        else:
            parser.add_argument(*names, action="count", default=0, help=option.help)
    return parser.parse_args(argv, namespace=SimpleNamespace())
