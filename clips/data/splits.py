"""Where the training, validation and test samples of a run are."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from clips.common.errors import BrokenDataError, UserError
from clips.common.paths import is_remote
from clips.common.rundir import UNSEEN
from clips.config import DataConfig
from clips.data.dataset import HASH, Dataset, Part, open_data
from clips.data.demo import demo_split, ensure_demo
from clips.data.sample import mend_broken

OWN = ("train", "val", "test")
"""The splits of every run; `held_out_sets` lists further ones."""
FEWEST_IMAGES, MOST_HELD_OUT = 100, 1_000
"""Fewest images of which a share is held out, and the most images that are held out."""


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
    """Return the spec of a split or a further test set for `open_data`, or None if the run has none of that name."""
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
    hashes = _open(data, data.train, need_long=False).hashes()
    images, what = np.unique(hashes), f"values of {data.key!r}" if data.key else "images"
    below = images[images < data.held_out * 2.0**64]
    chosen = below[:MOST_HELD_OUT]
    if len(images) < FEWEST_IMAGES or not 1 < len(chosen) < len(images):
        few = f"no image is held out of {len(images):,} {what}, fewer than {FEWEST_IMAGES} (--val-data gives others)"
        return chosen[:0], few, below
    rows = np.isin(hashes, chosen).sum()
    line = f"{len(chosen):,} of {len(images):,} {what} held out, {rows:,} rows (--val-data gives others)"
    return chosen, line, below[len(chosen) :]


def count_shared(train: Dataset, test: Dataset) -> tuple[int, int]:
    """Return (number of images of `test` that `train` contains, number of images of `test`).

    Images are compared by `Dataset.hashes`, with paths relative to the folder of `train`. For remote data the first
    number is 0, because names of shards say nothing about their content.
    """
    if any(map(is_remote, (*train.files, *test.files))):
        return 0, len(test)
    trained, tested = np.unique(train.hashes()), np.unique(test.hashes(train.base))
    return int(np.isin(tested, trained).sum()), len(tested)


def open_split(data: DataConfig, split: str, *, need_long: bool) -> Dataset:
    """Open a split; missing demo data is built first. Raises UserError if the run names no such data."""
    spec = split_spec(data, split)
    if not spec:
        flag = {"train": "--data", "val": "--val-data"}.get(split, "--test-data")
        raise UserError(f"this run names no {split} data; give {flag} (a folder of tar shards, a pattern, a table)")
    if spec == "mix":
        return _open_mix(data, need_long)
    if data.train == "demo":
        ensure_demo(data.demo_dir)
    dataset = _open(data, spec, need_long=need_long)
    if holds_out(data) and split in ("train", "val"):
        held_out = held_out_images(data)[0]

        def keep(part: Part) -> np.ndarray:
            return np.isin(part.column(HASH).to_numpy(), held_out) == (split == "val")

        return dataset.where(keep)
    return dataset


def _open(data: DataConfig, spec: str, *, need_long: bool) -> Dataset:
    return open_data(
        spec, data.fields, image_root=data.image_root, need_long=need_long, cache_gb=data.cache_gb,
        key=data.key if spec == data.train else None, allow_outside=data.allow_outside,
    )  # fmt: skip


def check_readable(dataset: Dataset, most: float) -> None:
    """Raise BrokenDataError if more than the share `most` of the rows of `dataset` cannot be used."""
    skipped, rows = dataset.skipped
    if skipped > most * rows:
        reasons = [f"  {part.url}#{key}: {why}" for part in dataset.parts for key, why in part.facts["examples"]]
        raise BrokenDataError(
            "\n".join([
                f"{skipped:,} of {rows:,} rows cannot be used, {skipped / rows:.1%}: above data.max_broken_share = "
                f"{most:.1%} training stops", *reasons[:5], mend_broken(skipped / rows),
            ])
        )  # fmt: skip


def _open_mix(data: DataConfig, need_long: bool) -> Dataset:
    sets = []
    for part in data.mix:
        root = data.image_root if part.image_root is None else part.image_root
        local = replace(data, train=part.data, mix=(), fields=part.fields or data.fields, image_root=root)
        local = replace(local, held_out=0.0)
        sets.append(open_split(local, "train", need_long=need_long))
    try:
        return Dataset.mix(sets, [part.share for part in data.mix])
    except ValueError as error:
        raise UserError(f"--mix (data.mix): {error}") from None
