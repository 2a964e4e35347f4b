"""Where the training, validation and test samples of a run are."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from clips.common.errors import BrokenDataError, UserError
from clips.common.paths import is_remote
from clips.common.rundir import UNSEEN
from clips.config import DataConfig
from clips.data.demo import demo_split, ensure_demo
from clips.data.joined import MixedSource, PartSource
from clips.data.sources import BROKEN, Source, TableSource, open_source

OWN = ("train", "val", "test")
"""The splits of every run; `held_out_sets` lists further ones."""
FEWEST_IMAGES, MOST_HELD_OUT = 100, 1_000
"""Fewest images of which a share is held out, and the most images that are held out."""
HASHES: dict[tuple[Any, ...], np.ndarray] = {}
"""`Source.image_hashes` by the data's spec, fields, root, key and listing: a process reads the images of a set once."""


def is_demo(data: DataConfig, split: str) -> bool:
    """Return True if a split is the embedded demo's."""
    chosen = data.test if split not in OWN else getattr(data, split)
    return data.train == "demo" and (split == "train" or chosen in (None, "demo"))


def held_out_sets(data: DataConfig) -> list[str]:
    """Return the names of the test sets: `test` first, if there is one, then the further sets.

    Builds the demo if it is missing, because the number of artists is known only then.
    """
    if is_demo(data, "test"):
        ensure_demo(data.demo_dir)
    first = ["test"] if split_spec(data, "test") else []
    unseen = [UNSEEN] if is_demo(data, "test") and Path(data.demo_dir, UNSEEN).is_dir() else []
    return [*first, *unseen, *(part.name for part in data.further_tests)]


def deciding_set(data: DataConfig) -> str | None:
    """Return the set whose metrics decide comparisons: `unseen` if the run has it, else the first of `held_out_sets`.

    Without test sets it is the validation split, or None if there is none either.
    """
    names = held_out_sets(data)
    return UNSEEN if UNSEEN in names else next(iter(names), "val" if split_spec(data, "val") else None)


def split_spec(data: DataConfig, split: str) -> str | None:
    """Return the spec of a split or a further test set for `open_source`, or None if the run has none of that name."""
    further = {part.name: part.data for part in data.further_tests}
    if split in further:
        return further[split]
    if is_demo(data, split) and split in (*OWN, UNSEEN):
        return demo_split(data.demo_dir, split)
    if split == "val" and holds_out(data):
        return data.train if len(held_out_images(data)[0]) else None
    return getattr(data, split) if split in OWN else None


def holds_out(data: DataConfig) -> bool:
    """Return True if the run asks for a share of its training data to be held out for validation."""
    return data.held_out > 0 and not data.val and data.train not in ("demo", "mix")


@lru_cache
def held_out_images(data: DataConfig) -> tuple[np.ndarray, str, np.ndarray]:
    """Choose the images that validate; return their hashes, a line for the plan, and the hashes left to training.

    Those are the images whose hash is below the share `data.held_out`, at most MOST_HELD_OUT of them; the third result
    has the others below the share. So every seed validates on the same images, all captions of an image are on one
    side, and adding images moves none from training into validation. The exception is data that was too small before:
    with fewer than FEWEST_IMAGES images none validates. With `data.key`, the values of that field count instead of
    images.
    """
    hashes = _image_hashes(data, open_source(data.train, data.fields, image_root=data.image_root, need_long=False))
    images, what = np.unique(hashes), f"values of {data.key!r}" if data.key else "images"
    below = images[images < data.held_out * 2.0**64]
    chosen = below[:MOST_HELD_OUT]
    if len(images) < FEWEST_IMAGES or not 1 < len(chosen) < len(images):
        few = f"no image is held out of {len(images):,} {what}, fewer than {FEWEST_IMAGES} (--val-data gives others)"
        return chosen[:0], few, below
    rows = np.isin(hashes, chosen).sum()
    line = f"{len(chosen):,} of {len(images):,} {what} held out, {rows:,} rows (--val-data gives others)"
    return chosen, line, below[len(chosen) :]


def count_shared(train: Source, test: Source) -> tuple[int, int]:
    """Return (number of images of `test` that `train` contains, number of images of `test`).

    Images are compared by `Source.image_hashes`; for two tables, the paths of `test` are from now on relative to the
    folder of `train`. For remote data the first number is 0, because names of shards say nothing about their content.
    """
    if any(map(is_remote, (*train.files, *test.files))):
        return 0, len(test)
    if isinstance(train, TableSource) and isinstance(test, TableSource):
        test.base = train.base
    trained, tested = (np.unique(source.image_hashes()) for source in (train, test))
    return int(np.isin(np.setdiff1d(tested, BROKEN), trained).sum()), len(tested)


def _image_hashes(data: DataConfig, source: Source) -> np.ndarray:
    key = (data.train, data.fields, data.image_root, data.key, source.listing())
    if key not in HASHES:
        HASHES[key] = source.image_hashes(data.key)
    return HASHES[key]


def open_split(data: DataConfig, split: str, *, need_long: bool) -> Source:
    """Open a split; missing demo data is built first. Raises UserError if the run names no such data."""
    spec = split_spec(data, split)
    if not spec:
        flag = {"train": "--data", "val": "--val-data"}.get(split, "--test-data")
        raise UserError(f"this run names no {split} data; give {flag} (a folder of tar shards, a pattern, a table)")
    if spec == "mix":
        return _open_mix(data, need_long)
    if data.train == "demo":
        ensure_demo(data.demo_dir)
    source = open_source(spec, data.fields, image_root=data.image_root, need_long=need_long)
    if holds_out(data) and split in ("train", "val"):
        is_held_out = np.isin(_image_hashes(data, source), held_out_images(data)[0])
        return PartSource(source, np.flatnonzero(is_held_out == (split == "val")))
    return source


def check_readable(source: Source, most: float) -> None:
    """Raise BrokenDataError if more than the share `most` of the rows of `source` do not fit their tables' headers."""
    if source.unreadable > most * source.rows:
        what = f"{source.unreadable:,} of {source.rows:,} rows do not fit the header of their table"
        raise BrokenDataError(f"{what}, above data.max_broken_share = {most:.1%}: mend their commas and quotes")


def _open_mix(data: DataConfig, need_long: bool) -> MixedSource:
    sources = []
    for part in data.mix:
        root = data.image_root if part.image_root is None else part.image_root
        local = replace(data, train=part.data, mix=(), fields=part.fields or data.fields, image_root=root)
        local = replace(local, held_out=0.0)
        sources.append(open_split(local, "train", need_long=need_long))
    try:
        return MixedSource(sources, [part.share for part in data.mix])
    except ValueError as error:
        raise UserError(f"--mix (data.mix): {error}") from None
