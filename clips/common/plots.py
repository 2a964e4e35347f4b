"""Curves and colours shared by all charts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # each chart imports matplotlib, so a training, which draws none, has 25 MB less
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Plot

MAX_POINTS = 1500
"""Maximum number of points drawn of a curve."""
SERIES = ("#2f6fde", "#e0702f", "#1f9d7a", "#b04bc4", "#7d8590", "#c4423f")
INK = "#3a4150"
GRID = "#e3e6ec"


@dataclass(frozen=True)
class Panel:
    """A chart of the metrics `names` over samples, from `lines` of metrics.jsonl."""

    title: str
    lines: list[dict[str, Any]]
    names: Sequence[str]


def plain_axes(plot: Plot, *place: int, grid: Literal["both", "x", "y"] = "both") -> Axes:
    """Add axes to `plot`, at `place` as `Figure.add_subplot` takes it, in the style of all charts."""
    axes = plot.add_subplot(*place)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.spines[:].set_visible(False)
    return axes


def _draw(axes: Axes, panel: Panel) -> None:
    """Draw one panel against samples seen."""
    from matplotlib.ticker import EngFormatter

    axes.set_title(panel.title, loc="left", fontsize=10.5, color=INK, fontweight="bold")
    axes.set_xlabel("samples seen", fontsize=8.5, color=INK, labelpad=2)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    drawn = 0
    for name, colour in zip(panel.names, SERIES, strict=False):
        points = [(line["samples"], line[name]) for line in panel.lines if isinstance(line.get(name), (int, float))]
        if len(points) > MAX_POINTS:  # evenly, with the first and the last one
            points = [points[i * (len(points) - 1) // (MAX_POINTS - 1)] for i in range(MAX_POINTS)]
        if points:
            marker = "o" if len(points) < 12 else None
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.7, marker=marker, markersize=4)
            axes.lines[-1].set_label(pretty(name))
            drawn += 1
    if drawn > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    if not drawn:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=INK, alpha=0.6)
    if panel.title.endswith("%"):
        axes.set_ylim(0, 100)


def curves_plot(panels: Sequence[Panel]) -> Plot:
    """Return a figure with the panels in rows of up to three."""
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    plot = Figure(figsize=(3.7 * columns, 2.7 * rows), dpi=130, layout="constrained")
    for place, panel in enumerate(panels, start=1):
        _draw(plain_axes(plot, rows, columns, place), panel)
    return plot


_NAMES = {
    "i2t": "image → text",
    "t2i": "text → image",
    "r1": "R@1",
    "r5": "R@5",
    "r10": "R@10",
    "top1": "top 1",
    "top5": "top 5",
    "zero": "zero-shot",
    "tau": "τ",
    "lr": "learning rate",
    "neg_log_rank": "−100 × mean log rank",
}


def pretty(name: str) -> str:
    """Return a metric's name in words: `sentence_i2t_r1` becomes "sentence image → text R@1"."""
    words = name.replace("zero_shot", "zero").replace("single_prompt", "single prompt").split("_")
    return " ".join(_NAMES.get(word, word) for word in words)
