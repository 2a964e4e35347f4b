"""A set of tar shards as one overview: each shard's index and its samples by layout.

Each shard has an index (clips/data/tar.py), made on first use. A set of many shards also has an overview in the cache:
a process then opens one file instead of a hundred thousand.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from tqdm import tqdm

from clips.common.files import placing
from clips.common.paths import cache_root
from clips.data.remote import VERSION, fingerprint
from clips.data.tar import ShardSummary, as_array, from_array, shard_summary

OVERVIEW_FROM = 256
"""Fewest shards of a set that gets an overview."""
THREADS = 16
"""Shards that are read at once; for remote shards this is waiting for the network."""
ASKED = 128
"""Shards whose sizes and times one thread asks for."""


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
    with ThreadPoolExecutor(THREADS) as threads:
        parts = [urls[i : i + ASKED] for i in range(0, len(urls), ASKED)] if len(urls) >= OVERVIEW_FROM else []
        # Many at a time: a local file's fingerprint takes less time than handing it to a thread.
        stamps = [stamp for part in threads.map(lambda part: list(map(fingerprint, part)), parts) for stamp in part]
        path = _overview(urls, stamps)
        if stamps and path.is_file():
            with suppress(SafetensorError, OSError, ValueError, KeyError, TypeError):  # damaged: it is made again
                return _read(path, urls)
        if workers:
            # spawned: a forked child may inherit a lock of this one's threads
            with ProcessPoolExecutor(workers, get_context("spawn")) as processes:
                summaries = list(_progress(processes, urls, chunk=8))
        else:
            summaries = list(_progress(threads, urls))
    found = _gathered(urls, summaries)
    if stamps:
        _write(path, found)
    return found


def _progress(pool: Executor, urls: list[str], chunk: int = 1) -> Iterator[ShardSummary]:
    summaries: Iterable[ShardSummary] = pool.map(shard_summary, urls, chunksize=chunk)
    return iter(tqdm(summaries, "indexing shards", len(urls), unit="shard", leave=False, disable=None))


def _gathered(urls: list[str], summaries: list[ShardSummary]) -> ShardSet:
    layouts = sorted({layout for summary in summaries for layout in summary.layouts})
    column = {layout: i for i, layout in enumerate(layouts)}
    counts = np.zeros((len(urls), len(layouts)), dtype=np.int64)
    for row, summary in enumerate(summaries):
        for layout, count in summary.layouts.items():
            counts[row, column[layout]] = count
    problems = [f"{url}: {line}" for url, summary in zip(urls, summaries, strict=True) for line in summary.problems]
    return ShardSet(urls, [str(summary.index) for summary in summaries], layouts, counts, problems)


# ------------------------------------------------------------------------------------------------------ overview
def _overview(urls: list[str], stamps: list[str]) -> Path:
    """The overview's path, named by the shards, then by their sizes and times, so that outdated ones are removed."""
    return cache_root() / f"shards-{_digest(map(os.path.abspath, urls))}-{_digest([str(VERSION), *stamps])}.safetensors"


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _read(path: Path, urls: list[str]) -> ShardSet:
    stored = load_file(path)
    meta = from_array(stored["meta"])
    layouts = [tuple(names) for names in meta["layouts"]]
    return ShardSet(urls, meta["indexes"], layouts, stored["counts"], meta["lines"])


def _write(path: Path, found: ShardSet) -> None:
    """Without a writable cache there is no overview, and the next process reads the shards' indexes."""
    meta = {"indexes": found.indexes, "layouts": found.layouts, "lines": found.problems}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with placing(path) as file:
            file.write(save({"meta": as_array(meta), "counts": found.counts}))
    except OSError:
        return
    of_these = path.name.rpartition("-")[0]
    for outdated in path.parent.glob(f"{of_these}-*.safetensors"):
        if outdated != path:
            outdated.unlink(missing_ok=True)
