"""The plots of a run's report, with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Plot
from matplotlib.ticker import FuncFormatter

from clips.data.images import decode_image
from clips.examples import Captioned, Classified, Retrieved

MAX_POINTS = 1500
"""Points drawn of one curve."""

SERIES = ("#2f6fde", "#e0702f", "#1f9d7a", "#b04bc4")
"""Colours that stand on white and on near-black alike."""


@dataclass(frozen=True)
class Theme:
    ink: str
    grid: str
    paper: str


LIGHT = Theme(ink="#3a4150", grid="#e3e6ec", paper="#ffffff")
DARK = Theme(ink="#c3c9d6", grid="#31363f", paper="#1a1d23")


@dataclass(frozen=True)
class Panel:
    title: str
    lines: list[dict[str, Any]]
    names: list[str]


def _draw(axes: Axes, panel: Panel, theme: Theme) -> None:
    """One panel against samples seen."""
    axes.set_facecolor(theme.paper)
    axes.set_title(panel.title, loc="left", fontsize=10.5, color=theme.ink, fontweight="bold")
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.ink, labelsize=8.5, length=0)
    axes.spines[:].set_visible(False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    drawn = 0
    for name, colour in zip(panel.names, SERIES, strict=False):
        points = [(line["samples"], line[name]) for line in panel.lines if isinstance(line.get(name), (int, float))]
        points = points[:: max(1, len(points) // MAX_POINTS)]
        if points:
            marker = "o" if len(points) < 12 else None
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.7, marker=marker, markersize=4)
            axes.lines[-1].set_label(pretty(name))
            drawn += 1
    if drawn > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor=theme.ink)
    if not drawn:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=theme.ink, alpha=0.6)
    if panel.title.endswith("%"):
        axes.set_ylim(0, 100)


def curves_plot(shown: Sequence[Panel], theme: Theme) -> Plot:
    """Up to three panels in a row."""
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    plot = Plot(figsize=(3.7 * columns, 2.7 * rows), dpi=130, facecolor=theme.paper, layout="constrained")
    for axes, panel in zip(plot.subplots(rows, columns, squeeze=False).flat, shown, strict=False):
        _draw(axes, panel, theme)
    return plot


def _picture_rows(titles: Sequence[str], rows: Sequence[Sequence[tuple[bytes, str, str]]]) -> Plot:
    """Rows of pictures (encoded image, caption, frame colour or ""), each under its title; for the PNG files."""
    columns = max(map(len, rows))
    plot = Plot(figsize=(1.5 * columns, 2.0 * len(rows)), dpi=110, facecolor="white", layout="constrained")
    plot.get_layout_engine().set(h_pad=0.14)
    grid = plot.subplots(len(rows), columns, squeeze=False)
    for line, title, cells in zip(grid, titles, rows, strict=True):
        for axes in line:
            axes.axis("off")
        # A text outside the layout: a title would widen the first column.
        line[0].text(0, 1.06, _clip(title, 18 * columns), transform=line[0].transAxes, fontsize=8, in_layout=False)
        for axes, (image, caption, colour) in zip(line, cells, strict=False):
            axes.imshow(np.asarray(decode_image(image)))
            axes.text(0.5, -0.03, caption, transform=axes.transAxes, ha="center", va="top", fontsize=7)
            if colour:
                axes.axis("on")
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set(color=colour, linewidth=2.5)
    return plot


def retrieval_plot(examples: list[Retrieved]) -> Plot:
    rows = [
        [(e.truth, "true image", "")]
        + [(image, str(i), "#1f9d7a" if i == e.rank else "") for i, image in enumerate(e.found, 1)]
        for e in examples
    ]
    return _picture_rows([f"{verdict(e.rank)}: {e.query}" for e in examples], rows)


def zero_shot_plot(examples: list[Classified]) -> Plot:
    plot = Plot(figsize=(7, 1.25 * len(examples)), dpi=110, facecolor="white", layout="constrained")
    grid = plot.subplots(len(examples), 2, squeeze=False, width_ratios=[1, 3])
    for (left, right), example in zip(grid, examples, strict=True):
        left.imshow(np.asarray(decode_image(example.image)))
        left.axis("off")
        left.set_title(example.label, fontsize=8)
        colours = ["#1f9d7a" if name == example.label else "#9aa3b2" for name in example.classes]
        right.barh(example.classes, example.probabilities, color=colours)
        right.invert_yaxis()
        right.set_xlim(0, 1)
        right.tick_params(labelsize=7, length=0)
        right.spines[:].set_visible(False)
    return plot


def captions_plot(examples: list[Captioned]) -> Plot:
    plot = Plot(figsize=(9, 1.5 * len(examples)), dpi=110, facecolor="white", layout="constrained")
    grid = plot.subplots(len(examples), 2, squeeze=False, width_ratios=[1, 5])
    for (left, right), e in zip(grid, examples, strict=True):
        left.imshow(np.asarray(decode_image(e.image)))
        left.axis("off")
        right.axis("off")
        text = f"web: {_clip(e.web, 200)}\ntrue: {_clip(e.truth, 280)}\ngenerated: {_clip(e.generated, 280)}"
        right.text(0, 0.95, text, va="top", fontsize=7, wrap=True)
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
    "lr": "learning rate",
}


def pretty(name: str) -> str:
    """`sentence_i2t_r1` → "sentence image → text R@1"."""
    words = name.replace("zero_shot", "zero").replace("single_prompt", "single prompt").split("_")
    return " ".join(_NAMES.get(word, word) for word in words)


def verdict(rank: int) -> str:
    return "hit" if rank == 1 else f"rank {rank}"


def _short(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}"


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
