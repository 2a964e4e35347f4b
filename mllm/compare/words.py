"""Figures of a comparison in words and numbers: one spelling for report, verification and documentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clips.lab.stats import show_difference, show_interval
from mllm.compare.figures import NEEDS_PICTURE

METRICS = {"accuracy": "all questions", NEEDS_PICTURE: "not answered blind", "cider_d": "CIDEr-D"}


def metric_name(metric: str) -> str:
    figure, at, column = metric.partition("@")
    name = METRICS.get(figure) or figure.partition("/")[2]
    return f"{name}, {column}" if at else name


def how_shown(metric: str) -> dict[str, Any]:
    """Scale and digits for the functions of clips.lab.stats: percent of right answers, or CIDEr-D."""
    return {"digits": 2, "scale": 1} if metric.startswith("cider_d") else {"digits": 1, "scale": 100}


def difference_text(row: dict[str, Any]) -> str:
    return show_difference(row, **how_shown(row["metric"]))


def interval_text(row: dict[str, Any]) -> str:
    return show_interval(row["ci95"], **how_shown(row["metric"]))


def value_text(metric: str, value: float) -> str:
    how = how_shown(metric)
    return f"{how['scale'] * value:.{how['digits']}f}"


def mean_and_sd(metric: str, figure: dict[str, Any] | None) -> str:
    """A figure of right answers or CIDEr-D; – if an encoder has none."""
    if figure is None:
        return "–"
    spread = f" ± {value_text(metric, figure['sd'])}" if figure["sd"] is not None else ""
    return value_text(metric, figure["mean"]) + spread


def percent_text(figure: dict[str, Any] | None) -> str:
    """A figure of the encoder alone, which is in percent already; – if it has none."""
    if figure is None:
        return "–"
    # One encoder that serves all seeds has no spread.
    return f"{figure['mean']:.1f}" + (f" ± {figure['sd']:.1f}" if figure["sd"] else "")


def headline(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of right answers: encoders × metrics."""
    metrics = list(dict.fromkeys(name for encoder in report["encoders"].values() for name in encoder["metrics"]))
    rows = [
        [name, *(mean_and_sd(metric, encoder["metrics"].get(metric)) for metric in metrics)]
        for name, encoder in report["encoders"].items()
    ]
    return ["encoder", *map(metric_name, metrics)], rows
