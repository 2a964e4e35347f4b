"""Are two models different? Statistics for several training runs (seeds) that answer the same questions.

Shapes: S seeds · I items (questions) · C clusters (pictures; several questions may share one).
Scores are [S, I]: 0 or 1 for right answers, any number otherwise. Two models are paired twice: by item, because they
answer the same ones, and by seed, because runs of one seed share the data order and the start of what is trained.
Rows are independent of each other; runs that share an encoder are averaged first (`over_groups`).

What each figure speaks about:
- The interval covers other questions *and* other training runs. It alone decides win, tie or loss.
- McNemar's test covers other questions, for the very runs at hand.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats
from scipy.special import stdtrit

LEVEL = 0.95
Verdict = Literal["win", "tie", "loss"]


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """ "win" or "loss" only when the interval leaves zero out."""
        return "win" if self.low > 0 else "loss" if self.high < 0 else "tie"


def labels(names: Sequence[Hashable]) -> np.ndarray:
    """[N] numbers from 0 in order of first appearance: equal names, equal numbers."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names])


def shared_runs(by_encoder: Sequence[np.ndarray]) -> np.ndarray:
    """[R] groups of runs that share an encoder, for several encoders at once, given those of each.

    The coarsest that tell runs apart at all: a run's own encoder beside one that several runs share does not make
    these independent, and an encoder that all runs share is not among what differs.
    """
    telling = [groups for groups in by_encoder if groups.max() > 0]
    return min(telling, key=lambda groups: int(groups.max())) if telling else np.zeros_like(by_encoder[0])


def independent_runs(shared: np.ndarray) -> np.ndarray:
    """[R] groups to average before their spread can speak of other runs (`over_groups`).

    Where one encoder served all runs they are these themselves, and what is said holds for this encoder.
    """
    return shared if shared.max() > 0 else np.arange(len(shared))


def over_groups(scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """[R, …] → [S, …]: the mean of the runs of each group (numbers from 0, each there)."""
    return np.stack([scores[groups == group].mean(0) for group in range(groups.max() + 1)])


def interval(scores: np.ndarray, clusters: np.ndarray) -> Estimate:
    """Mean of `scores` [S, I] (for two models: the differences), with its interval; `clusters`: [I] from `labels`.

    Seeds and pictures are crossed random effects: every run answers every question. The variance of the mean is the
    spread between the runs' means, which contains the luck of single answers, and what pictures have in common over
    all runs: their spread, less the share of that luck in it. Student's t (`reach_in_errors`) allows for how badly so
    few seeds tell their spread. A bootstrap over seeds would not: of three seeds it has ten different samples. How
    often the interval errs is simulated in tests/unit/mllm/test_statistics.py and can be asked of a finished
    comparison (mllm/compare/calibration.py).

    With one seed nothing is said about other training runs.
    """
    scores = np.asarray(scores, dtype=float)
    seeds, items = scores.shape
    sizes = np.bincount(clusters)
    count = len(sizes)
    by_seed = scores.mean(1)
    mean = float(by_seed.mean())
    sums = np.stack([np.bincount(clusters, row, minlength=count) for row in scores])  # [S, C]
    residuals = sums - mean * sizes
    # Sandwich variance of a mean over clusters; the small-sample factor is exact for equal clusters.
    scale = count / max(1, count - 1) / items**2
    pictures = scale * float((residuals.mean(0) ** 2).sum())
    if seeds == 1:
        reach = reach_in_errors(0.0, pictures, seeds, count) * pictures**0.5
    else:
        runs = float(by_seed.var(ddof=1)) / seeds
        own = residuals - residuals.mean(0) - np.outer(by_seed - mean, sizes)
        luck = scale * float((own**2).sum()) / (seeds - 1) / seeds
        shared = max(0.0, pictures - luck)
        freedom = (shared**2 * (count - 1)) / (pictures**2 + luck**2 / (seeds - 1)) if shared > 0 else 1.0
        reach = reach_in_errors(runs, shared, seeds, count, freedom) * (runs + shared) ** 0.5
    return Estimate(mean, mean - reach, mean + reach)


def reach_in_errors(
    runs: float, pictures: float, seeds: float, clusters: float, freedom: float | None = None, level: float = LEVEL
) -> float:
    """Half of an interval in standard errors, for a variance that is `runs` + `pictures`.

    `runs` is known from so many seeds, `pictures` from so many clusters (as by `freedom` degrees, where that is less).
    Two approximations to the sum of a Student's t for each part err in opposite directions where seeds make most of
    it: with three seeds Satterthwaite's degrees of freedom (1946) let pass up to 7.8 % false findings, Cochran's mean
    of both quantiles, weighted by the parts (1964), as few as 2.9 %. Halfway between them it is 3.8 to 6.1 %. With two
    seeds Satterthwaite's lets pass 13 %, so it is Cochran's alone there: 2.2 to 5.9 %.
    """
    variance, tail, last = runs + pictures, (1 + level) / 2, max(1.0, clusters - 1)
    if variance <= 0:
        return 0.0
    if seeds < 2:
        return float(stdtrit(last, tail))
    squares = runs**2 / (seeds - 1) + pictures**2 / (last if freedom is None else freedom)
    of_runs, of_pictures = stdtrit(seeds - 1, tail), stdtrit(last, tail)
    cochran = (runs * of_runs + pictures * of_pictures) / variance
    satterthwaite = stdtrit(variance**2 / squares, tail) if seeds > 2 else cochran
    return float(satterthwaite + cochran) / 2


@dataclass(frozen=True)
class McNemar:
    p: float
    wins: int
    """Items that the first model answers right more often than the second."""
    losses: int


def mcnemar(a: np.ndarray, b: np.ndarray) -> McNemar:
    """McNemar's exact test (two-sided binomial on the discordant items) of scores a, b [R, I].

    With several runs an item counts once: it is discordant when one model is right in more runs than the other.
    Counting each run's pair would take one item for R independent ones and find differences everywhere; a vote of
    the runs would throw away the items that only tip it. With one run this is McNemar's own test.
    """
    difference = np.sign(np.sum(a, 0) - np.sum(b, 0))
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    p = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    return McNemar(float(p), wins, losses)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): p-values that keep the chance of any false finding among them."""
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.minimum(1.0, np.maximum.accumulate(np.asarray(p_values, dtype=float)[order] * factors))
    out = np.empty(len(p_values))
    out[order] = adjusted
    return out.tolist()
