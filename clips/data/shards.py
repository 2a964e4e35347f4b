"""A set of tar shards as one overview: each shard's index and its samples by layout.

Each shard has an index (clips/data/tar.py), made on first use. A set of many shards also has an overview in the cache:
a process then opens one file instead of a hundred thousand.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from tqdm import tqdm

from clips.common.files import placing
from clips.common.paths import cache_root
from clips.data.remote import stamp
from clips.data.tar import ShardSummary, as_array, from_array, shard_summary

OVERVIEW_FROM = 256
"""Fewest shards of a set that gets an overview."""
THREADS = 16
"""Shards that are read at once; for remote shards this is waiting for the network."""
CHUNK = 128
"""Shards whose stamps one thread finds: a local file's takes less time than handing it to a thread."""


@dataclass(frozen=True)
class ShardSet:
    urls: list[str]
    indexes: list[str]
    """Path of each shard's index."""
    layouts: list[tuple[str, ...]]
    """The sets of extensions that samples have."""
    counts: np.ndarray
    """int64 [shards, layouts]: samples."""
    problems: list[str]
    """What could not be used, each with its shard's name."""


def open_shards(urls: Sequence[str], workers: int = 0) -> ShardSet:
    """The overview of `urls`. Missing indexes are made, with a progress bar, in threads or in `workers` processes.

    Finished indexes stay, so a stopped command goes on where it was. Raises UserError as `shard_summary`.
    """
    urls = list(urls)
    if len(urls) < OVERVIEW_FROM:
        return _indexed(urls, workers)

    chunks = [urls[i : i + CHUNK] for i in range(0, len(urls), CHUNK)]
    with ThreadPoolExecutor(THREADS) as threads:
        stamps = [one for chunk in threads.map(lambda chunk: list(map(stamp, chunk)), chunks) for one in chunk]
    # Named by the shards, then by their states: an outdated overview has the same beginning.
    prefix = f"shards-{_digest(map(os.path.abspath, urls))}-"
    path = cache_root() / f"{prefix}{_digest(stamps)}.safetensors"
    if path.is_file():
        with suppress(SafetensorError, OSError, ValueError, KeyError, TypeError):  # damaged: it is made again
            stored = load_file(path)
            meta = from_array(stored["meta"])
            layouts = [tuple(names) for names in meta["layouts"]]
            return ShardSet(urls, meta["indexes"], layouts, stored["counts"], meta["lines"])

    shards = _indexed(urls, workers)
    meta = {"indexes": shards.indexes, "layouts": shards.layouts, "lines": shards.problems}
    with suppress(OSError):  # without a writable cache the next process reads the shards' indexes
        path.parent.mkdir(parents=True, exist_ok=True)
        with placing(path) as file:
            file.write(save({"meta": as_array(meta), "counts": shards.counts}))
        for outdated in path.parent.glob(f"{prefix}*.safetensors"):
            if outdated != path:
                outdated.unlink(missing_ok=True)
    return shards


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _indexed(urls: list[str], workers: int) -> ShardSet:
    """The overview by the index of each shard."""
    # Spawned: a forked child may inherit a lock of this process's threads.
    pool = ProcessPoolExecutor(workers, get_context("spawn")) if workers else ThreadPoolExecutor(THREADS)
    with pool:
        done: Iterable[ShardSummary] = pool.map(shard_summary, urls, chunksize=8)
        summaries = list(tqdm(done, "indexing shards", len(urls), unit="shard", leave=False, disable=None))

    layouts = sorted({layout for summary in summaries for layout in summary.layouts})
    counts = np.array([[summary.layouts.get(layout, 0) for layout in layouts] for summary in summaries], dtype=np.int64)
    problems = [f"{url}: {line}" for url, summary in zip(urls, summaries, strict=True) for line in summary.problems]
    return ShardSet(urls, [str(summary.index) for summary in summaries], layouts, counts, problems)
