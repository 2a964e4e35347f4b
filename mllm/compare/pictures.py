"""A comparison of encoders as one picture for README and docs: right answers by kind of question, with error bars."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Plot

from clips.common.errors import UserError
from clips.common.page import save_plot
from clips.common.plots import LIGHT, SERIES, Theme, check_format

GROUP = 0.8
"""Width of the bars of a kind of question; the kinds stand at a distance of 1."""
ALL = "accuracy"
"""The metric over all questions; `accuracy/KIND` are those of a kind."""


def write_results(report: Path, out: Path) -> Path:
    """Draw `report`, a report.json of scripts/compare_encoders.py or a subset of one, into `out`; returns `out`.

    Read are `encoders.NAME.metrics.accuracy[/KIND]` (`mean` and `sd` as fractions) and `differences`. Raises UserError
    for a file that is none, a report without answered questions, and an `out` that is neither .png nor .svg.
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

    `encoders`: name → metric → figure. The title tells the first difference over all questions, with its interval.
    """
    metrics = [name for name in next(iter(encoders.values())) if name.startswith(ALL) and "@" not in name]
    metrics.sort(key=lambda name: name == ALL)  # all questions at the right end
    plot = Plot(figsize=(8, 3.6), dpi=150, facecolor=theme.paper, layout="constrained")
    axes = plot.add_subplot(facecolor=theme.paper)
    bar = GROUP / len(encoders)
    for i, (name, figures) in enumerate(encoders.items()):
        shift = bar * (i - (len(encoders) - 1) / 2)
        places = [place + shift for place in range(len(metrics))]
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
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.ink, labelsize=9.5, length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(_title(differences), loc="left", fontsize=10.5, color=theme.ink)
    plot.legend(
        loc="outside lower center", ncols=len(encoders), fontsize=9.5, frameon=False, labelcolor=theme.ink,
        handlelength=1.2,
    )  # fmt: skip
    return plot


def _title(differences: list[dict[str, Any]]) -> str:
    title = "Right answers, %: mean over seeds ± standard deviation"
    overall = next((row for row in differences if row["metric"] == ALL), None)
    if overall is None:
        return title
    numbers = [f"{100 * value:+.1f}".replace("-", "−") for value in (overall["mean"], *overall["ci95"])]
    return f"{title}\n{overall['a']} − {overall['b']}, all questions: {numbers[0]} points [{numbers[1]}, {numbers[2]}]"
