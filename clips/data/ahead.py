"""Reading ahead of a training from remote data: copies of the shards of this group and the next, pictures of a batch.

The order reads from a few shards at a time (clips/data/order.py), and says which come after them. Those are fetched
whole, while what comes now is trained on. What nobody announced, as in an evaluation, is read by ranges.
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
"""Groups of the order that have copies at once: this one, the next, and the last of a process that is behind."""


class ReadAhead:
    """Tell it each batch's positions before its samples are read. For local data it does nothing."""

    def __init__(self, source: Source, order: Order, limit: int) -> None:
        """`limit`: bytes that all copies on this machine may take together; 0: none are made."""
        self.order = order
        sources = source.sources if isinstance(source, MixedSource) else [source]
        orders = order.parts if isinstance(order, MixedOrder) else [order]
        self._parts: dict[int, _Shards | _Pictures] = {}
        if limit <= 0:
            return
        remote = {i: part for i, part in enumerate(sources) if _is_remote(part)}
        copies = Copies(limit) if remote else None
        for i, part in remote.items():
            assert copies is not None
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
    """Lets a source be gone through one shard after the other, each from a copy; the next comes while one is read.

    Pictures that a remote table names are copied when they are first asked for. For local data it does nothing.
    """

    def __init__(self, source: Source, limit: int) -> None:
        """`limit`: as for `ReadAhead`."""
        self._copies = Copies(limit) if limit > 0 and _is_remote(source) else None
        self._source, self._fetching = source, _Fetching(1)
        self._number: dict[str, int] = {}
        if self._copies is None:
            return
        if isinstance(source, TarSource):
            self._number = {url: i for i, url in enumerate(source.shards)}
        elif isinstance(source, TableSource):
            copies = self._copies
            source.read_copies(lambda url: copies.open(url, stamp_of(remote_facts(url)[1])))

    def at(self, present: str, coming: Iterable[str]) -> None:
        """`present` is read from now on; of the shards `coming`, the first that has no copy is fetched meanwhile.

        They are asked for in another thread, and not at all where there is nothing to fetch.
        """
        if not self._number:
            return
        assert isinstance(self._source, TarSource)
        self._source.read_copies(self._open)  # closes what was open: a copy that is removed takes room until then
        self._fetching.begin([(present, coming)], self._fetch)

    def _open(self, shard: int) -> BinaryIO | None:
        assert isinstance(self._source, TarSource)
        assert self._copies is not None
        url = self._source.shards[shard]
        return self._copies.open(url, self._source.state(shard)) if is_remote(url) else None

    def _fetch(self, shards: tuple[str, Iterable[str]]) -> None:
        present, coming = shards
        assert isinstance(self._source, TarSource)
        assert self._copies is not None
        if (copy := self._open(self._number[present])) is not None:  # first, since it is waited for
            copy.close()
        for url in coming:
            state = self._source.state(self._number[url])
            if not is_remote(url) or self._copies.has(url, state):
                continue
            # Enough for the two, or the new copy would take the place of the one that is read.
            if sum(remote_facts(one)[0] for one in (present, url) if is_remote(one)) > KEPT * self._copies.limit:
                return
            with contextlib.suppress(BlockingIOError):  # another process fetches it
                if (copy := self._copies.open(url, state, wait=False)) is not None:  # None: no room for one
                    copy.close()
                return


def _is_remote(source: Source) -> bool:
    if isinstance(source, TableSource):
        return any(is_remote(root) for root in source.roots)
    return isinstance(source, TarSource) and any(map(is_remote, source.shards))


class _Fetching:
    """Threads that make copies, each after the other, until all are there or others are wanted."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._wanted: deque[Any] = deque()

    def begin(self, wanted: Iterable[Any], fetch: Callable[[Any], None]) -> None:
        self._wanted = deque(wanted)
        for _ in range(min(self.threads, len(self._wanted))):
            # Daemons: a process that ends does not wait for what it no longer needs.
            threading.Thread(target=self._work, args=(self._wanted, fetch), daemon=True).start()

    def _work(self, wanted: deque[Any], fetch: Callable[[Any], None]) -> None:
        while wanted is self._wanted:
            try:
                one = wanted.popleft()
            except IndexError:
                return
            # Whoever needs the file meets the same error and tells it; a process that fetches it already needs no help.
            with contextlib.suppress(CommandError, BrokenSample, OSError):
                fetch(one)


class _Shards:
    """The copies that one source of tar shards reads from, of at most `share` bytes for a group of its order."""

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
        self._fetching.begin([*now, *then], self._fetch)

    def _fitting(self, shards: list[int]) -> list[int]:
        """The first of them that fit into the share; the others are read by ranges."""
        unknown = [shard for shard in shards if shard not in self._sizes and is_remote(self.source.shards[shard])]
        with ThreadPoolExecutor(PICTURE_THREADS) as pool:
            facts = pool.map(lambda shard: remote_facts(self.source.shards[shard])[0], unknown)
            self._sizes |= dict(zip(unknown, facts, strict=True))
        fitting, total = [], 0
        for shard in shards:
            total += self._sizes.get(shard, 0)
            if shard in self._sizes and total <= self.share:
                fitting.append(shard)
        return fitting

    def _open(self, shard: int) -> BinaryIO | None:
        if shard not in self._whole:
            return None
        return self.copies.open(self.source.shards[shard], self.source.state(shard))

    def _fetch(self, shard: int) -> None:
        copy = self.copies.open(self.source.shards[shard], self.source.state(shard), wait=False)
        if copy is not None:
            copy.close()


class _Pictures:
    """The pictures that one source of tables names, fetched many at a time."""

    def __init__(self, source: TableSource, order: SampleOrder, copies: Copies) -> None:
        self.source, self.order, self.copies = source, order, copies
        self._fetching = _Fetching(PICTURE_THREADS)

    def at(self, turns: Sequence[int]) -> None:
        self.source.read_copies(self._open)
        self._fetching.begin([self.order.sample(turn) for turn in turns], self._fetch)

    def _open(self, url: str, *, wait: bool = True) -> BinaryIO | None:
        return self.copies.open(url, stamp_of(remote_facts(url)[1]), wait=wait)

    def _fetch(self, index: int) -> None:
        url = self.source.picture(index)
        copy = self._open(url, wait=False) if url is not None else None
        if copy is not None:
            copy.close()
