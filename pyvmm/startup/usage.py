"""``--help`` of a command, by argparse built from its table; imported only for ``--help``."""

from __future__ import annotations

import argparse

from pyvmm.startup.commands import Command


def show_help(command: Command) -> None:
    """Print the help of ``command`` and exit."""
    argument_parser(command).parse_args(["--help"])


def argument_parser(command: Command) -> argparse.ArgumentParser:
    """Return the argparse parser of ``command``; it shows verbs but knows no options of theirs."""
    parser = argparse.ArgumentParser(
        prog=f"pyvmm {command.name}",
        usage=command.usage or None,
        description=command.description,
        epilog=command.epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if command.verbs:
        verbs = parser.add_subparsers(metavar=" | ".join(verb.verb for verb in command.verbs))
        for verb in command.verbs:
            verbs.add_parser(verb.verb, help=verb.description)
    for word in command.words:
        parser.add_argument(
            word.name, metavar=word.metavar, help=word.help,
            nargs=argparse.REMAINDER if word.takes_rest else None,
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
    return parser
