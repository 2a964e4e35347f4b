"""Where the spread of a figure comes from, and how many seeds and pictures a difference of a given size needs.

Runs and items are crossed, each with levels that lie within each other: LLaVA seeds within pretraining seeds, questions
within pictures. Every level has an effect of its own, and every pair of a level of runs with one of items another.

Shapes: R runs · I items · A levels of runs · B levels of items. Groups are numbers from 0 ([R] or [I]).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mllm.compare.statistics import LEVEL, reach_in_errors

POWER = 0.8
MOST = 10**7
"""More seeds or pictures than that are called none."""
TOGETHER = " together"
ANSWERS = "single answers"
"""What a seed does to one picture or question: every effect of a level of runs together with one of items."""
Level = tuple[str, np.ndarray]
"""Name and groups."""


@dataclass(frozen=True)
class Spread:
    """Variances of the effects behind one figure, and how many of each level it is the mean of."""

    runs: tuple[str, ...]
    """Names of the levels, coarse to fine; empty with one run."""
    items: tuple[str, ...]
    variances: np.ndarray
    """[1 + A, 1 + B]: of the effect of a level of runs with a level of items, 0 being neither."""
    run_counts: tuple[float, ...]
    """[1 + A]: groups of each level, after a 1; fewer than there are where they are of unequal weight."""
    item_counts: tuple[float, ...]

    def shares(self) -> dict[str, float]:
        """Source → what it adds to the variance of the mean."""
        parts = self._parts()
        named = {name: float(parts[1 + a, 0]) for a, name in enumerate(self.runs)}
        named |= {name: float(parts[0, 1 + b]) for b, name in enumerate(self.items)}
        return named | ({ANSWERS: float(parts[1:, 1:].sum())} if self.runs else {})

    def _parts(self) -> np.ndarray:
        """[1 + A, 1 + B]: what each effect adds to the variance of the mean."""
        return self.variances / np.outer(self.run_counts, self.item_counts)

    def detectable(self) -> float:
        """The smallest difference that the interval of such a mean tells from none with power 0.8."""
        parts = self._parts()
        runs, pictures = float(parts[1:].sum()), float(parts[0].sum())
        seeds = self.run_counts[1] if self.runs else 1.0
        of_interval, of_power = (
            reach_in_errors(runs, pictures, seeds, self.item_counts[1], level=level) for level in (LEVEL, 2 * POWER - 1)
        )
        return (of_interval + of_power) * (runs + pictures) ** 0.5

    def needed(self, difference: float) -> dict[str, int | None]:
        """Level → how many of it show `difference`, all else as it is; None where it alone cannot.

        Coarse levels take their finer ones along: more pictures, each with as many questions as now. What ends with
        `TOGETHER` is needed of the coarsest seeds and of the pictures if both grow by the same factor.
        """
        found: dict[str, int | None] = {}
        if self.runs:
            found[self.runs[0]] = self._least(difference, 2, lambda n: self._sized(seeds=n))
        if len(self.runs) == 2:
            found[self.runs[1]] = self._least(difference, 1, lambda n: self._sized(within=n))
        found[self.items[0]] = self._least(difference, 2, lambda n: self._sized(pictures=n))
        if self.runs:
            growth = self.item_counts[1] / self.run_counts[1]
            seeds = self._least(difference, 2, lambda n: self._sized(seeds=n, pictures=max(2, n * growth)))
            found[self.runs[0] + TOGETHER] = seeds
            found[self.items[0] + TOGETHER] = None if seeds is None else max(2, math.ceil(seeds * growth))
        return found

    def items_needed(self, difference: float) -> int | None:
        """Questions that show `difference` with the same seeds; None where no number is enough."""
        pictures = self._least(difference, 2, lambda n: self._sized(pictures=n))
        return None if pictures is None else math.ceil(pictures * self.item_counts[-1] / self.item_counts[1])

    def _sized(
        self, *, seeds: float | None = None, within: float | None = None, pictures: float | None = None
    ) -> Spread:
        """The same effects, of a larger or smaller comparison; `within`: runs of each of the coarsest seeds."""
        runs, items = np.array(self.run_counts), np.array(self.item_counts)
        if seeds is not None:
            runs[1:] *= seeds / runs[1]
        if within is not None:
            runs[2] = runs[1] * within
        if pictures is not None:
            items[1:] *= pictures / items[1]
        return Spread(self.runs, self.items, self.variances, tuple(runs.tolist()), tuple(items.tolist()))

    @staticmethod
    def _least(difference: float, fewest: int, sized: Callable[[int], Spread]) -> int | None:
        """The smallest count with which `difference` can be seen; None beyond `MOST`, and if there is none to see."""
        if difference == 0:
            return None
        few, many = fewest - 1, fewest
        while sized(many).detectable() > difference:
            few, many = many, 2 * many
            if many > MOST:
                return None
        while many - few > 1:
            middle = (few + many) // 2
            few, many = (few, middle) if sized(middle).detectable() <= difference else (middle, many)
        return many


def spread(scores: np.ndarray, runs: Sequence[Level], items: Sequence[Level]) -> Spread:
    """The variance of `scores` [R, I], split by levels of runs and of items, each coarse to fine.

    The last level of each must tell every run or item apart; of the others those are left that say something
    (`distinct_levels`).
    """
    run_levels, item_levels = distinct_levels(runs), distinct_levels(items)
    run_groups, item_groups = [g for _, g in run_levels], [g for _, g in item_levels]
    coarse = run_groups[0] if run_groups else np.zeros(len(scores), int)
    run_counts = _counts(1 / np.bincount(coarse)[coarse], run_groups)  # the mean is one over the coarsest seeds' means
    item_counts = _counts(np.ones(scores.shape[1]), item_groups)
    counts = np.outer(run_counts, item_counts)
    parts = components(scores, run_groups, item_groups) / counts
    parts[0, 1:] = _without_negatives(parts[0, 1:])
    for column in parts.T:
        column[1:] = _without_negatives(column[1:])
    names = tuple(name for name, _ in run_levels), tuple(name for name, _ in item_levels)
    return Spread(*names, parts * counts, run_counts, item_counts)


def _counts(weights: np.ndarray, levels: Sequence[np.ndarray]) -> tuple[float, ...]:
    """1 and, of each level, as how many equal groups its groups count in a mean with these weights."""
    shares = [np.bincount(groups, weights) / weights.sum() for groups in levels]
    return (1.0, *(1 / float((share**2).sum()) for share in shares))


def _without_negatives(parts: np.ndarray) -> np.ndarray:
    """Estimates below zero as zero, the others made smaller by as much, so that their sum stays (zero at least).

    The sum, as of both kinds of seed, is known better than how it splits: two runs on one encoder split it badly.
    """
    kept = np.maximum(parts, 0.0)
    return kept * max(0.0, float(parts.sum())) / kept.sum() if kept.any() else kept


def distinct_levels(levels: Sequence[Level]) -> list[Level]:
    """Without those of one group, and as one where two have the same groups."""
    kept: list[Level] = []
    for name, groups in levels:
        if groups.max() == 0:
            continue
        if kept and kept[-1][1].max() == groups.max():
            kept[-1] = (f"{kept[-1][0]} and {name}", groups)
        else:
            kept.append((name, groups))
    return kept


def components(scores: np.ndarray, runs: Sequence[np.ndarray], items: Sequence[np.ndarray]) -> np.ndarray:
    """[1 + A, 1 + B] variances of the effects of every level of runs with every level of items; [0, 0] is zero.

    Half the mean squared difference of two scores is the variance of the effects that they do not share (Koch 1968):
    pairs are sorted by the finest level of runs and of items that they share, and the means subtracted from each
    other. Without bias for any numbers, and the estimates of the analysis of variance where these are equal.
    """
    scores = np.asarray(scores, dtype=float)
    shape = len(runs) + 2, len(items) + 2  # one more than there are levels: nothing is shared beyond the finest
    squares, pairs = np.zeros(shape), np.zeros(shape)
    for a, rows in enumerate((np.zeros(len(scores), int), *runs)):
        for b, columns in enumerate((np.zeros(scores.shape[1], int), *items)):
            sizes = np.outer(np.bincount(rows), np.bincount(columns))
            sums, of_squares = _added(scores, rows, columns), _added(scores**2, rows, columns)
            squares[a, b] = (sizes * of_squares - sums**2).sum()
            pairs[a, b] = (sizes.astype(float) ** 2).sum()
    # From pairs that share these levels to those that share them and no finer one.
    squares, pairs = (np.diff(np.diff(table, axis=0), axis=1) for table in (squares, pairs))
    apart = squares / pairs
    covariance = apart[0, 0] - apart
    return np.diff(np.diff(covariance, axis=0, prepend=0), axis=1, prepend=0)


def _added(scores: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Sums of `scores` [R, I] within every group of rows and columns."""
    by_run = np.stack([np.bincount(columns, row) for row in scores])
    return np.stack([by_run[rows == group].sum(0) for group in range(rows.max() + 1)])
