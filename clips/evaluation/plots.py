"""The plots of a run's report, with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure as Plot
from matplotlib.layout_engine import ConstrainedLayoutEngine

from clips.common.escape import for_plot
from clips.data.images import decode_image
from clips.evaluation.examples import Captioned, Classified, Retrieved

LABEL = 40
"""Characters of a class's name that are drawn."""


def _picture_rows(titles: Sequence[str], rows: Sequence[Sequence[tuple[bytes, str, str]]]) -> Plot:
    """Rows of pictures (encoded image, caption, frame colour or ""), each under its title; for the PNG files."""
    columns = max(map(len, rows))
    layout = ConstrainedLayoutEngine(h_pad=0.14)
    plot = Plot(figsize=(1.5 * columns, 2.0 * len(rows)), dpi=110, facecolor="white", layout=layout)
    grid = plot.subplots(len(rows), columns, squeeze=False)
    for line, title, cells in zip(grid, titles, rows, strict=True):
        for axes in line:
            axes.axis("off")
        # A text outside the layout: a title would widen the first column.
        line[0].text(0, 1.06, for_plot(title, 18 * columns), transform=line[0].transAxes, fontsize=8, in_layout=False)
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
        left.set_title(for_plot(example.label, LABEL // 2), fontsize=8)
        colours = ["#1f9d7a" if name == example.label else "#9aa3b2" for name in example.classes]
        places = range(len(example.classes))  # not the names: of two that are cut alike one bar would hide the other
        right.barh(places, example.probabilities, color=colours)
        right.set_yticks(places, [for_plot(name, LABEL) for name in example.classes])
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
        shown = {"web": for_plot(e.web, 200), "true": for_plot(e.truth, 280), "generated": for_plot(e.generated, 280)}
        text = "\n".join(f"{name}: {caption}" for name, caption in shown.items())
        right.text(0, 0.95, text, va="top", fontsize=7, wrap=True)
    return plot


def verdict(rank: int) -> str:
    return "hit" if rank == 1 else f"rank {rank}"
