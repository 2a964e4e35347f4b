"""Figures that are measured: their names on several test sets, their file, and their table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from clips.common.files import write_json
from clips.common.page import table_of
from clips.common.report import metric_rows
from clips.common.tensors import hash_weights
from clips.config import RunConfig
from clips.data.demo import MISSING, is_by_one
from clips.data.splits import is_demo
from clips.evaluation.metrics import Figure
from clips.model.clips import CLIPSModel

MATTER = (
    *("sentence_i2t_r1", "sentence_t2i_r1", "zero_shot_top1", "linear_probe_top1", "web_i2t_r1"),
    *("web_t2i_r1", "long_i2t_r1", "long_t2i_r1", "caption_token_top1"),
)
"""The figures of which a terminal shows six, those that matter most first."""


def missing_of(run: RunConfig, split: str) -> str | None:
    """What the evaluation of a split lacks, in words, if the demo had to be drawn by one artist."""
    return MISSING if split == "test" and is_demo(run.data, "test") and is_by_one(run.data.demo_dir) else None


def write_figures(
    path: Path,
    figures: Mapping[str, Figure],
    model: CLIPSModel,
    skipped: Sequence[str],
    *,
    test_set: str,
    checkpoint: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    missing: str | None = None,
    limit: int | None = None,
) -> None:
    """Write each figure's value, chance level (percent or nats) and number of items, and which weights they are of.

    Args:
        test_set: the set whose figures have plain names.
        checkpoint: which one of the run the weights are (`clips.common.rundir.weights_of`); None if unknown.
        image_size: side of the square.
        missing: a test that could not be made.
        limit: the number of images asked for, None for the whole set. Only whole sets at one square reach a card.
    """
    content = {
        "test_set": test_set,
        "weights": hash_weights(model.state_dict()).hexdigest(),
        "checkpoint": checkpoint,
        "image_size": image_size or model.visual.image_size,
        "limit": limit,
        "unit": "percent; log ranks and losses: nats",
        "figures": {name: asdict(figure) for name, figure in figures.items()},
        "skipped_images": len(skipped),
        "skipped": list(skipped[:20]),
        **({"missing": missing} if missing else {}),
    }
    write_json(path, content)


def figures_table(figures: dict[str, Figure], title: str, first: str = "test", missing: str | None = None) -> Table:
    """For people: the six figures that matter, on every test set, beside the first's chance level and number of items.

    `first`: the name of the set whose figures have plain names. `missing`: as in `write_figures`.
    """
    names = dict.fromkeys(name.rpartition("/")[2] for name in figures)
    shown = ([name for name in MATTER if name in names] or [*names])[:6]
    rest = f"All {len(names)} figures are in the JSON file and in the report." if len(names) > len(shown) else None
    chosen = {name: asdict(figures[name]) for plain in shown for name in figures if name.rpartition("/")[2] == plain}
    return table_of(title, *metric_rows(chosen, first), " ".join(filter(None, (rest, missing))))
