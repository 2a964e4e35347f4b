"""Figures of a comparison in words and numbers: one spelling for report, verification and documentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clips.lab.stats import show_difference, show_interval
from mllm.compare.figures import NEEDS_PICTURE, NOT_IN_PERCENT

METRICS = {"accuracy": "all questions", NEEDS_PICTURE: "not answered blind", "cider_d": "CIDEr-D"}


def metric_name(metric: str) -> str:
    figure, at, column = metric.partition("@")
    name = METRICS.get(figure) or figure.removeprefix("accuracy/").replace("_", " ").replace("/", ", ")
    return f"{name}, {column}" if at else name


def digits_and_scale(metric: str) -> tuple[int, int]:
    """Right answers and shares are shown in percent, CIDEr-D and nats as they are."""
    return (2, 1) if metric.startswith(NOT_IN_PERCENT) else (1, 100)


def difference_text(row: dict[str, Any]) -> str:
    return show_difference(row, *digits_and_scale(row["metric"]))


def interval_text(row: dict[str, Any]) -> str:
    return show_interval(row["ci95"], *digits_and_scale(row["metric"]))


def mean_and_sd(metric: str, figure: dict[str, Any] | None) -> str:
    """A figure of right answers or CIDEr-D; – if an encoder has none."""
    digits, scale = digits_and_scale(metric)
    if figure is None:
        return "–"
    spread = f" ± {scale * figure['sd']:.{digits}f}" if figure["sd"] is not None else ""
    return f"{scale * figure['mean']:.{digits}f}{spread}"


def percent_text(figure: dict[str, Any] | None) -> str:
    """A figure of the encoder alone, which is in percent already; – if it has none."""
    if figure is None:
        return "–"
    # One encoder that serves all seeds has no spread.
    return f"{figure['mean']:.1f}" + (f" ± {figure['sd']:.1f}" if figure["sd"] else "")


def design_in_words(encoders: int, runs: int) -> str:
    """How many encoders of a kind there are, and how their LLaVA runs lie on them."""
    if runs % encoders:
        return f"{encoders} encoders of each kind, {runs} LLaVA runs on them in turn"
    each = runs // encoders
    return f"{encoders} encoder{'s' * (encoders > 1)} of each kind, {each} LLaVA run{'s' * (each > 1)} on each"


def headline(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of right answers: encoders × metrics."""
    encoders = {name: encoder["metrics"] for name, encoder in report["encoders"].items()}
    metrics = list(dict.fromkeys(name for figures in encoders.values() for name in figures))
    rows = [[name, *(mean_and_sd(m, figures.get(m)) for m in metrics)] for name, figures in encoders.items()]
    return ["encoder", *map(metric_name, metrics)], rows
