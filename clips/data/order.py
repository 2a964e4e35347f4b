"""The order in which training sees its samples: a pure function of (seed, position).

Every epoch is a permutation of the set, the same for any number of ranks and workers, computed
without ever holding the set's indices: shards are cut into pieces of at most `PIECE` samples, the
pieces are shuffled, neighbours form groups of about `GROUP` samples, and samples are shuffled inside
a group. Reading therefore stays within a few shards at a time; a set below `GROUP` is shuffled whole.
Several sets with shares are mixed by position (`MixedOrder`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

PIECE = 1 << 15
GROUP = 1 << 17
BLOCK = 1 << 12
"""Positions in which a mix has its shares."""


class SampleOrder:
    """Maps a position of the run to a sample index. Memory: a few arrays of one entry per piece, and two groups."""

    def __init__(
        self, shard_sizes: Sequence[int] | np.ndarray, seed: int, piece: int = PIECE, group: int = GROUP
    ) -> None:
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.seed, self.group = seed, group
        self._arguments = (sizes, seed, piece, group)
        self.length = int(sizes.sum())
        pieces = -(-sizes // piece)
        shard_of = np.repeat(np.arange(len(sizes)), pieces)
        rank_in_shard = np.arange(len(shard_of)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        self._shards = shard_of
        self._starts = (np.cumsum(sizes) - sizes)[shard_of] + rank_in_shard * piece
        self._sizes = np.minimum(sizes[shard_of] - rank_in_shard * piece, piece)
        # Per-object caches; they are left behind when the order travels to a worker.
        self._epoch = lru_cache(2)(self._compute_epoch)
        self._members = lru_cache(2)(self._compute_members)

    def __len__(self) -> int:
        return self.length

    def __reduce__(self):
        return SampleOrder, self._arguments

    def epoch(self, position: int) -> int:
        """How often the set has been seen whole before the run's `position`-th sample."""
        return self.locate(position)[0]

    def sample(self, position: int) -> int:
        """The index of the run's `position`-th sample."""
        return self.index(*self.locate(position))

    def substitute(self, position: int, rng: random.Random) -> int:
        """Another sample's index for that position, from the whole set: a neighbour would stand twice in a batch."""
        return self.index(self.locate(position)[0], rng.randrange(self.length))

    def locate(self, position: int) -> tuple[int, int]:
        """(epoch, offset) of the run's `position`-th sample."""
        return divmod(position, self.length)

    def index(self, epoch: int, offset: int) -> int:
        """The sample index at `offset` (below the set's length) of `epoch`."""
        members, start = self._group(epoch, offset)
        return int(members[offset - start])

    def offsets(self, epoch: int, indices: np.ndarray) -> np.ndarray:
        """Where `epoch` has the samples `indices`, the inverse of `index`: int64, of the same length."""
        order, first, group_starts = self._epoch(epoch)
        place_of_piece = np.empty_like(order)
        place_of_piece[order] = np.arange(len(order))
        pieces = np.searchsorted(self._starts, indices, side="right") - 1
        groups = np.searchsorted(first, place_of_piece[pieces], side="right") - 1
        found = np.empty(len(indices), dtype=np.int64)
        for group in np.unique(groups):
            members = self._members(epoch, int(group))
            by_index = np.argsort(members)
            ours = groups == group
            place = by_index[np.searchsorted(members, indices[ours], sorter=by_index)]
            found[ours] = group_starts[group] + place
        return found

    def shards(self, position: int) -> tuple[list[int], list[int]]:
        """The shards that the run's `position`-th sample and its neighbours come from, and those that come after."""
        epoch, offset = self.locate(position)
        group = self._number(epoch, offset)
        after = (epoch, group + 1) if group + 1 < len(self._epoch(epoch)[1]) else (epoch + 1, 0)
        now, then = (np.unique(self._shards[self._pieces(*place)]) for place in ((epoch, group), after))
        return now.tolist(), then.tolist()

    def held(self, epoch: int, offset: int) -> int:
        """Samples of the shards' pieces that are read from at `offset` of `epoch`."""
        return len(self._group(epoch, offset)[0])

    def _group(self, epoch: int, offset: int) -> tuple[np.ndarray, int]:
        """The shuffled sample indices of the group that holds `offset`, and the offset that it begins at."""
        group = self._number(epoch, offset)
        return self._members(epoch, group), int(self._epoch(epoch)[2][group])

    def _number(self, epoch: int, offset: int) -> int:
        """Which of the epoch's groups holds `offset`."""
        return int(np.searchsorted(self._epoch(epoch)[2], offset, side="right")) - 1

    def _compute_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pieces in this epoch's order, the piece each group begins with, the offset each group begins at."""
        order = np.random.default_rng([self.seed, epoch, 1]).permutation(len(self._sizes))
        offsets = np.cumsum(self._sizes[order]) - self._sizes[order]
        _, first = np.unique(offsets // self.group, return_index=True)
        return order, first, offsets[first]

    def _pieces(self, epoch: int, group: int) -> np.ndarray:
        order, first, _ = self._epoch(epoch)
        return order[first[group] : first[group + 1] if group + 1 < len(first) else None]

    def _compute_members(self, epoch: int, group: int) -> np.ndarray:
        """The sample indices of one group, shuffled."""
        pieces = self._pieces(epoch, group)
        samples = np.concatenate(
            [np.arange(s, s + n) for s, n in zip(self._starts[pieces], self._sizes[pieces], strict=True)]
        )
        np.random.default_rng([self.seed, epoch, 2, group]).shuffle(samples)
        return samples


class MixedOrder:
    """Positions of the run spread over several sets by their shares; each set goes through its own order.

    Every block of BLOCK positions holds each set as often as its share says, up to rounding that never adds up, in
    a drawn order. A set that is smaller than its share of the run begins its next epoch, as it would alone. Sample
    indices count through the sets, one after the other.
    """

    def __init__(self, parts: Sequence[SampleOrder], shares: Sequence[float], seed: int) -> None:
        """`shares` are relative; ValueError for one that is below 2 in BLOCK of their sum, or none."""
        total = float(sum(shares))
        if len(parts) != len(shares) or not all(math.isfinite(s) and s * BLOCK >= 2 * total > 0 for s in shares):
            raise ValueError(f"shares {list(shares)} must be numbers, none below {2 / BLOCK:.2g} of their sum")
        self.parts, self.shares, self.seed = list(parts), list(shares), seed
        self.bounds = np.cumsum([0.0, *shares]) / total
        self.bounds[-1] = 1.0
        self.starts = np.cumsum([0, *map(len, parts)])
        self._block = lru_cache(2)(self._compute_block)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __reduce__(self):
        return MixedOrder, (self.parts, self.shares, self.seed)

    def draw(self, position: int) -> tuple[int, int]:
        """(part, which sample of that part's own run) at the run's `position`."""
        block, place = divmod(position, BLOCK)
        labels, turns = self._block(block)
        return int(labels[place]), int(turns[place])

    def epoch(self, position: int) -> int:
        part, turn = self.draw(position)
        return self.parts[part].epoch(turn)

    def sample(self, position: int) -> int:
        part, turn = self.draw(position)
        return int(self.starts[part]) + self.parts[part].sample(turn)

    def substitute(self, position: int, rng: random.Random) -> int:
        """From the same part, so that shares stay."""
        part, turn = self.draw(position)
        return int(self.starts[part]) + self.parts[part].substitute(turn, rng)

    def seen(self, blocks: int) -> np.ndarray:
        """How many samples of each part the first `blocks` blocks hold."""
        # Rounded bounds of whole numbers: exact to the last position of any run, and nothing is added up.
        return np.diff(np.rint(self.bounds * (blocks * BLOCK)).astype(np.int64))

    def _compute_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each place in the block its part, and which sample of that part's own run it is."""
        before, counts = self.seen(block), self.seen(block + 1) - self.seen(block)
        labels = np.repeat(np.arange(len(counts)), counts)
        np.random.default_rng([self.seed, 3, block]).shuffle(labels)
        turns = np.empty(BLOCK, dtype=np.int64)
        for part, count in enumerate(counts):
            turns[labels == part] = before[part] + np.arange(count)
        return labels, turns


Order = SampleOrder | MixedOrder
