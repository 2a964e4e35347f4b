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
from clips.lab.stats import show_difference

GROUP = 0.8
"""Width of the bars of a kind of question; the distance of two kinds is 1."""
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
        content = json.loads(report.read_text(encoding="utf-8"))
        encoders = {name: encoder["metrics"] for name, encoder in content["encoders"].items()}
        differences = content["differences"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--report {report} is no report.json of scripts/compare_encoders.py: {error!r}") from None
    if not encoders or any(ALL not in metrics for metrics in encoders.values()):
        raise UserError(f"--report {report} has no right answers to draw: its models answered no questions")
    return save_plot(results_plot(encoders, differences, LIGHT), out)


def results_plot(encoders: dict[str, dict[str, Any]], differences: list[dict[str, Any]], theme: Theme) -> Plot:
    """Bars of the mean over seeds and lines of ± the standard deviation (none with one seed), in percent.

    `encoders`: name → metric → figure. The title has the first difference over all questions.
    """
    metrics = [name for name in next(iter(encoders.values())) if name.startswith(ALL) and "@" not in name]
    metrics.sort(key=lambda name: name == ALL)  # all questions at the right end
    plot = Plot(figsize=(8, 3.6), dpi=150, facecolor=theme.paper, layout="constrained")
    axes = plain_axes(plot, theme, grid="y")
    bar = GROUP / len(encoders)
    for i, (name, figures) in enumerate(encoders.items()):
        places = [place + bar * (i - (len(encoders) - 1) / 2) for place in range(len(metrics))]
        means = [100 * figures[metric]["mean"] for metric in metrics]
        spreads = [100 * (figures[metric]["sd"] or 0.0) for metric in metrics]
        axes.bar(places, means, bar * 0.92, label=name, color=SERIES[i % len(SERIES)])
        axes.errorbar(places, means, spreads, fmt="none", ecolor=theme.ink, elinewidth=1.1, capsize=2.5)
    counts = [next(iter(encoders.values()))[metric].get("items") for metric in metrics]
    kinds = [metric.partition("/")[2] or "all questions" for metric in metrics]
    labels = [kind if count is None else f"{kind}\n({count:,})" for kind, count in zip(kinds, counts, strict=True)]
    axes.set_xticks(range(len(metrics)), labels)
    axes.set_ylim(0, 108)
    axes.set_yticks(range(0, 101, 25))
    title = "Right answers, %: mean over seeds ± standard deviation"
    overall = [row for row in differences if row["metric"] == ALL]
    for row in overall[:1]:
        title += f"\n{row['a']} − {row['b']}, all questions, points: {show_difference(row, scale=100)}"
    axes.set_title(title, loc="left", fontsize=10.5, color=theme.ink)
    plot.legend(
        loc="outside lower center", ncols=len(encoders), fontsize=9.5, frameon=False, labelcolor=theme.ink,
        handlelength=1.2,
    )  # fmt: skip
    return plot


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument(
        "what",
        choices=tuple(REPORTS),
        help="results: right answers by kind of question, for each encoder; captions: what encoders learned from each "
        "set",
    )
    p.add_argument(
        "--report",
        type=Path,
        help="the figures to draw: report.json of compare_encoders.py or captions.json of compare_captions.py "
        "(default: that of the usual run)",
    )
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
