"""The table of options and its two readers: what the quick one accepts, argparse reads the same."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pyvmm.cli import run
from pyvmm.errors import ConfigError
from pyvmm.startup.options import parse, parse_by_argparse, parse_options

OPTIONS = run.COMMAND.options
_NAMES = [option.name for option in OPTIONS]
_VALUES = st.one_of(
    st.sampled_from(["", "-", "--", "-v", "256M", "a b", "k=v", "=", "-1", "--kernel", "ä"]),
    st.text(max_size=5),
)
_WORDS = st.one_of(
    st.sampled_from([*_NAMES, "-v", "-vv", "--verb", "--help", "-h", "extra"]),
    st.builds("{}={}".format, st.sampled_from([*_NAMES, "-v", "--unknown"]), _VALUES),
    _VALUES,
)
_LINES = st.one_of(
    st.lists(_WORDS, max_size=8),
    st.lists(st.tuples(st.sampled_from(_NAMES), _VALUES), max_size=6).map(
        lambda pairs: ["--kernel", "k", *(word for pair in pairs for word in pair)]
    ),
)


@given(argv=_LINES)
@example(argv=["--kernel", "k", "--disk", "a", "--disk=b", "-v", "--verbose", "--append="])
def test_what_the_quick_parser_accepts_argparse_reads_the_same(argv: list[str]) -> None:
    quick = parse(OPTIONS, argv)
    if quick is not None:
        assert vars(parse_by_argparse(run.COMMAND, argv)) == vars(quick)


@pytest.mark.parametrize("argv", [
    ["--kernel", "k"], ["--kernel=k", "--disk", "a,ro", "--disk", "b"], ["-v", "--kernel", "k"],
    ["--kernel", "k", "--append", "pyvmm.run='uname -a'", "--timeout", "60", "--verbose"],
])
def test_a_well_formed_command_line_needs_no_argparse(argv: list[str]) -> None:
    assert parse(OPTIONS, argv) is not None


def test_values_are_not_shared_between_command_lines() -> None:
    for _ in range(2):
        assert parse_options(run.COMMAND, ["--kernel", "k", "--disk", "d"]).disk == ["d"]


@pytest.mark.parametrize(("argv", "words"), [
    ([], "--kernel"), (["--kernel"], "expected one argument"), (["--kernel", "k", "x"], "x"),
    (["--kernel", "k", "--mem", "1G"], "--mem"), (["--kernel", "k", "-v=1"], "-v"),
])
def test_a_mistake_is_one_line_with_the_way_to_help(argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=r"\(pyvmm run --help\)") as caught:
        parse_options(run.COMMAND, argv)
    assert words in str(caught.value)


def test_dashes_in_front_of_a_value_are_for_argparse_to_judge() -> None:
    assert parse_options(run.COMMAND, ["--kernel", "k", "-vv"]).verbose == 2
    assert parse_options(run.COMMAND, ["--kernel", "-"]).kernel == "-"
    assert parse_options(run.COMMAND, ["--kernel=-k"]).kernel == "-k"


def test_help_has_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_options(run.COMMAND, ["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in [*_NAMES, "-v", "exit status:"])
