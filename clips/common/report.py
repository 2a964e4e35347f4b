"""The page of a run of either half: twelve images, the curves, and the metrics against chance."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clips.common.files import read_json, replacing, write_json
from clips.common.page import Card, Cards, Chart, Code, Folded, Page, Section, Table, as_html
from clips.common.plots import Panel, curves_plot, pretty
from clips.common.rundir import MADE_OF, METRICS, REPORT, UNSEEN, by_test_set, chosen_weights, read_metrics

IMAGES, SIDE = 12, 180
"""Images on the page, and the longest side of each in pixels."""
CURVES = {
    "loss": ("loss", "contrastive_loss", "caption_loss"),
    "validation, %": ("sentence_i2t_r1", "sentence_t2i_r1", "web_i2t_r1", "web_t2i_r1", "zero_shot_top1"),
    "learning rate": ("lr", "learning_rate"),
    "logit scale": ("logit_scale",),
    "gradient norm": ("grad_norm",),
    "samples per second": ("samples_per_s",),
    "TFLOP/s of a device": ("tflops",),
    "seconds a step": ("step_seconds",),
    "share of time waiting for data": ("data_wait_share",),
    "peak memory, GB": ("peak_memory_gb",),
}
"""Fields of metrics.jsonl by the title of their curve."""
UNITS = "Percent, if the name says nothing else; log ranks and losses are in nats, and lower is better."


def write_report(
    run_dir: Path,
    evaluations: Iterable[Mapping[str, Any]],
    cards: Sequence[Card],
    *,
    facts: str = "",
    directory: Path | None = None,
) -> Path:
    """Write report/index.html of a run atomically, and return its path.

    Args:
        evaluations: contents of evaluation*.json or results.json: `metrics` (value, chance and items of each, by name),
            `test_set` (the set whose metrics have plain names) and perhaps `missing`.
        cards: images with what the model says about them.
        facts: a description of the run in words.
        directory: where report/ is put; default: `run_dir`.
    """
    weights = chosen_weights(run_dir)
    if weights is not None:
        facts += f" · weights of step {weights['step']:,}, SHA-256 {str(weights['sha256'])[:12]}"
    tables, notes = [], [UNITS]
    for evaluation in evaluations:
        tables.append(Table(*metric_rows(evaluation["metrics"], evaluation["test_set"])))
        notes.append(evaluation.get("missing", ""))
        if UNSEEN in by_test_set(evaluation["metrics"], ""):
            notes.append(f"“{UNSEEN}” is the test in a held-out drawing style, and it decides.")
    config = json.dumps(read_json(run_dir / "config.json"), indent=2, ensure_ascii=False)
    sections = [
        Section("Images", [Cards(cards)] if cards else [], "Drawn at random from the test."),
        Section("Curves", [Chart(curves_plot([p]), p.title) for p in curves(run_dir)], "Against samples seen."),
        Section("Metrics against chance", tables, " ".join(filter(None, notes))),
        Section("Configuration", [Folded("config.json", [Code(config)])]),
    ]
    page = Page(run_dir.resolve().name, facts, [section for section in sections if section.blocks])
    path = (directory or run_dir) / REPORT
    with replacing(path.parent) as partial:
        if weights is not None:
            write_json(partial / MADE_OF, weights)
        (partial / path.name).write_text(as_html(page), encoding="utf-8")
    return path


def curves(run_dir: Path) -> list[Panel]:
    """Return the curves of metrics.jsonl, separately for each stage, or none if the run has not started."""
    stages: dict[str, list[dict[str, Any]]] = {}
    for line in read_metrics(run_dir) if (run_dir / METRICS).is_file() else ():
        stages.setdefault(line.get("stage", ""), []).append(line)
    return [
        Panel(f"{stage}: {title}".removeprefix(": "), lines, names)
        for stage, lines in stages.items()
        for title, names in CURVES.items()
        if any(name in line for line in lines for name in names)
    ]


def metric_rows(measured: Mapping[str, Mapping[str, Any]], first: str) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of a table: each metric on every test set, with chance and items of the first one.

    `first` is the name of the test set whose metrics have plain names.
    """
    sets = by_test_set(measured, first)
    rows = []
    for name in dict.fromkeys(name for metrics in sets.values() for name in metrics):
        by_set = [metrics.get(name) for metrics in sets.values()]
        one = next(metric for metric in by_set if metric is not None)
        values = [
            "" if metric is None else _shown(metric) + " (at chance)" * at_chance(name, metric) for metric in by_set
        ]
        rows.append([pretty(name), *values, _shown(one, "chance"), f"{one['items']:,}"])
    return ["metric", *sets, "chance", "items"], rows


def at_chance(name: str, metric: Mapping[str, Any]) -> bool:
    """Return True if a metric in percent does not differ significantly from chance.

    Its 95 % interval (`low`, `high`) must cover chance; without one, recall and top-k accuracy are tested with a normal
    approximation over their `items`, and any other metric gives False.
    """
    value, chance = metric.get("value"), metric.get("chance")
    if value is None or chance is None:
        return False
    if "low" in metric:
        return bool(metric["low"] <= chance <= metric["high"])
    width = 1.96 * math.sqrt(max(0, chance * (100 - chance)) / max(1, metric["items"]))
    return re.search(r"_(r|top)\d", name) is not None and abs(value - chance) <= width


def _shown(metric: Mapping[str, Any], field: str = "value") -> str:
    """Return a number in words, with its 95 % interval if there is one; empty if it is unknown."""
    value = metric.get(field)
    interval = f" [{metric['low']:.1f}, {metric['high']:.1f}]" if field == "value" and "low" in metric else ""
    return "" if value is None else f"{value:.1f}{interval}" if value >= 10 else f"{value:.2f}{interval}"
