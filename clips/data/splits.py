"""Where the training, validation and test samples of a run are."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from clips.common.errors import UserError
from clips.config import DataConfig
from clips.data.demo import demo_split, ensure_demo
from clips.data.sources import MixedSource, Source, open_source

Split = Literal["train", "val", "test"]


def split_spec(data: DataConfig, split: Split) -> str | None:
    """The spec of a split for `open_source`, or None where the run has no such split."""
    if data.train == "demo" and (split == "train" or getattr(data, split) is None):
        return demo_split(data.demo_dir, split)
    return getattr(data, split)


def open_split(data: DataConfig, split: Split, *, need_long: bool) -> Source:
    """Open a split; the demo data is built first where it is missing. UserError where there is nothing to open."""
    spec = split_spec(data, split)
    if not spec:
        flag = {"train": "--data", "val": "--val-data", "test": "--test-data"}[split]
        raise UserError(
            f"this run names no {split} data; give it with {flag} (a folder of tar shards, a pattern, a table)"
        )
    if spec == "mix":
        return _open_mix(data, need_long)
    if data.train == "demo":
        ensure_demo(data.demo_dir)
    return open_source(spec, data.fields, image_root=data.image_root, need_long=need_long)


def _open_mix(data: DataConfig, need_long: bool) -> MixedSource:
    sources = []
    for part in data.mix:
        own = replace(data, train=part.data, mix=(), fields=part.fields or data.fields, image_root=part.image_root)
        sources.append(open_split(own, "train", need_long=need_long))
    try:
        return MixedSource(sources, [part.share for part in data.mix])
    except ValueError as error:
        raise UserError(f"data.mix: {error}") from None
