#!/usr/bin/env python
"""Draw the picture of the docs: the results of a comparison of encoders."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Plot

from clips.common.errors import run_command
from clips.common.files import check_target, read_json
from clips.common.flags import Parser
from clips.common.page import save_plot
from clips.common.plots import INK, SERIES, plain_axes
from mllm.evaluation.report import KINDS as KIND_WORDS

ALL = "accuracy"
"""The metric over all questions; `accuracy/KIND` are those of a kind."""
ENCODER_WORDS = {"clips": "CLIPS", "clip": "CLIP", "caption": "captions alone", "random": "untrained"}


def results_plot(encoders: dict[str, dict[str, Any]]) -> Plot:
    """Bars of the mean over seeds and lines of ± the standard deviation (none with one seed), in percent.

    `encoders`: name → metric → figure.
    """
    first = next(iter(encoders.values()))
    metrics = [*(name for name in first if name.startswith(f"{ALL}/") and "@" not in name), ALL]
    plot = Plot(figsize=(8, 3.6), dpi=150, layout="constrained")
    axes = plain_axes(plot, grid="y")
    bar = 0.8 / len(encoders)
    for i, (name, figures) in enumerate(encoders.items()):
        places = [place + bar * (i - (len(encoders) - 1) / 2) for place in range(len(metrics))]
        means = [100 * figures[metric]["mean"] for metric in metrics]
        spreads = [100 * (figures[metric]["sd"] or 0.0) for metric in metrics]
        axes.bar(places, means, bar * 0.92, label=ENCODER_WORDS.get(name, name), color=SERIES[i % len(SERIES)])
        axes.errorbar(places, means, spreads, fmt="none", ecolor=INK, elinewidth=1.1, capsize=2.5)
    kinds = [metric.partition("/")[2] or "overall" for metric in metrics]
    words = [textwrap.fill(KIND_WORDS.get(kind, kind), 13) for kind in kinds]
    labels = [f"{said}\n({first[metric]['items']:,})" for said, metric in zip(words, metrics, strict=True)]
    axes.set_xticks(range(len(metrics)), labels)
    axes.set_ylim(0, 108)
    axes.set_title("Right answers, %: mean over seeds ± standard deviation", loc="left", fontsize=10.5, color=INK)
    plot.legend(loc="outside lower center", ncols=len(encoders), fontsize=9.5, frameon=False, labelcolor=INK)
    return plot


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--report", type=Path, default=Path("runs/compare/report.json"), help="report.json of a comparison")
    p.add_argument("--output", type=Path, default=Path("runs/results.png"), help="the PNG or SVG to write")
    return p


def main() -> None:
    flags = parser().parse_args()
    check_target(flags.output.parent)
    encoders = read_json(flags.report)["encoders"]
    save_plot(results_plot({name: encoder["metrics"] for name, encoder in encoders.items()}), flags.output)
    print(f"written to {flags.output}")


if __name__ == "__main__":
    sys.exit(run_command(main))
