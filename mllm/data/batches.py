"""Batches: the order of samples in an epoch, the same on every rank, and the padding of samples into tensors.

Shapes: B samples of a batch · L longest sample.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch


class EpochSampler:
    """Orders the samples of an epoch, depending only on seed, epoch and global batch size, not on the number of ranks.

    With `group_by_modality_length`, as in LLaVA, a global batch (`batch_size` × `chunks`) holds one modality and
    similar lengths, and is split into `chunks` micro-batches with similar numbers of tokens. The global batches are
    shuffled, and the leftovers of both modalities come last.

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
        """Yield the micro-batches of one rank from optimizer step `step` on, without end.

        The last step of an epoch may have fewer samples, which are dealt out one by one. A micro-batch that gets none
        holds `~index` for the index of one of them. For that index the dataset returns the sample with all labels
        masked.
        """
        size = self.batch_size * self.chunks
        per_epoch = math.ceil(len(self.lengths) / size)
        for number in itertools.count(step):
            epoch, index = divmod(number, per_epoch)
            if index == 0 or number == step:
                order = self.order(epoch)
            batch = order[index * size : (index + 1) * size]
            is_full = len(batch) == size
            for chunk in range(rank, self.chunks, ranks):
                first = chunk * self.batch_size
                local = batch[first : first + self.batch_size] if is_full else batch[chunk :: self.chunks]
                yield local or [~batch[0]]

    def order(self, epoch: int) -> list[int]:
        """Return the order of an epoch, global batch by global batch, each of `chunks` micro-batches."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        return (self._grouped(order, rng) if self.group else order).tolist()

    def _grouped(self, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        size = self.batch_size * self.chunks
        full, rest = [], []
        for modality in (order[self.lengths[order] > 0], order[self.lengths[order] < 0]):
            cut = len(modality) - len(modality) % size
            # Sorting within pools of 50 global batches gives similar lengths but keeps the order random.
            for start in range(0, cut, 50 * size):
                pool = modality[start : min(start + 50 * size, cut)]
                pool = pool[np.argsort(-np.abs(self.lengths[pool]), kind="stable")]
                full += [self._deal(batch) for batch in pool.reshape(-1, size)]
            rest.append(modality[cut:])
        return np.concatenate([*(full[i] for i in rng.permutation(len(full))), *rest])

    def _deal(self, batch: np.ndarray) -> np.ndarray:
        """Assign each sample of a global batch, the longest first, to the micro-batch with the fewest tokens so far."""
        hands: list[list[int]] = [[] for _ in range(self.chunks)]
        sums = [0] * self.chunks
        for sample in batch:
            hand = min((i for i in range(self.chunks) if len(hands[i]) < self.batch_size), key=sums.__getitem__)
            hands[hand].append(sample)
            sums[hand] += abs(int(self.lengths[sample]))
        return np.concatenate(hands)


def pad_rows(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> torch.Tensor:
    """Return int64 [B, L]: the rows padded with `value` on the right, or on the `left` for generation."""
    padded = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.long)
    for target, row in zip(padded, rows, strict=True):
        target[len(target) - len(row) if left else 0 :][: len(row)] = torch.tensor(row, dtype=torch.long)
    return padded
