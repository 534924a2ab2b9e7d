"""The one reader of command lines: a command's table and its given words -> values.

A command line without a mistake needs nothing but this file.  ``--help`` imports ``usage``, which
is argparse built from the same table.  A mistake imports ``mistakes``, which explains it.  argparse
reads every command line as this file does (tests/startup/test_options.py).
"""

from __future__ import annotations

from types import SimpleNamespace

from pyvmm.startup.commands import HELP, Mistake, looks_like_option
from pyvmm.startup.types import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from pyvmm.startup.commands import Command


def parse_options(command: Command, argv: Sequence[str]) -> SimpleNamespace:
    """Return the options and words in ``argv`` as attributes; ``verb`` is the verb, if any.

    ConfigError for a mistake; ``--help`` prints the help and exits.
    """
    for verb in command.verbs:
        if argv and argv[0] == verb.verb:
            values = parse_options(verb, argv[1:])
            values.verb = verb.verb
            return values
    try:
        if command.verbs:
            raise Mistake("no verb")
        return _read(command, argv)
    except Mistake as mistake:
        if _asks_for_help(command, argv[mistake.at :]):
            from pyvmm.startup.usage import show_help

            show_help(command)
        from pyvmm.startup.mistakes import explain

        raise explain(command, argv, mistake) from None


def _asks_for_help(command: Command, words: Sequence[str]) -> bool:
    """True if ``words``, from the first mistake on, ask for help with ``command`` itself."""
    for word in words:
        if word in HELP:
            return True
        if word == "--" or command.takes_rest:
            break  # further words may be another command's
    return False


def _read(command: Command, argv: Sequence[str]) -> SimpleNamespace:
    """Read ``argv`` for a ``command`` without verbs; Mistake if it is wrong or asks for help."""
    by_name = {option.name: option for option in command.options}
    by_name |= {option.short: option for option in command.options if option.short}
    values: dict[str, Any] = {option.attribute: option.absent for option in command.options}
    given = set()
    words: list[str] = []
    at, end = 0, len(argv)
    while at < end:
        word = argv[at]
        name, has_value, value = word.partition("=")
        option = by_name.get(name)
        if option is None and not looks_like_option(word, by_name):
            if command.takes_rest:
                words += argv[at:]
                break
            words.append(word)
        elif word == "--":
            words += argv[at + 1 :]
            break
        elif word in HELP:
            raise Mistake("help", at)
        elif option is None:
            flags = [by_name.get(f"-{letter}") for letter in word[1:]]
            for flag in flags:
                if flag is None:
                    raise Mistake("unknown", at)
                values[flag.attribute] += 1
        elif not option.metavar:
            if has_value:
                raise Mistake("flag with a value", at, option)
            values[option.attribute] += 1
        else:
            if not has_value:
                at += 1
                if at == end or looks_like_option(argv[at], by_name):
                    raise Mistake("no value", at - 1, option)
                value = argv[at]
            if option.many:
                values[option.attribute].append(value)
            elif option.name in given:
                raise Mistake("twice", at, option)
            else:
                values[option.attribute] = value
            given.add(option.name)
        at += 1
    is_too_long = len(words) > len(command.words) and not command.takes_rest
    for option in command.options:
        if option.required and option.name not in given and not is_too_long:
            raise Mistake("missing", end, option)
    return SimpleNamespace(**values, **_named(command, words, argv))


def _named(command: Command, words: list[str], argv: Sequence[str]) -> dict[str, Any]:
    """Return ``words``, a part of ``argv``, by the names in the table of ``command``."""
    found: dict[str, Any] = {}
    for place, expected in enumerate(command.words):
        if expected.takes_rest:
            return {**found, expected.name: words[place:]}
        if place == len(words):
            raise Mistake("no word", len(argv))
        found[expected.name] = words[place]
    if len(words) > len(command.words):
        raise Mistake("too many words", argv.index(words[len(command.words)]))
    return found
