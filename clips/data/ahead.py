"""Reads ahead of a training from remote data: whole shards of this group and the next, pictures of a batch.

The order reads from a few shards at a time and names the shards that come next (clips/data/order.py). Those are fetched
whole during training. Other remote data, as in an evaluation, is read by ranges. fsspec's `filecache` does neither: it
has no limit of size and does not read ahead.
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
from clips.data.copies import KEPT, Copies
from clips.data.order import MixedOrder, Order, SampleOrder
from clips.data.remote import remote_facts
from clips.data.sample import BrokenSample
from clips.data.sidecar import stamp_of
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
        self._parts: dict[int, _Shards | _Pictures] = {}
        remote = {i: part for i, part in enumerate(sources) if _is_remote(part)} if limit > 0 else {}
        if not remote:
            return
        copies = Copies(limit)
        for i, part in remote.items():
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


class WholeFiles:
    """For reading a source shard by shard: each shard comes from a copy, and the next is fetched meanwhile.

    Pictures of a remote table are copied when they are read. For local data it does nothing.
    """

    def __init__(self, source: Source, limit: int) -> None:
        """`limit` as in `ReadAhead`."""
        self._source, self._fetching = source, _Fetching(1)
        self._number: dict[str, int] = {}
        if limit <= 0 or not _is_remote(source):
            return
        self._copies = copies = Copies(limit)
        if isinstance(source, TarSource):
            self._number = {url: i for i, url in enumerate(source.shards)}
        elif isinstance(source, TableSource):
            source.read_copies(lambda url: copies.open(url, stamp_of(remote_facts(url)[1])))

    def at(self, present: str, coming: Iterable[str]) -> None:
        """Read `present` from now on; another thread fetches the first of the shards `coming` that has no copy."""
        if not self._number:
            return
        assert isinstance(self._source, TarSource)
        self._source.read_copies(self._open)  # closes what was open: a removed copy takes room until then
        self._fetching.begin([(present, coming)], self._fetch)

    def _open(self, shard: int) -> BinaryIO | None:
        assert isinstance(self._source, TarSource)
        url = self._source.shards[shard]
        return self._copies.open(url, self._source.state(shard)) if is_remote(url) else None

    def _fetch(self, shards: tuple[str, Iterable[str]]) -> None:
        present, coming = shards
        assert isinstance(self._source, TarSource)
        _close(self._open(self._number[present]))  # first, since the reader waits for it
        for url in coming:
            state = self._source.state(self._number[url])
            if not is_remote(url) or self._copies.has(url, state):
                continue
            # Without room for both, the new copy would take the place of the one that is read.
            if sum(remote_facts(one)[0] for one in (present, url) if is_remote(one)) > KEPT * self._copies.limit:
                return
            with contextlib.suppress(BlockingIOError):  # another process fetches it
                _close(self._copies.open(url, state, wait=False))
                return


def _is_remote(source: Source) -> bool:
    if isinstance(source, TableSource):
        return any(map(is_remote, source.roots))
    return isinstance(source, TarSource) and any(map(is_remote, source.shards))


def _close(copy: BinaryIO | None) -> None:
    if copy is not None:
        copy.close()


class _Fetching:
    """Threads that fetch one item after the other, until all are there or `begin` is called again."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._wanted: deque[Any] = deque()

    def begin(self, wanted: Iterable[Any], fetch: Callable[[Any], None]) -> None:
        self._wanted = deque(wanted)
        for _ in range(min(self.threads, len(self._wanted))):
            # Daemons: the process does not wait for them when it ends.
            threading.Thread(target=self._work, args=(self._wanted, fetch), daemon=True).start()

    def _work(self, wanted: deque[Any], fetch: Callable[[Any], None]) -> None:
        while wanted is self._wanted:
            try:
                item = wanted.popleft()
            except IndexError:
                return
            # The reader of the file meets the same error and reports it; a file that another process fetches is fine.
            with contextlib.suppress(CommandError, BrokenSample, OSError):
                fetch(item)


class _Shards:
    """Copies of the shards of one source, at most `share` bytes for a group of its order."""

    def __init__(self, source: TarSource, order: SampleOrder, copies: Copies, share: int) -> None:
        self.source, self.order, self.copies, self.share = source, order, copies, share
        self._group: tuple[list[int], list[int]] | None = None
        self._fetching = _Fetching(SHARD_THREADS)
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
        self._fetching.begin([*now, *then], lambda shard: _close(self._open(shard, wait=False)))

    def _fitting(self, shards: list[int]) -> list[int]:
        """The first shards that fit into the share; the others are read by ranges."""
        unknown = [shard for shard in shards if shard not in self._sizes and is_remote(self.source.shards[shard])]
        with ThreadPoolExecutor(PICTURE_THREADS) as pool:
            sizes = pool.map(lambda shard: remote_facts(self.source.shards[shard])[0], unknown)
            self._sizes |= dict(zip(unknown, sizes, strict=True))
        fitting, total = [], 0
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
        self._fetching = _Fetching(PICTURE_THREADS)

    def at(self, turns: Sequence[int]) -> None:
        self.source.read_copies(self._open)
        self._fetching.begin([self.order.sample(turn) for turn in turns], self._fetch)

    def _open(self, url: str, *, wait: bool = True) -> BinaryIO | None:
        return self.copies.open(url, stamp_of(remote_facts(url)[1]), wait=wait)

    def _fetch(self, index: int) -> None:
        if (url := self.source.picture(index)) is not None:
            _close(self._open(url, wait=False))
