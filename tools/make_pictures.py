#!/usr/bin/env python
"""Draw a picture of the docs: `results` of a comparison of encoders, `captions` of a comparison of sets of captions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Plot

from clips.common.errors import UserError, run_command
from clips.common.flags import Parser
from clips.common.page import save_plot
from clips.common.plots import LIGHT, SERIES, Theme, check_format
from clips.lab.report import plain_axes

ALL = "accuracy"
"""The metric over all questions; `accuracy/KIND` are those of a kind."""
REPORTS = {
    "results": Path("runs/compare/report.json"),
    "captions": Path("runs/compare_captions/captions.json"),
}


def write_results(report: Path, out: Path) -> Path:
    """Draw `report`, a report.json of scripts/compare_encoders.py or docs/results/compare.json, into `out`.

    Raises UserError for another file, a report without answered questions, and an `out` that is neither .png nor .svg.
    """
    check_format(out)
    try:
        encoders = json.loads(report.read_text(encoding="utf-8"))["encoders"]
        plot = results_plot({name: encoder["metrics"] for name, encoder in encoders.items()}, LIGHT)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise UserError(f"--report {report} holds no right answers of scripts/compare_encoders.py: {error!r}") from None
    return save_plot(plot, out)


def results_plot(encoders: dict[str, dict[str, Any]], theme: Theme) -> Plot:
    """Bars of the mean over seeds and lines of ± the standard deviation (none with one seed), in percent.

    `encoders`: name → metric → figure.
    """
    first = next(iter(encoders.values()))
    metrics = [*(name for name in first if name.startswith(f"{ALL}/") and "@" not in name), ALL]
    plot = Plot(figsize=(8, 3.6), dpi=150, facecolor=theme.paper, layout="constrained")
    axes = plain_axes(plot, theme, grid="y")
    bar = 0.8 / len(encoders)
    for i, (name, figures) in enumerate(encoders.items()):
        places = [place + bar * (i - (len(encoders) - 1) / 2) for place in range(len(metrics))]
        means = [100 * figures[metric]["mean"] for metric in metrics]
        spreads = [100 * (figures[metric]["sd"] or 0.0) for metric in metrics]
        axes.bar(places, means, bar * 0.92, label=name, color=SERIES[i % len(SERIES)])
        axes.errorbar(places, means, spreads, fmt="none", ecolor=theme.ink, elinewidth=1.1, capsize=2.5)
    kinds = [metric.partition("/")[2] or "all questions" for metric in metrics]
    labels = [f"{kind}\n({first[metric]['items']:,})" for kind, metric in zip(kinds, metrics, strict=True)]
    axes.set_xticks(range(len(metrics)), labels)
    axes.set_ylim(0, 108)
    axes.set_title("Right answers, %: mean over seeds ± standard deviation", loc="left", fontsize=10.5, color=theme.ink)
    plot.legend(loc="outside lower center", ncols=len(encoders), fontsize=9.5, frameon=False, labelcolor=theme.ink)
    return plot


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("what", choices=tuple(REPORTS), help="right answers of each encoder, or what each set taught")
    p.add_argument("--report", type=Path, help="report.json or captions.json to draw (default: of the usual run)")
    p.add_argument("--output", type=Path, help="the PNG or SVG to write (default: beside the figures)")
    return p


def main() -> None:
    flags = parser().parse_args()

    from clips.studies.variants_page import write_chart

    report = flags.report or REPORTS[flags.what]
    out = flags.output or report.with_name(f"{flags.what}.png")
    write = {"results": write_results, "captions": write_chart}[flags.what]
    print(f"written to {write(report, out)}")


if __name__ == "__main__":
    sys.exit(run_command(main))
