"""A command as a table of its options and words, from which all else about it is made:
the reader of command lines (``options``), ``--help`` (``usage``), what mistakes are told
(``mistakes``)."""

from __future__ import annotations

from pyvmm.startup.types import TYPE_CHECKING, Record

if TYPE_CHECKING:
    from typing import Any

HELP = ("--help", "-h")


class Option(Record):
    """``name`` with a value shown as ``metavar``; without ``metavar`` a flag, which is counted.

    ``many`` collects the values in a list; any other value may be given once, and ``twice`` says
    what to do instead.  ``short`` is a flag's other name, as ``-v``.
    """

    name: str
    help: str
    metavar: str = ""
    default: str | None = None
    short: str = ""
    required: bool = False
    many: bool = False
    twice: str = ""

    @property
    def attribute(self) -> str:
        """What the result calls it."""
        return self.name.removeprefix("--").replace("-", "_")

    @property
    def absent(self) -> Any:
        """Its value if it is not given."""
        if not self.metavar:
            return 0
        return [] if self.many else self.default


class Word(Record):
    """An argument that is no option and must be there.

    The result calls it ``name``.  ``choices`` are the only ones there are, if any.  ``takes_rest``
    makes it the list of all words from the first one that is no option, which may be none.
    """

    name: str
    metavar: str
    help: str
    choices: tuple[str, ...] = ()
    takes_rest: bool = False


class Command(Record):
    """A subcommand of ``pyvmm``: its options and words, and what ``--help`` says around them.

    With ``verbs`` it has neither: its first word is one of theirs, as ``kernel inspect``.
    ``meant`` names the options that words without one are likely meant for, in order.
    """

    name: str
    description: str
    epilog: str = ""
    usage: str = ""
    options: tuple[Option, ...] = ()
    words: tuple[Word, ...] = ()
    verbs: tuple[Command, ...] = ()
    meant: tuple[str, ...] = ()

    @property
    def verb(self) -> str:
        """The last word of its name."""
        return self.name.rpartition(" ")[2]

    @property
    def takes_rest(self) -> bool:
        """True if all from its first word on is another command's."""
        return bool(self.words) and self.words[-1].takes_rest


class Mistake(Exception):  # noqa: N818 - not raised beyond parse_options
    """The first mistake in a command line: ``at`` is the index of the word, ``option`` whose."""

    def __init__(self, kind: str, at: int = 0, option: Option | None = None) -> None:
        super().__init__(kind)
        self.kind = kind
        self.at = at
        self.option = option


def looks_like_option(word: str, names: dict[str, Option]) -> bool:
    """True unless ``word`` may be a value or a word: those begin with no dash, are one, are a
    number or have a space, as argparse has it too."""
    if not word.startswith("-") or word == "-":
        return False
    digits = word[1:].replace(".", "", 1)
    is_number = digits.isascii() and digits.isdigit() and not word.endswith(".")
    return not is_number and (" " not in word or word.partition("=")[0] in names)
