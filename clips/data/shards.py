"""A set of tar shards: each shard's index (clips/data/tar.py), made on first use, and its samples by layout."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from clips.data.tar import shard_summary

THREADS = 16
"""Shards that are read at once; for remote shards this is waiting for the network."""


@dataclass(frozen=True)
class ShardSet:
    indexes: list[str]
    """Path of each shard's index."""
    layouts: list[tuple[str, ...]]
    """The sets of extensions that samples have."""
    counts: np.ndarray
    """int64 [shards, layouts]: samples."""
    problems: list[str]
    """What could not be used, each with its shard's name."""


def open_shards(urls: Sequence[str]) -> ShardSet:
    """The set of `urls`. Missing indexes are made, with a progress bar, in threads.

    Finished indexes stay, so a stopped command goes on where it was. Raises UserError as `shard_summary`.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        done = pool.map(shard_summary, urls)
        summaries = list(tqdm(done, "indexing shards", len(urls), unit="shard", leave=False, disable=None))

    layouts = sorted({layout for summary in summaries for layout in summary.layouts})
    counts = np.array([[summary.layouts.get(layout, 0) for layout in layouts] for summary in summaries], dtype=np.int64)
    problems = [f"{url}: {line}" for url, summary in zip(urls, summaries, strict=True) for line in summary.problems]
    return ShardSet([str(summary.index) for summary in summaries], layouts, counts, problems)
