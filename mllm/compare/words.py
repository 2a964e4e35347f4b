"""Figures of a comparison in words and numbers: one spelling for report, verification and documentation."""

from __future__ import annotations

from typing import Any


def metric_name(metric: str) -> str:
    return "CIDEr-D" if metric == "cider_d" else "all questions" if metric == "accuracy" else metric.partition("/")[2]


def value_text(metric: str, value: float) -> str:
    return f"{value:.2f}" if metric == "cider_d" else f"{100 * value:.1f}"


def difference_text(metric: str, value: float) -> str:
    return (f"{value:+.2f}" if metric == "cider_d" else f"{100 * value:+.1f}").replace("-", "−")


def mean_and_sd(metric: str, figure: dict[str, Any]) -> str:
    text = value_text(metric, figure["mean"])
    return text + (f" ± {value_text(metric, figure['sd'])}" if figure["sd"] is not None else "")


def interval_text(row: dict[str, Any]) -> str:
    return f"[{', '.join(difference_text(row['metric'], end) for end in row['ci95'])}]"


def percent_text(figure: dict[str, Any] | None) -> str:
    """A figure of the encoder alone, which is in percent already; – where it has none."""
    if figure is None:
        return "–"
    # One encoder that serves all seeds has no spread.
    return f"{figure['mean']:.1f}" + (f" ± {figure['sd']:.1f}" if figure["sd"] else "")


def headline(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of right answers: encoders × metrics."""
    metrics = list(next(iter(report["encoders"].values()))["metrics"])
    rows = [
        [name, *(mean_and_sd(metric, encoder["metrics"][metric]) for metric in metrics)]
        for name, encoder in report["encoders"].items()
    ]
    return ["encoder", *map(metric_name, metrics)], rows
