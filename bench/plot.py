"""The ratios as a picture; needs matplotlib, which only the dev extra installs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.figures import Result

MET, NOT_MET, NO_TARGET = "#2a7f3f", "#b3392e", "#6b7280"


def draw(results: Sequence[Result], path: Path) -> str:
    """Write ``path``; empty, or why there is no picture."""
    drawn = [one for one in results if one.ratio]
    if not drawn:
        return "no figure has a ratio"
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed (pip install -e '.[dev]')"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 0.5 * len(drawn) + 1.6), layout="constrained")
    places = range(len(drawn))
    ratios = [one.ratio or 1.0 for one in drawn]
    colours = [{True: MET, False: NOT_MET, None: NO_TARGET}[one.met] for one in drawn]
    axes.barh(places, [ratio - 1 for ratio in ratios], left=1, color=colours, height=0.6)
    for place, one in zip(places, drawn, strict=True):
        if one.ratio_target is not None:
            axes.plot([one.ratio_target] * 2, [place - 0.42, place + 0.42], color="black", lw=1.5)
        axes.annotate(
            f"{one.ratio:.2f}", (1, place), xytext=(1.01, place),
            xycoords=("axes fraction", "data"), textcoords=("axes fraction", "data"), va="center",
        )
    axes.set_xscale("log")
    axes.axvline(1, color="black", lw=0.8)
    axes.set_yticks(list(places), [_label(one) for one in drawn], fontsize=8)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.invert_yaxis()
    axes.set_xlabel("pyvmm / peer; the upright mark is the target, green where it is met")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return ""


def _label(result: Result) -> str:
    less = "; less is better" if "<=" in result.target else ""
    return f"{result.figure}\nbeside {result.peer}{less}"
