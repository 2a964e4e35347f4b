"""The order in which training sees its samples: a pure function of (seed, position).

Every epoch is a permutation of the set, the same for any number of ranks and workers. The set's indices are never held:
shards are cut into pieces of at most `PIECE` samples, the pieces are shuffled, neighbours form groups of about `GROUP`
samples, and samples are shuffled inside a group. So reading stays within a few shards, and a set below `GROUP` is
shuffled as a whole. `MixedOrder` mixes several sets by their shares.
"""

import math
import random
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

PIECE = 1 << 15
GROUP = 1 << 17
BLOCK = 1 << 12
"""Positions of a mix in which every set has its share."""


class SampleOrder:
    """Maps a position of the run to a sample index. Memory: a few arrays with an entry per piece, and two groups."""

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
        # Caches of this object; pickling drops them.
        self._epoch = lru_cache(2)(self._compute_epoch)
        self._members = lru_cache(2)(self._compute_members)

    def __len__(self) -> int:
        return self.length

    def __reduce__(self):
        return SampleOrder, self._arguments

    def epoch(self, position: int) -> int:
        """Return the number of epochs completed before the run's `position`-th sample."""
        return self.locate(position)[0]

    def sample(self, position: int) -> int:
        """Return the index of the run's `position`-th sample."""
        return self.index(*self.locate(position))

    def substitute(self, position: int, rng: random.Random) -> int:
        """Return another sample for that position, from the full set, since a neighbour would be twice in a batch."""
        return self.index(self.locate(position)[0], rng.randrange(self.length))

    def locate(self, position: int) -> tuple[int, int]:
        """Return (epoch, offset) of the run's `position`-th sample."""
        return divmod(position, self.length)

    def index(self, epoch: int, offset: int) -> int:
        """Return the sample index at `offset` (below the set's length) of `epoch`."""
        group = self._number(epoch, offset)
        return int(self._members(epoch, group)[offset - int(self._epoch(epoch)[2][group])])

    def shards(self, position: int) -> tuple[list[int], list[int]]:
        """Return the shards of two groups: of the one with the run's `position`-th sample, and of the next one."""
        epoch, offset = self.locate(position)
        group = self._number(epoch, offset)
        after = (epoch, group + 1) if group + 1 < len(self._epoch(epoch)[1]) else (epoch + 1, 0)
        now, then = (np.unique(self._shards[self._pieces(*place)]) for place in ((epoch, group), after))
        return now.tolist(), then.tolist()

    def _number(self, epoch: int, offset: int) -> int:
        """Return the number of the epoch's group that holds `offset`."""
        return int(np.searchsorted(self._epoch(epoch)[2], offset, side="right")) - 1

    def _compute_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the epoch's pieces in order, and each group's first piece and first offset."""
        order = np.random.default_rng([self.seed, epoch, 1]).permutation(len(self._sizes))
        offsets = np.cumsum(self._sizes[order]) - self._sizes[order]
        _, first = np.unique(offsets // self.group, return_index=True)
        return order, first, offsets[first]

    def _pieces(self, epoch: int, group: int) -> np.ndarray:
        order, first, _ = self._epoch(epoch)
        return order[first[group] : first[group + 1] if group + 1 < len(first) else None]

    def _compute_members(self, epoch: int, group: int) -> np.ndarray:
        """Return the sample indices of one group, shuffled."""
        pieces = self._pieces(epoch, group)
        samples = np.concatenate(
            [np.arange(s, s + n) for s, n in zip(self._starts[pieces], self._sizes[pieces], strict=True)]
        )
        np.random.default_rng([self.seed, epoch, 2, group]).shuffle(samples)
        return samples


class MixedOrder:
    """Spreads the positions of the run over several sets by their shares; each set keeps its own order and epochs.

    In every block of BLOCK positions each set has its share, up to rounding that never accumulates, in a drawn order.
    Sample indices count through the sets, one after the other.
    """

    def __init__(self, parts: Sequence[SampleOrder], shares: Sequence[float], seed: int) -> None:
        """`shares` are relative. Raises ValueError for a share below 2 / BLOCK of their sum."""
        total = float(sum(shares))
        if len(parts) != len(shares) or not all(math.isfinite(s) and s * BLOCK >= 2 * total > 0 for s in shares):
            raise ValueError(f"shares must be positive, none below {2 / BLOCK:.2%} of their sum: {list(shares)}")
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
        """Return (part, position in that part's own run) at the run's `position`."""
        block, place = divmod(position, BLOCK)
        labels, turns = self._block(block)
        return int(labels[place]), int(turns[place])

    def epoch(self, position: int) -> int:
        """Return the number of epochs that the part drawn at this position has completed before it."""
        part, turn = self.draw(position)
        return self.parts[part].epoch(turn)

    def sample(self, position: int) -> int:
        """Return the sample index at a position, counted through all parts."""
        part, turn = self.draw(position)
        return int(self.starts[part]) + self.parts[part].sample(turn)

    def substitute(self, position: int, rng: random.Random) -> int:
        """Return another sample of the part drawn at this position, so that the parts keep their shares."""
        part, turn = self.draw(position)
        return int(self.starts[part]) + self.parts[part].substitute(turn, rng)

    def seen(self, blocks: int) -> np.ndarray:
        """Return the number of samples of each part in the first `blocks` blocks."""
        # Rounded bounds: rounding never accumulates.
        return np.diff(np.rint(self.bounds * (blocks * BLOCK)).astype(np.int64))

    def _compute_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the part of each place in the block, and its position in that part's own run."""
        before, counts = self.seen(block), self.seen(block + 1) - self.seen(block)
        labels = np.repeat(np.arange(len(counts)), counts)
        np.random.default_rng([self.seed, 3, block]).shuffle(labels)
        turns = np.empty(BLOCK, dtype=np.int64)
        for part, count in enumerate(counts):
            turns[labels == part] = before[part] + np.arange(count)
        return labels, turns


Order = SampleOrder | MixedOrder
