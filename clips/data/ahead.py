"""Reads ahead of a training from remote data: whole shards of this group and the next, pictures of a batch.

The order reads from a few shards at a time and names the shards that come next (clips/data/order.py). Those are fetched
whole during training. Other remote data, as in an evaluation, is read by ranges. fsspec's `filecache` is not enough: it
has no limit of size, fetches once for each process, and reads an endless answer to its end.
"""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

from clips.common.errors import CommandError
from clips.common.paths import is_remote
from clips.data.order import MixedOrder, Order, SampleOrder
from clips.data.remote import Copies, remote_facts, stamp_of
from clips.data.sample import BrokenSample
from clips.data.sources import MixedSource, Source, TableSource, TarSource

SHARD_THREADS, PICTURE_THREADS = 4, 16
"""Files that a process fetches at once."""
GROUPS = 3
"""Groups of the order that have copies at once: this one, the next, and that of a process that is behind."""


class ReadAhead:
    """Call `at` with each batch's positions before its samples are read. For local data it does nothing."""

    def __init__(self, source: Source, order: Order, limit: int) -> None:
        """`limit`: bytes of all copies on this machine together; 0: no copies."""
        self.order = order
        sources = source.sources if isinstance(source, MixedSource) else [source]
        orders = order.parts if isinstance(order, MixedOrder) else [order]
        remote = [i for i, part in enumerate(sources) if limit > 0 and _is_remote(part)]
        self._parts: dict[int, _Shards | _Pictures] = {}
        if not remote:
            return
        copies = Copies(limit)
        for i in remote:
            part = sources[i]
            if isinstance(part, TarSource):
                self._parts[i] = _Shards(part, orders[i], copies, copies.limit // (GROUPS * len(remote)))
            elif isinstance(part, TableSource):
                self._parts[i] = _Pictures(part, orders[i], copies)

    def at(self, positions: Sequence[int]) -> None:
        if not self._parts:
            return
        turns: dict[int, list[int]] = defaultdict(list)
        for position in positions:
            part, turn = self.order.draw(position) if isinstance(self.order, MixedOrder) else (0, position)
            turns[part].append(turn)
        for part in turns.keys() & self._parts.keys():
            self._parts[part].at(turns[part])


def _is_remote(source: Source) -> bool:
    if isinstance(source, TableSource):
        return any(map(is_remote, source.roots))
    return isinstance(source, TarSource) and any(map(is_remote, source.shards))


class _Fetching:
    """Threads that open one copy after the other, until all are there or `begin` is called again."""

    def __init__(self, threads: int, fetch: Callable[[Any], BinaryIO | None]) -> None:
        self.threads, self.fetch = threads, fetch
        self._wanted: deque[Any] = deque()

    def begin(self, wanted: Iterable[Any]) -> None:
        self._wanted = deque(wanted)
        for _ in range(min(self.threads, len(self._wanted))):
            # Daemons: the process does not wait for them when it ends.
            threading.Thread(target=self._work, args=(self._wanted,), daemon=True).start()

    def _work(self, wanted: deque[Any]) -> None:
        while wanted is self._wanted:
            try:
                item = wanted.popleft()
            except IndexError:
                return
            # The reader of the file meets the same error and reports it; a file that another process fetches is fine.
            with contextlib.suppress(CommandError, BrokenSample, OSError):
                copy = self.fetch(item)
                if copy is not None:
                    copy.close()


class _Shards:
    """Copies of the shards of one source, at most `share` bytes for a group of its order."""

    def __init__(self, source: TarSource, order: SampleOrder, copies: Copies, share: int) -> None:
        self.source, self.order, self.copies, self.share = source, order, copies, share
        self._group: tuple[list[int], list[int]] | None = None
        self._fetching = _Fetching(SHARD_THREADS, lambda shard: self._open(shard, wait=False))
        self._whole: set[int] = set()
        self._sizes: dict[int, int] = {}

    def at(self, turns: Sequence[int]) -> None:
        group = self.order.shards(min(turns))
        if group == self._group:
            return
        self._group = group
        now, then = map(self._fitting, group)
        self._whole = {*now, *then}
        self.source.read_copies(self._open)
        self._fetching.begin([*now, *then])

    def _fitting(self, shards: list[int]) -> list[int]:
        """The first shards that fit into the share; the others are read by ranges."""
        unknown = [shard for shard in shards if shard not in self._sizes and is_remote(self.source.shards[shard])]
        with ThreadPoolExecutor(PICTURE_THREADS) as pool:
            sizes = pool.map(lambda shard: remote_facts(self.source.shards[shard])[0], unknown)
            self._sizes |= dict(zip(unknown, sizes, strict=True))
        fitting = []
        total = 0
        for shard in shards:
            total += self._sizes.get(shard, 0)
            if shard in self._sizes and total <= self.share:
                fitting.append(shard)
        return fitting

    def _open(self, shard: int, *, wait: bool = True) -> BinaryIO | None:
        if shard not in self._whole:
            return None
        return self.copies.open(self.source.shards[shard], self.source.state(shard), wait=wait)


class _Pictures:
    """Copies of the pictures that one source of tables names."""

    def __init__(self, source: TableSource, order: SampleOrder, copies: Copies) -> None:
        self.source, self.order, self.copies = source, order, copies
        self._fetching = _Fetching(PICTURE_THREADS, self._fetch)

    def at(self, turns: Sequence[int]) -> None:
        self.source.copies = self._open
        self._fetching.begin([self.order.sample(turn) for turn in turns])

    def _open(self, url: str, *, wait: bool = True) -> BinaryIO | None:
        return self.copies.open(url, stamp_of(remote_facts(url)[1]), wait=wait)

    def _fetch(self, index: int) -> BinaryIO | None:
        url = self.source.picture(index)
        return None if url is None else self._open(url, wait=False)
