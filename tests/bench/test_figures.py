"""Medians, ratios and verdicts; the table and the file."""

from __future__ import annotations

import json

import pytest

from bench import figures
from bench.figures import Figure, Limit, Sample, judge

MORE = Figure(key="a.more", name="more of it", unit="1/s", ratio=Limit(">= 1.5"))
LESS = Figure(key="a.less", name="less of it", unit="MiB", ratio=Limit("<= 0.5"),
              ours=Limit("<= 25"))
UNJUDGED = Figure(key="b", name="for information", unit="s")


def samples(figure: Figure, contender: str, *values: float) -> list[Sample]:
    return [Sample(figure=figure.key, contender=contender, value=value) for value in values]


def test_a_result_is_the_ratio_of_the_medians() -> None:
    result = judge(MORE, "we", "they", samples(MORE, "we", 9, 3, 6) + samples(MORE, "they", 1, 5))
    assert (result.ours, result.theirs, result.ratio) == (6, 3, 2)
    assert (result.target, result.met, result.runs) == ("ratio >= 1.5", True, 2)
    assert result.samples == {"ours": [9, 3, 6], "theirs": [1, 5]}
    assert result.error == ""


def test_warm_up_runs_and_other_figures_do_not_count() -> None:
    taken = samples(MORE, "we", 4) + samples(MORE, "they", 2) + samples(LESS, "we", 100)
    taken.append(Sample(figure=MORE.key, contender="we", value=1000, warm_up=True))
    assert judge(MORE, "we", "they", taken).ours == 4


@pytest.mark.parametrize(
    ("figure", "ours", "theirs", "met"),
    [
        (MORE, 3, 2, True), (MORE, 2.9, 2, False), (LESS, 20, 40, True), (LESS, 20, 39, False),
        (LESS, 26, 100, False), (UNJUDGED, 1, 1, None),
    ],
)
def test_a_target_is_met_when_all_its_limits_hold(
    figure: Figure, ours: float, theirs: float, met: bool | None
) -> None:
    taken = samples(figure, "we", ours) + samples(figure, "they", theirs)
    assert judge(figure, "we", "they", taken).met is met


def test_what_failed_is_null_with_its_reason() -> None:
    taken = [Sample(figure=LESS.key, contender="we", error="no such option")]
    result = judge(LESS, "we", "they", taken + samples(LESS, "they", 50))
    assert (result.ours, result.theirs, result.ratio, result.met) == (None, 50, None, None)
    assert result.error == "we: no such option"


def test_a_target_of_ours_alone_needs_no_peer() -> None:
    alone = Figure(key="c", name="c", unit="exits", ours=Limit("<= 1"))
    result = judge(alone, "we", "they", samples(alone, "we", 0.5))
    assert (result.met, result.error) == (True, "they: not measured")


def test_a_peer_of_zero_gives_no_ratio() -> None:
    taken = samples(MORE, "we", 1) + samples(MORE, "they", 0)
    assert judge(MORE, "we", "they", taken).ratio is None


@pytest.mark.parametrize("text", ["", "1.2", "> 1", ">= x", ">=1", ">= 1 "])
def test_a_limit_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no limit"):
        Limit(text)


def test_the_json_has_the_agreed_names_in_order() -> None:
    rows = json.loads(figures.to_json([judge(MORE, "we", "they", samples(MORE, "we", 1))]))
    assert list(rows[0])[:8] == [
        "figure", "peer", "ours", "theirs", "ratio", "target", "met", "runs"
    ]
    assert rows[0] | {"ours": 1, "theirs": None, "ratio": None, "met": None} == rows[0]


def test_the_table_says_everything_once() -> None:
    taken = samples(MORE, "we", 123456) + samples(MORE, "they", 61728)
    taken += [Sample(figure=key, contender="we", error="it broke") for key in ("a.less", "b")]
    table = figures.to_table([judge(one, "we", "they", taken) for one in (MORE, LESS, UNJUDGED)])
    lines = table.splitlines()
    assert lines[0].split() == list(figures.HEADINGS)
    assert lines[2].split() == [
        "more", "of", "it", "1/s", "they", "123,456", "61,728", "2.00", "ratio", ">=", "1.5",
        "yes", "1",
    ]
    assert table.count("it broke") == 1
    assert "error, a.less, b: we: it broke; they: not measured" in lines


def test_samples_travel_as_lines() -> None:
    sample = Sample(figure="f", contender="c ü", value=1.5, note="n\n", warm_up=True)
    assert "\n" not in sample.to_json()
    assert Sample.from_json(sample.to_json()) == sample


@pytest.mark.parametrize("line", ["", "hello", "[1]", '{"figure": "f"}', '{"x": 1}', "3"])
def test_other_lines_are_no_samples(line: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Sample.from_json(line)
