"""The report of a run: one offline HTML page with curves and examples, and the curves as a PNG file.

`write_report` reads what a run leaves behind (config.json, metrics.jsonl, evaluation*.json) and, if given, examples of
its model. The page holds everything inside itself, follows the reader's light or dark setting and fits a phone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from clips.common.files import read_json, replacing, write_json
from clips.common.page import (
    Bar,
    Bars,
    Chart,
    Code,
    Folded,
    Page,
    Section,
    Tile,
    Tiles,
    as_html,
    save_plot,
)
from clips.common.plots import Panel, curves_plot, pretty
from clips.common.rundir import MADE_OF, UNSEEN, by_test_set, chosen_weights, read_evaluations, read_metrics
from clips.evaluation.metrics import in_nats


@dataclass
class RunRecord:
    """The contents of a run directory that a report shows."""

    name: str
    config: dict[str, Any]
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    figures: dict[str, dict[str, dict[str, float]]]
    """Test set → figure's name → value, chance, items."""
    missing: str
    """A test that could not be made, in words."""
    weights: dict[str, Any] | None
    """Step and SHA-256 of the weights (`clips.common.rundir.weights_of`); None if no checkpoint is left."""


def read_run(run_dir: Path) -> RunRecord:
    """Raises UserError when `run_dir` holds no metrics.jsonl."""
    run_dir = Path(run_dir)
    lines = read_metrics(run_dir)
    return RunRecord(
        name=run_dir.resolve().name,
        config=read_json(run_dir / "config.json"),
        train=[line for line in lines if line.get("kind") == "train"],
        evals=[line for line in lines if line.get("kind") == "eval"],
        figures={
            test_set: figures
            for evaluation in read_evaluations(run_dir).values()
            for test_set, figures in by_test_set(evaluation["figures"], evaluation["test_set"]).items()
        },
        missing=read_evaluations(run_dir).get("evaluation", {}).get("missing", ""),
        weights=chosen_weights(run_dir),
    )


def headline(names: Iterable[str]) -> list[str]:
    """The figures that matter first: R@1 both ways of the set's first protocol and zero-shot accuracy."""
    names = list(dict.fromkeys(names))
    recall = [name for name in names if name.endswith(("_i2t_r1", "_t2i_r1"))]
    return recall[:2] + (["zero_shot_top1"] if "zero_shot_top1" in names else [])


def panels(record: RunRecord) -> list[Panel]:
    scores = headline({name: None for line in record.evals for name in line})
    return [
        Panel("loss", record.train, ["contrastive_loss", "caption_loss"]),
        Panel("validation, %", record.evals, scores),
        Panel("learning rate", record.train, ["lr"]),
        Panel("logit scale", record.train, ["logit_scale"]),
        Panel("gradient norm", record.train, ["grad_norm"]),
        Panel("samples per second", record.train, ["samples_per_s"]),
        Panel("TFLOP/s of a device", record.train, ["tflops"]),
        Panel("seconds a step", record.train, ["step_seconds"]),
        Panel("share of time waiting for data", record.train, ["data_wait_share"]),
        Panel("peak memory, GB", record.train, ["peak_memory_gb"]),
    ]


def write_report(run_dir: Path, examples: Sequence[Section] = ()) -> Path:
    """Write `run_dir`/report/ (index.html and curves.png), whole or not at all, and return the page's path."""
    record = read_run(run_dir)
    with replacing(Path(run_dir) / "report") as directory:
        save_plot(curves_plot(panels(record)), directory / "curves.png")
        if record.weights is not None:
            write_json(directory / MADE_OF, record.weights)
        html = as_html(_page(record, examples))
        (directory / "index.html").write_text(html, encoding="utf-8")
    return Path(run_dir) / "report" / "index.html"


def _page(record: RunRecord, examples: Sequence[Section]) -> Page:
    config = record.config
    last = record.train[-1] if record.train else {}
    facts = [str(config.get("recipe", "")), f"{int(last.get('samples', 0)):,} samples"]
    if record.weights is not None:
        facts.append(f"weights of step {record.weights['step']:,}, SHA-256 {str(record.weights['sha256'])[:12]}")

    curves = [Chart(partial(curves_plot, [panel]), panel.title) for panel in panels(record) if record.train]
    figures = [
        Bars([_bar(key, figure) for key, figure in of_set.items()], (name, "", "chance", "items"))
        for name, of_set in record.figures.items()
    ]
    sections = [
        *examples,
        Section("Figures that matter first", [Tiles(_tiles(record))]),
        Section("Curves", curves, "Against samples seen."),
        Section("All figures", [Folded("Numbers", figures)], _figures_note(record)),
        Section("Configuration", [Folded("config.json", [Code(json.dumps(config, indent=2, ensure_ascii=False))])]),
    ]
    sections = [section for section in sections if section.blocks]
    return Page(record.name, " · ".join(filter(None, facts)), sections)


def _bar(name: str, figure: Mapping[str, float]) -> Bar:
    digits, scale = (2, 100 / max(figure["value"], figure["chance"], 1e-9)) if in_nats(name) else (1, 1)
    texts = (f"{figure['value']:.{digits}f}", f"{figure['chance']:.2f}", f"{figure['items']:,}")
    return Bar(pretty(name), scale * figure["value"], texts, chance=scale * figure["chance"])


def _figures_note(record: RunRecord) -> str:
    note = "Percent; log ranks and losses: nats, lower is better. The mark on each bar is chance. "
    note += "Equal captions count as hits; ties are broken at random."
    if record.config.get("data", {}).get("train") == "demo":
        note += " The demo proves the path and that the measurement works; it is no evidence about natural images."
        if UNSEEN in record.figures:
            note += f" “{UNSEEN}” are the scenes of “test”, drawn by an artist whom no training shows: they decide."
    return f"{note} {record.missing}"


def _tiles(record: RunRecord) -> list[Tile]:
    """The figures that matter first, on the test set that decides."""
    tiles = []
    test_set = UNSEEN if UNSEEN in record.figures else next(reversed(record.figures), "")
    figures = record.figures.get(test_set, {})
    first = next(iter(record.figures), "")
    last = record.evals[-1] if record.evals else {}
    for name in headline(figures or last):
        figure = figures.get(name, {"value": last.get(name)})
        note = f"chance {figure['chance']:.1f} %" if "chance" in figure else "validation"
        if test_set == UNSEEN and name in record.figures[first]:
            note = f"{UNSEEN} artist; on {first} {record.figures[first][name]['value']:.1f} %, {note}"
        tiles.append(Tile(pretty(name), [(f"{figure['value']:.1f} %", "")], note))
    return tiles
