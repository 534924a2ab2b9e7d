"""A command as a table of its options and words.

All else about a command is made from its table: the reader of command lines (``options``),
``--help`` (``usage``) and the error for a mistake (``mistakes``).
"""

from __future__ import annotations

from pyvmm.startup.types import TYPE_CHECKING, Record

if TYPE_CHECKING:
    from typing import Any

HELP = ("--help", "-h")


class Option(Record):
    """``name`` with a value shown as ``metavar``; without ``metavar`` a flag, which is counted.

    ``many`` collects the values in a list.  Without ``many`` a value may be given once, and
    ``twice`` advises whoever gives two.  ``short`` is a flag's other name, as ``-v``.
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
        """The option's attribute in the result of ``parse_options``."""
        return self.name.removeprefix("--").replace("-", "_")

    @property
    def absent(self) -> Any:
        """The option's value if it is not given."""
        if not self.metavar:
            return 0
        return [] if self.many else self.default


class Word(Record):
    """An argument that is no option and must be there.

    ``name`` is its attribute in the result.  With ``takes_rest`` its value is the list of all words
    from the first that is no option; the list may be empty.
    """

    name: str
    metavar: str
    help: str
    takes_rest: bool = False


class Command(Record):
    """A subcommand of ``pyvmm``: its options and words, and the text of ``--help`` around them.

    A command with ``verbs`` has neither: its first word is a verb, as in ``kernel inspect``.
    ``meant`` names, in order, the options for which a word without an option is likely meant.
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
        """The last word of the command's name."""
        return self.name.rpartition(" ")[2]

    @property
    def takes_rest(self) -> bool:
        """True if the first word begins another command, which takes all the rest."""
        return bool(self.words) and self.words[-1].takes_rest


class Mistake(Exception):  # noqa: N818 - not raised beyond parse_options
    """The first mistake in a command line: at the word of index ``at``, about ``option``."""

    def __init__(self, kind: str, at: int = 0, option: Option | None = None) -> None:
        super().__init__(kind)
        self.kind = kind
        self.at = at
        self.option = option


def looks_like_option(word: str, names: dict[str, Option]) -> bool:
    """Return False if ``word`` may be a value or a word, as argparse would.

    Such a word begins with no dash, is a dash, is a number or has a space.
    """
    if not word.startswith("-") or word == "-":
        return False
    digits = word[1:].replace(".", "", 1)
    is_number = digits.isascii() and digits.isdigit() and not word.endswith(".")
    return not is_number and (" " not in word or word.partition("=")[0] in names)
