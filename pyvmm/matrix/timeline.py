"""The timeline picture of a run: one bar, a part of which is a phase; inline SVG."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence

from pyvmm.matrix.results import RunResult
from pyvmm.testing.timeline import PHASES, Phase

WIDTH, HEIGHT = 1000, 16
"""The picture's own units; the page stretches it to the room that there is."""
_NICE = (1, 2, 5)


def scale_of(results: Sequence[RunResult]) -> float:
    """Return the seconds that the full width of every picture means."""
    return max((end_s(result) for result in results), default=0.0) or 1.0


def end_s(result: RunResult) -> float:
    """Return the seconds at which a run ended."""
    return max([result.seconds, *(phase.end_s for phase in result.phases)])


def picture(result: RunResult, scale_s: float) -> str:
    """Return the SVG of the phases of ``result``; ``scale_s`` is the full width."""
    return (
        f'<svg class="line" viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{html.escape(words(result))}">'
        f'<rect class="ground" width="{WIDTH}" height="{HEIGHT}"/>'
        f'{"".join(_bars(result, scale_s))}</svg>'
    )


def words(result: RunResult) -> str:
    """Return the phases with their seconds, as text."""
    return ", ".join(
        f"{phase.name} {phase.end_s - phase.begin_s:.2f} s" for phase in result.phases
    ) or f"{result.seconds:.2f} s"


def legend() -> str:
    """Return the HTML of the colours' names."""
    return "".join(
        f'<span class="key"><i class="{_class(name)}"></i>{name}</span>' for name in PHASES
    )


def ruler(scale_s: float) -> str:
    """Return the HTML of the scale: the seconds at round places."""
    step_s = _step(scale_s)
    count = int(scale_s / step_s + 1e-9)
    marks = "".join(
        f'<span style="left:{at * step_s / scale_s:.2%}">{at * step_s:g}</span>'
        for at in range(count + 1) if at * step_s <= 0.93 * scale_s
    )
    return f'<div class="ruler">{marks}<span class="unit">s</span></div>'


def _step(scale_s: float) -> float:
    """Return the seconds between two marks: about five of them."""
    power = 1e-3
    while True:
        for nice in _NICE:
            if scale_s / (nice * power) <= 5:
                return nice * power
        power *= 10


def _bars(result: RunResult, scale_s: float) -> Iterator[str]:
    phases = result.phases or (
        (Phase(name="command", begin_s=0.0, end_s=result.seconds),) if result.seconds else ()
    )
    for phase in phases:
        left = max(0.0, phase.begin_s) / scale_s * WIDTH
        width = max(0.0, phase.end_s - phase.begin_s) / scale_s * WIDTH
        title = html.escape(f"{phase.name} {phase.end_s - phase.begin_s:.2f} s")
        yield (
            f'<rect class="{_class(phase.name)}" x="{left:.1f}" width="{max(width, 1.5):.1f}" '
            f'height="{HEIGHT}"><title>{title}</title></rect>'
        )
    if not result.is_ok and phases:
        end = min(end_s(result) / scale_s * WIDTH, WIDTH - 4)
        yield f'<rect class="bad" x="{end:.1f}" width="4" height="{HEIGHT}"/>'


def _class(name: str) -> str:
    return f"p{PHASES.index(name)}" if name in PHASES else "p9"
