"""The parts of a step as one picture for the docs: how long each takes, and what it reaches of the machine's peak."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Plot

from clips.common.errors import UserError
from clips.common.page import save_plot
from clips.common.plots import LIGHT, SERIES, Theme, check_format
from clips.studies.measuring import Row

WAYS = ("forward", "backward")
PART_HEIGHT = 0.62
"""Of a bar; the parts stand at a distance of 1."""


def write_profile(report: Path, out: Path) -> Path:
    """Draw `report`, what `benchmark.py profile --out` wrote, into `out`; returns `out`.

    Raises UserError for a file that is none, and an `out` that is neither .png nor .svg.
    """
    check_format(out)
    try:
        content = json.loads(report.read_text(encoding="utf-8"))
        settings: dict[str, list[Row]] = {}
        for row in content["rows"]:
            settings.setdefault(row["setting"], []).append({"of_peak_%": 0.0, **row, "ms": float(row["ms"])})
        device = content["machine"]["device"]
        bars = {name: merged(rows) for name, rows in settings.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--report {report} is not written by benchmark.py profile --out: {error!r}") from None
    return save_plot(profile_plot(bars, device, LIGHT), out)


def merged(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Forward and backward pass of a part as one row: {"part", "ms": of each way, "share_%", "of_peak_%"}.

    What has no two ways counts as the first of them. The whole step stands last.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        part, _, way = row["part"].partition(", ")
        bar = found.setdefault(part, {"part": part, "ms": [0.0, 0.0], "share_%": 0.0, "reached": 0.0})
        bar["ms"][WAYS.index(way) if way else 0] += row["ms"]
        bar["share_%"] += row["share_%"]
        bar["reached"] += row["of_peak_%"] * row["ms"]
    return [bar | {"of_peak_%": bar.pop("reached") / sum(bar["ms"])} for bar in found.values()]


def profile_plot(settings: dict[str, list[dict[str, Any]]], device: str, theme: Theme) -> Plot:
    """A panel for each setting; `settings`: name → `merged`."""
    columns = min(2, len(settings))
    lines = -(-len(settings) // columns)
    plot = Plot(figsize=(4.9 * columns, 2.9 * lines), dpi=120, facecolor=theme.paper, layout="constrained")
    panels = list(plot.subplots(lines, columns, squeeze=False).flat)
    for axes, (name, bars) in zip(panels, settings.items(), strict=False):
        _draw(axes, name, bars, theme)
    for axes in panels[len(settings) :]:
        axes.remove()
    handles, labels = panels[0].get_legend_handles_labels()
    plot.legend(
        handles, labels, loc="outside lower center", ncols=len(WAYS), fontsize=9, frameon=False, labelcolor=theme.ink
    )
    plot.suptitle(f"Where a step's time goes ({device})", x=0.01, ha="left", fontsize=10.5, color=theme.ink)
    return plot


def _draw(axes: Axes, name: str, bars: list[dict[str, Any]], theme: Theme) -> None:
    *parts, whole = bars
    places = range(len(parts))
    begin = [0.0] * len(parts)
    for i, way in enumerate(WAYS):
        lengths = [bar["ms"][i] for bar in parts]
        axes.barh(places, lengths, PART_HEIGHT, left=begin, color=SERIES[i], label=way)
        begin = [sum(pair) for pair in zip(begin, lengths, strict=True)]
    for place, end, bar in zip(places, begin, parts, strict=True):
        reached = f", {bar['of_peak_%']:.0f} % of peak" if bar["of_peak_%"] else ""
        axes.annotate(
            f"{bar['share_%']:.0f} %{reached}", (end, place), xytext=(4, 0), textcoords="offset points", va="center",
            fontsize=8, color=theme.ink,
        )  # fmt: skip
    axes.set_facecolor(theme.paper)
    axes.set_title(
        f"{name}: {sum(whole['ms']):,.0f} ms a step, {whole['of_peak_%']:.0f} % of peak", loc="left", fontsize=9.5,
        color=theme.ink, fontweight="bold",
    )  # fmt: skip
    axes.set_yticks(places, [bar["part"] for bar in parts])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.5 * max(begin))  # room for the words behind the bars
    axes.set_xlabel("ms", fontsize=8.5, color=theme.ink)
    axes.grid(axis="x", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.ink, labelsize=8.5, length=0)
    axes.spines[:].set_visible(False)
