"""What a measurement says: figures with their targets, samples, and what comes of many."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

_LIMIT = re.compile(r"(>=|<=) (\d+(?:\.\d+)?)")


class BenchError(Exception):
    """A figure that cannot be measured; the text says why."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A bound, written ``>= 1.2`` or ``<= 25``."""

    text: str

    def __post_init__(self) -> None:
        if _LIMIT.fullmatch(self.text) is None:
            raise ValueError(f"{self.text!r} is no limit; write '>= 1.2' or '<= 25'")

    @property
    def bound(self) -> float:
        """The number."""
        return float(self.text.split()[1])

    def holds(self, value: float) -> bool:
        """Whether ``value`` is on the right side."""
        return value >= self.bound if self.text.startswith(">=") else value <= self.bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line of the table.

    ``key`` is how the command line calls it, ``name`` how people do, ``unit`` what the values are
    in.  Its target, if any, is a limit for ours / theirs, one for ours alone, or both.
    """

    key: str
    name: str
    unit: str
    ratio: Limit | None = None
    ours: Limit | None = None

    @property
    def target(self) -> str:
        """The target in words; empty if there is none."""
        words = [f"ratio {self.ratio.text}"] if self.ratio else []
        words += [f"ours {self.ours.text}"] if self.ours else []
        return " and ".join(words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One run of one contender: what came out for one figure, or why nothing did.

    ``warm_up`` runs fill caches and do not count.  ``note`` is worth knowing, whatever came out.
    """

    figure: str
    contender: str
    value: float | None = None
    error: str = ""
    note: str = ""
    warm_up: bool = False

    def to_json(self) -> str:
        """One line; ``from_json`` reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Sample:
        """What ``to_json`` wrote; ValueError if it did not."""
        fields = json.loads(line)
        if not isinstance(fields, dict):
            raise ValueError("not a sample")
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"not a sample: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A figure beside one peer, in the order of ``results.json``.

    ``ours`` and ``theirs`` are medians of the ``samples``, ``ratio`` is ours / theirs; None where
    something could not be measured, and ``error`` then says why.  ``met`` is None without a
    target, or without what it is about.  ``runs`` counts the samples of the side that has fewer.
    """

    figure: str
    peer: str
    ours: float | None
    theirs: float | None
    ratio: float | None
    target: str
    met: bool | None
    runs: int
    key: str
    unit: str
    ratio_target: float | None = None
    samples: dict[str, list[float]] = field(default_factory=dict)
    error: str = ""
    note: str = ""


def judge(figure: Figure, ours: str, peer: str, samples: Iterable[Sample]) -> Result:
    """What ``samples`` say of ``figure``, for the contenders named ``ours`` and ``peer``."""
    of_figure = [sample for sample in samples if sample.figure == figure.key]
    values = {
        name: [
            sample.value for sample in of_figure
            if sample.contender == name and sample.value is not None and not sample.warm_up
        ]
        for name in (ours, peer)
    }
    mine = statistics.median(values[ours]) if values[ours] else None
    theirs = statistics.median(values[peer]) if values[peer] else None
    ratio = mine / theirs if mine is not None and theirs else None
    said = [sample for sample in of_figure if sample.contender in (ours, peer)]
    errors = _distinct(f"{one.contender}: {one.error}" for one in said if one.error)
    for name, found in values.items():
        if not found and not any(one.contender == name and one.error for one in said):
            errors.append(f"{name}: not measured")
    return Result(
        figure=figure.name, peer=peer, ours=mine, theirs=theirs, ratio=ratio,
        target=figure.target, met=_met(figure, mine, ratio),
        runs=min(len(values[ours]), len(values[peer])), key=figure.key, unit=figure.unit,
        ratio_target=figure.ratio.bound if figure.ratio else None,
        samples={"ours": values[ours], "theirs": values[peer]}, error="; ".join(errors),
        note="; ".join(_distinct(f"{one.contender}: {one.note}" for one in said if one.note)),
    )


def _met(figure: Figure, ours: float | None, ratio: float | None) -> bool | None:
    """Whether every limit of the target holds; None if there is none, or one cannot be judged."""
    pairs = [
        (limit, value) for limit, value in ((figure.ratio, ratio), (figure.ours, ours))
        if limit is not None
    ]
    if not pairs:
        return None
    verdicts = []
    for limit, value in pairs:
        if value is None:
            return None
        verdicts.append(limit.holds(value))
    return all(verdicts)


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def to_json(results: Sequence[Result]) -> str:
    """``results.json``: a list of objects."""
    rows: list[dict[str, Any]] = [asdict(result) for result in results]
    return json.dumps(rows, indent=2) + "\n"


HEADINGS = ("figure", "unit", "peer", "ours", "theirs", "ratio", "target", "met", "runs")


def to_table(results: Sequence[Result]) -> str:
    """The results for people, aligned, with what went wrong or is worth knowing below."""
    rows = [HEADINGS]
    for one in results:
        met = {True: "yes", False: "NO", None: "-"}[one.met]
        rows.append((
            one.figure, one.unit, one.peer, number(one.ours), number(one.theirs),
            "-" if one.ratio is None else f"{one.ratio:.2f}", one.target or "-", met, str(one.runs),
        ))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    numbers = {HEADINGS.index(name) for name in ("ours", "theirs", "ratio", "runs")}
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    # One failure often costs several figures: it is said once.
    for kind in ("error", "note"):
        said: dict[str, list[str]] = {}
        for one in results:
            if text := getattr(one, kind):
                said.setdefault(text, []).append(one.key)
        lines += [f"{kind}, {', '.join(_distinct(keys))}: {text}" for text, keys in said.items()]
    return "\n".join(lines) + "\n"


def number(value: float | None) -> str:
    """Four digits that matter, thousands apart."""
    if value is None:
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
