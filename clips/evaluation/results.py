"""Metrics of an encoder: their names on several test sets, their JSON file, and their table for the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from clips.common.files import write_json
from clips.common.page import table_of
from clips.common.report import metric_rows
from clips.common.tensors import hash_weights
from clips.config import DataConfig
from clips.data.demo import MISSING, is_by_one
from clips.data.splits import is_demo
from clips.evaluation.metrics import Metric
from clips.model.clips import CLIPSModel

MATTER = (
    *("sentence_i2t_r1", "sentence_t2i_r1", "zero_shot_top1", "linear_probe_top1", "web_i2t_r1"),
    *("web_t2i_r1", "long_i2t_r1", "long_t2i_r1", "caption_token_top1"),
)
"""Metrics in order of importance; the terminal shows the first six that were measured."""


def missing_of(data: DataConfig, split: str) -> str | None:
    """Return in words what the evaluation of a split lacks if the demo had to be drawn by one artist, else None."""
    return MISSING if split == "test" and is_demo(data, "test") and is_by_one(data.demo_dir) else None


def write_metrics(
    path: Path,
    metrics: Mapping[str, Metric],
    model: CLIPSModel,
    skipped: Sequence[str],
    *,
    test_set: str,
    checkpoint: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    missing: str | None = None,
    limit: int | None = None,
    trained_on: int = 0,
) -> None:
    """Write each metric's value, chance level (percent or nats) and number of samples, and the hash of the weights.

    Args:
        test_set: Name of the set whose metrics have plain names.
        checkpoint: The run's checkpoint that the weights come from (`clips.common.rundir.weights_of`), if known.
        image_size: Side of the square images in pixels.
        missing: What the metrics lack, in words.
        limit: Number of images that were asked for; None for the whole set. A model card shows only whole sets.
        trained_on: Number of images that the model was trained on. A model card shows no set with such images.
    """
    content = {
        "test_set": test_set,
        "weights": hash_weights(model.state_dict()).hexdigest(),
        "checkpoint": checkpoint,
        "image_size": image_size or model.visual.image_size,
        "limit": limit,
        "trained_on": trained_on,
        "unit": "percent; log ranks and losses: nats",
        "metrics": {name: asdict(metric) for name, metric in metrics.items()},
        "skipped_images": len(skipped),
        "skipped": list(skipped[:20]),
        **({"missing": missing} if missing else {}),
    }
    write_json(path, content)


def metrics_table(metrics: dict[str, Metric], title: str, first: str = "test", missing: str | None = None) -> Table:
    """Return a table of the six most important metrics on every test set, with chance and samples of the first set.

    `first` is the name of the set whose metrics have plain names. `missing` is as in `write_metrics`.
    """
    names = dict.fromkeys(name.rpartition("/")[2] for name in metrics)
    shown = ([name for name in MATTER if name in names] or [*names])[:6]
    rest = f"All {len(names)} metrics are in the JSON file and in the report." if len(names) > len(shown) else None
    chosen = {name: asdict(metrics[name]) for plain in shown for name in metrics if name.rpartition("/")[2] == plain}
    return table_of(title, *metric_rows(chosen, first), " ".join(filter(None, (rest, missing))))
