"""Figures of a comparison in words and numbers: one spelling for report, verification and documentation."""

from __future__ import annotations

from typing import Any

from mllm.compare.figures import NEEDS_PICTURE

METRICS = {"accuracy": "all questions", NEEDS_PICTURE: "not answered blind", "cider_d": "CIDEr-D"}


def metric_name(metric: str) -> str:
    figure, at, column = metric.partition("@")
    name = METRICS.get(figure) or figure.partition("/")[2]
    return f"{name}, {column}" if at else name


def counts_right_answers(metric: str) -> bool:
    """Whether right answers of the deciding column are what a metric counts."""
    return "@" not in metric and not metric.startswith("cider_d")


def pair_name(row: dict[str, Any]) -> str:
    """Of a difference."""
    return f"{row['a']} − {row['b']}"


def overall_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Differences over all questions of the deciding column."""
    return [row for row in report["differences"] if row["metric"] == "accuracy"]


def value_text(metric: str, value: float) -> str:
    return f"{value:.2f}" if metric.startswith("cider_d") else f"{100 * value:.1f}"


def difference_text(metric: str, value: float) -> str:
    return (f"{value:+.2f}" if metric.startswith("cider_d") else f"{100 * value:+.1f}").replace("-", "−")


def mean_and_sd(metric: str, figure: dict[str, Any] | None) -> str:
    """A figure of right answers or CIDEr-D; – where an encoder has none."""
    if figure is None:
        return "–"
    spread = f" ± {value_text(metric, figure['sd'])}" if figure["sd"] is not None else ""
    return value_text(metric, figure["mean"]) + spread


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
    metrics = list(dict.fromkeys(name for encoder in report["encoders"].values() for name in encoder["metrics"]))
    rows = [
        [name, *(mean_and_sd(metric, encoder["metrics"].get(metric)) for metric in metrics)]
        for name, encoder in report["encoders"].items()
    ]
    return ["encoder", *map(metric_name, metrics)], rows
