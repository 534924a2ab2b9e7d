"""The one reader of command lines: what it accepts, argparse reads the same from the same table."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from pyvmm.cli import ctl, doctor, export, image, kernel, lab, matrix, ps, restore, run, test
from pyvmm.errors import ConfigError
from pyvmm.startup.commands import Command
from pyvmm.startup.options import parse_options
from pyvmm.startup.usage import argument_parser

COMMANDS = [
    run.COMMAND, restore.COMMAND, test.COMMAND, doctor.COMMAND, export.COMMAND, lab.COMMAND,
    matrix.COMMAND, ps.COMMAND, *kernel.COMMAND.verbs, *image.COMMAND.verbs, *ctl.COMMAND.verbs,
]
BY_NAME = {command.name: command for command in COMMANDS}
_VALUES = st.one_of(
    st.sampled_from(["", "-", "-v", "256M", "a b", "k=v", "=", "-1", "-1.5", "--kernel", "\u00e4",
                     "- b", "-x y", "--append=x y"]),
    st.text(max_size=5),
)


def words_of(command: Command) -> st.SearchStrategy[str]:
    names = [option.name for option in command.options]
    return st.one_of(
        st.sampled_from([*names, "-v", "-vv", "--verb", "extra", "debian", "--"]),
        st.builds("{}={}".format, st.sampled_from([*names, "-v", "--unknown"]), _VALUES),
        _VALUES,
    )


def lines_of(command: Command) -> st.SearchStrategy[tuple[Command, list[str]]]:
    valued = [option.name for option in command.options if option.metavar] or ["--none"]
    needed = [word for option in command.options if option.required for word in (option.name, "k")]
    line = st.one_of(
        st.lists(words_of(command), max_size=8),
        st.lists(st.tuples(st.sampled_from(valued or ["-v"]), _VALUES), max_size=4).map(
            lambda pairs: [*needed, *(word for pair in pairs for word in pair)]
        ),
        st.lists(words_of(command), max_size=4).map(lambda words: [*needed, *words]),
    )
    return st.tuples(st.just(command), line)


def by_argparse(command: Command, argv: list[str]) -> dict[str, object]:
    """Return the values that argparse reads from ``argv``."""
    return vars(argument_parser(command).parse_args(argv, namespace=SimpleNamespace()))


@given(pair=st.sampled_from(COMMANDS).flatmap(lines_of))
@example((run.COMMAND, ["--kernel", "k", "--disk", "a", "--disk=b", "-v", "--verbose"]))
@example((lab.COMMAND, ["--rw", "d", "-vv", "git", "log", "--", "-v"]))
@example((BY_NAME["kernel inspect"], ["--config", "c", "--", "-file"]))
@example((doctor.COMMAND, ["-qq", "--device=x"]))
def test_whatever_is_accepted_argparse_reads_the_same(pair: tuple[Command, list[str]]) -> None:
    command, argv = pair
    try:
        ours = vars(parse_options(command, argv))
    except (ConfigError, SystemExit):
        return
    # argparse leaves the dashes in front of CMD, drops every second pair of them, and refuses them
    # where there are no words.
    has_words = bool(command.words) and not command.takes_rest
    assume(argv.count("--") <= has_words)
    assert by_argparse(command, argv) == ours


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_has_every_option_and_word(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_options(command, ["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(option.name in text for option in command.options)
    assert all(word.metavar in text for word in command.words)


def test_values_are_not_shared_between_command_lines() -> None:
    for _ in range(2):
        assert parse_options(run.COMMAND, ["--kernel", "k", "--disk", "d"]).disk == ["d"]


def test_dashes_in_front_of_a_value() -> None:
    assert parse_options(run.COMMAND, ["--kernel", "k", "-vv"]).verbose == 2
    assert parse_options(run.COMMAND, ["--kernel", "-"]).kernel == "-"
    assert parse_options(run.COMMAND, ["--kernel=-k"]).kernel == "-k"
    assert parse_options(run.COMMAND, ["--kernel", "k", "--timeout", "-1"]).timeout == "-1"


@pytest.mark.parametrize("argv", [
    ["--", "git", "log", "--", "-v"], ["git", "log", "--", "-v"],
])
def test_the_rest_is_taken_as_it_is(argv: list[str]) -> None:
    assert parse_options(lab.COMMAND, argv).command == ["git", "log", "--", "-v"]


def test_help_is_given_behind_a_mistake() -> None:
    with pytest.raises(SystemExit):
        parse_options(run.COMMAND, ["--kernal", "k", "--help"])


@pytest.mark.parametrize(("command", "argv"), [
    (lab.COMMAND, ["--cpu", "2", "--", "prog", "--help"]),
    (lab.COMMAND, ["--cpu", "2", "prog", "-h"]),
    (run.COMMAND, ["--kernal", "k", "--", "--help"]),
])
def test_what_another_command_is_asked_is_no_answer_to_a_mistake(
    command: Command, argv: list[str]
) -> None:
    with pytest.raises(ConfigError, match="is no option of"):
        parse_options(command, argv)
