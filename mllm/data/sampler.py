"""The order of samples in an epoch: grouped by modality and length, equal on every rank."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np


class EpochSampler:
    """The order of an epoch: a pure function of (seed, epoch) and the global batch, not of the number of ranks.

    With `group_by_modality_length`, as in LLaVA, a global batch (`batch_size` × `chunks`) holds one modality and
    similar lengths. It is dealt into `chunks` micro-batches of similar token sums. Global batches are shuffled;
    leftovers of the two modalities come last.

    Args:
        lengths: `LlavaDataset.modality_lengths`.
        batch_size: samples of one micro-batch on one rank.
        chunks: micro-batches of one optimizer step, ranks × accumulation steps.
    """

    def __init__(
        self, lengths: Sequence[int], *, batch_size: int, chunks: int, seed: int, group_by_modality_length: bool
    ) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size, self.chunks, self.seed = batch_size, chunks, seed
        self.group = group_by_modality_length

    def batches(self, *, rank: int, ranks: int, step: int = 0) -> Iterator[list[int]]:
        """Yield the micro-batches of one of several ranks from optimizer step `step` on, without end.

        The last step of an epoch may have fewer samples. They are dealt out, and a micro-batch that gets none holds
        `~index` of one of them: a sample of which nothing is learned.
        """
        size = self.batch_size * self.chunks
        per_epoch = math.ceil(len(self.lengths) / size)
        for number in itertools.count(step):
            epoch, place = divmod(number, per_epoch)
            if place == 0 or number == step:
                order = self.order(epoch)
            batch = order[place * size : (place + 1) * size]
            is_whole = len(batch) == size
            for chunk in range(rank, self.chunks, ranks):
                first = chunk * self.batch_size
                own = batch[first : first + self.batch_size] if is_whole else batch[chunk :: self.chunks]
                yield own or [~batch[0]]

    def order(self, epoch: int) -> list[int]:
        """Return the order of an epoch, global batch by global batch, each of `chunks` micro-batches."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        return (self._grouped(order, rng) if self.group else order).tolist()

    def _grouped(self, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        size = self.batch_size * self.chunks
        whole, rest = [], []
        for modality in (order[self.lengths[order] > 0], order[self.lengths[order] < 0]):
            cut = len(modality) - len(modality) % size
            # Sorting inside a pool of 50 global batches keeps lengths alike and the order random.
            for start in range(0, cut, 50 * size):
                pool = modality[start : min(start + 50 * size, cut)]
                pool = pool[np.argsort(-np.abs(self.lengths[pool]), kind="stable")]
                whole += [self._deal(batch) for batch in pool.reshape(-1, size)]
            rest.append(modality[cut:])
        return np.concatenate([*(whole[i] for i in rng.permutation(len(whole))), *rest])

    def _deal(self, batch: np.ndarray) -> np.ndarray:
        """Deal a global batch, longest first, each sample to the micro-batch that is shortest so far."""
        hands: list[list[int]] = [[] for _ in range(self.chunks)]
        sums = [0] * self.chunks
        for sample in batch:
            hand = min((i for i in range(self.chunks) if len(hands[i]) < self.batch_size), key=sums.__getitem__)
            hands[hand].append(sample)
            sums[hand] += abs(int(self.lengths[sample]))
        return np.concatenate(hands)
