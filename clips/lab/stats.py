"""Are two variants different? Intervals, the verdict, and the numbers of seeds and pictures that a difference needs.

One interval for each design:
- `interval`: seeds and pictures cross, every run answers every question. Both are random effects.
- `welch`: two groups of runs, where only seeds differ.
- `over_runs`: differences that are paired by run.

One verdict (`verdict`), by the interval and by the seeds of each variant.

Shapes: S independent seeds, R runs, I items (questions), C clusters (pictures; questions may share one), A levels of
runs, B levels of items. Scores are [S, I] or [R, I]: 0 or 1 for right answers, any number otherwise. Groups are numbers
from 0, of shape [R] or [I].
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, Literal

import numpy as np
from scipy import stats
from scipy.special import stdtrit

LEVEL, POWER = 0.95, 0.8
MOST = 10**7
"""The largest number of seeds or pictures that `Spread.needed` returns."""
BEND = 1.5
"""How the quantile of an interval goes from Student's t of pictures to that of seeds (`half_of_interval`)."""
TWO_SEEDS = 0.01
"""The same for two seeds: at this ratio of `runs` to `pictures`, both to the fourth power, the quantile is half-way."""
TOGETHER = " together"
ANSWERS = "single answers"
"""What a seed does to one picture or question: every effect of a level of runs together with a level of items."""
Verdict = Literal["win", "tie", "loss", "undecided"]
FEWEST_SEEDS = 5
"""Seeds of each variant that a verdict needs. Of fewer seeds too often all stand on one side of a jump."""
UNLIKE = 2.0
"""If one variant spreads more than so many times as much over seeds, a verdict gives its spread to both."""
UNDECIDED = "fewer than five seeds, a plan that was not kept, or seeds that differ in when they learn"
"""Why there is neither win, tie nor loss."""
Level = tuple[str, np.ndarray]
"""Name and groups."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval; None if the runs show no spread."""

    mean: float
    low: float | None
    high: float | None

    @property
    def ci95(self) -> list[float] | None:
        return None if self.low is None or self.high is None else [self.low, self.high]


def verdict(
    ci95: Sequence[float] | None, ours: Sequence[float], theirs: Sequence[float], *, kept: bool = True
) -> Verdict:
    """The only verdict rule on a − b: by its interval, and by a figure of each independent seed of a and of b.

    Tie: the interval covers zero. Win or loss: it does not, and the difference stands against unlike spreads, too
    (`half_of_unlike`). Otherwise seeds differ in when they learn, and nothing is decided. Seeds that were added after a
    look are chosen by their figures: `kept` says that the plan with the number of seeds was kept.
    """
    if not kept or min(len(ours), len(theirs)) < FEWEST_SEEDS:
        return "undecided"
    if ci95 is None or not (ci95[0] > 0 or ci95[1] < 0):
        return "tie"
    least = half_of_unlike(np.var(ours, ddof=1), np.var(theirs, ddof=1), len(ours), len(theirs))
    if abs(np.mean(ours) - np.mean(theirs)) <= least:
        return "undecided"
    return "win" if ci95[0] > 0 else "loss"


def half_of_unlike(a: Any, b: Any, ours: int, theirs: int) -> np.ndarray:
    """Half of Student's interval, if all seeds vary as those of the less steady variant; 0 where both vary alike.

    `a`, `b`: variances over seeds of two variants, which may be arrays; `ours`, `theirs`: their numbers of seeds.
    """
    larger = np.maximum(a, b)
    half = stdtrit(ours + theirs - 2, (1 + LEVEL) / 2) * np.sqrt(larger * (1 / ours + 1 / theirs))
    return np.where(larger > UNLIKE**2 * np.minimum(a, b), half, 0.0)


def turned(decision: Verdict) -> Verdict:
    """The verdict on b − a, given the verdict on a − b."""
    swapped: dict[Verdict, Verdict] = {"win": "loss", "loss": "win"}
    return swapped.get(decision, decision)


# ------------------------------------------------------------------------------------------- only seeds differ
def welch(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Difference of the means of two groups of runs, with Welch's interval.

    Runs are not paired by seed. A seed sets the order of the data and the first weights alike in both groups, but
    little of that remains in common after training, and pairing halves the degrees of freedom. What is in common makes
    this interval too wide, not too narrow.
    """
    between = mean(ours) - mean(theirs)
    if len(set(ours)) == len(set(theirs)) == 1:
        return Estimate(between, None, None)
    with warnings.catch_warnings():  # one group without spread is no mistake
        warnings.simplefilter("ignore", RuntimeWarning)
        interval = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(LEVEL)
    return Estimate(between, float(interval.low), float(interval.high))


def difference(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """`welch` of the figure `name` of two groups of runs, as JSON: `mean` and `ci95`."""
    estimate = welch([row[name] for row in ours], [row[name] for row in theirs])
    return {"mean": estimate.mean, "ci95": estimate.ci95}


def over_runs(values: np.ndarray) -> Estimate:
    """Mean of independent values [S] with Student's t interval; no interval of a single value."""
    if len(values) < 2:
        return Estimate(float(values.mean()), None, None)
    interval = stats.ttest_1samp(values, 0.0).confidence_interval(LEVEL)
    return Estimate(float(values.mean()), float(interval.low), float(interval.high))


# ------------------------------------------------------------------------------------------- one way to show
def signed(value: float, digits: int = 1, scale: float = 1) -> str:
    """`+1.2`, with a true minus."""
    return f"{scale * value:+.{digits}f}".replace("-", "−")


def show_interval(ci95: Sequence[float], digits: int = 1, scale: float = 1) -> str:
    """`[+0.3, +2.1]`"""
    return f"[{', '.join(signed(end, digits, scale) for end in ci95)}]"


def show_difference(row: Mapping[str, Any], digits: int = 1, scale: float = 1) -> str:
    """`+1.2 [+0.3, +2.1]` of a row with `mean` and `ci95`; without an interval only the mean."""
    ends = f" {show_interval(row['ci95'], digits, scale)}" if row["ci95"] else ""
    return signed(row["mean"], digits, scale) + ends


def show_mean(values: Sequence[float], digits: int = 1) -> str:
    """`1.2 ± 0.3`: mean and standard deviation over seeds; one value has no deviation."""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


# ------------------------------------------------------------------------------------------- seeds and pictures cross
def labels(names: Sequence[Hashable]) -> np.ndarray:
    """[N] numbers from 0 in order of first appearance: equal names, equal numbers."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names])


def shared_runs(by_encoder: Sequence[np.ndarray]) -> np.ndarray:
    """[R] groups of runs that share an encoder, for several encoders at once, given the groups of each.

    The result is the coarsest grouping that tells runs apart. Runs that share one of the encoders are not independent,
    even if each has another encoder of its own. An encoder that all runs share does not count.
    """
    telling = [groups for groups in by_encoder if groups.max() > 0]
    return min(telling, key=lambda groups: int(groups.max())) if telling else np.zeros_like(by_encoder[0])


def independent_runs(shared: np.ndarray) -> np.ndarray:
    """[R] groups to average (`over_groups`), so that their spread speaks of other runs.

    If all runs share their encoder, each run is a group, and the result holds for this encoder only.
    """
    return shared if shared.max() > 0 else np.arange(len(shared))


def over_groups(scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """[R, …] → [S, …]: the mean of the runs of each group; `groups` holds every number from 0."""
    return np.stack([scores[groups == group].mean(0) for group in range(groups.max() + 1)])


def interval(scores: np.ndarray, clusters: np.ndarray) -> Estimate:
    """Mean of `scores` [S, I] (for two models: the differences), with its interval; `clusters`: [I] from `labels`.

    Seeds and pictures are crossed random effects: every run answers every question. The variance of the mean has two
    parts. The spread between the runs' means contains the luck of single answers. The spread of the pictures counts
    without its share of that luck. `half_of_interval` allows for how badly few seeds tell their spread. A bootstrap
    does not: three seeds have ten different samples. tests/unit/clips/test_stats.py simulates how often the interval
    errs. With one seed the interval says nothing about other training runs.
    """
    scores = np.asarray(scores, dtype=float)
    seeds, items = scores.shape
    sizes = np.bincount(clusters)
    count = len(sizes)
    by_seed = scores.mean(1)
    overall = float(by_seed.mean())
    sums = np.stack([np.bincount(clusters, row, minlength=count) for row in scores])  # [S, C]
    residuals = sums - overall * sizes
    # Sandwich variance of a mean over clusters; the small-sample factor is exact for equal clusters.
    scale = count / max(1, count - 1) / items**2
    pictures = scale * float((residuals.mean(0) ** 2).sum())
    runs = luck = 0.0
    if seeds > 1:
        runs = float(by_seed.var(ddof=1)) / seeds
        own = residuals - residuals.mean(0) - np.outer(by_seed - overall, sizes)
        luck = scale * float((own**2).sum()) / (seeds - 1) / seeds
    # Answers that all agree do not show that the next run agrees: one answer of each run counts as luck.
    luck_known = max(least_variance(luck, seeds), 1 / items**2 / seeds)
    half = float(half_of_interval(runs, max(0.0, pictures - luck), luck_known, seeds, count))
    return Estimate(overall, overall - half, overall + half)


def half_of_interval(
    runs: Any, pictures: Any, luck: Any, seeds: float, clusters: float, level: float = LEVEL
) -> np.ndarray:
    """Half of the interval of a mean whose variance is `runs` + `pictures`; all three variances may be arrays.

    `runs` is estimated from `seeds`, `pictures` from `clusters`. The quantile lies between Student's t of both. Its
    place goes by the share of `runs` to the power `BEND`. Two seeds tell so little of their spread that it goes by
    `TWO_SEEDS`. Simulated with 2 to 5 seeds, 3.5 to 6.5 % of the intervals miss zero if the true mean is zero and all
    effects are normal. Where only one of two models learns in a jump, more do, which `verdict` allows for.

    The half is at least one standard error of single answers, by their variance `luck` (`least_variance`). Seeds that
    agree by chance would otherwise leave an interval without width.
    """
    variance, tail = np.asarray(runs) + pictures, (1 + level) / 2
    of_pictures = stdtrit(max(1.0, clusters - 1), tail)
    of_runs = stdtrit(seeds - 1, tail) if seeds >= 2 else of_pictures
    share = np.divide(runs, variance, out=np.zeros_like(variance, dtype=float), where=variance > 0)
    bent = share**BEND if seeds > 2 else share**4 / (share**4 + TWO_SEEDS * (1 - share) ** 4)
    quantile = of_pictures + (of_runs - of_pictures) * bent
    return np.maximum(quantile * np.sqrt(variance), np.sqrt(luck))


def least_variance(luck: Any, seeds: float) -> Any:
    """The variance of single answers that an interval allows for at least; with two seeds all of it is too much."""
    return 0.64 * luck if 1 < seeds <= 2 else luck


# ------------------------------------------------------------------------------------------- where the spread is from
@dataclass(frozen=True)
class Spread:
    """Variances of the effects behind one figure, and the number of groups of each level that the figure averages.

    Runs and items are crossed. Each has levels within each other: LLaVA seeds within pretraining seeds, questions
    within pictures. Every level has an effect, and so has every pair of a level of runs with a level of items.
    """

    runs: tuple[str, ...]
    """Names of the levels, coarse to fine; empty with one run."""
    items: tuple[str, ...]
    variances: np.ndarray
    """[1 + A, 1 + B]: of the effect of a level of runs with a level of items; index 0 is no level."""
    run_counts: tuple[float, ...]
    """[1 + A]: 1, then the groups of each level; groups of unequal weight count as fewer."""
    item_counts: tuple[float, ...]

    def shares(self) -> dict[str, float]:
        """Source → its part of the variance of the mean."""
        parts = self._parts()
        named = {name: float(parts[1 + a, 0]) for a, name in enumerate(self.runs)}
        named |= {name: float(parts[0, 1 + b]) for b, name in enumerate(self.items)}
        return named | ({ANSWERS: float(parts[1:, 1:].sum())} if self.runs else {})

    def _parts(self) -> np.ndarray:
        """[1 + A, 1 + B]: the part of each effect in the variance of the mean."""
        return self.variances / np.outer(self.run_counts, self.item_counts)

    def detectable(self) -> float:
        """The smallest difference that the interval of such a mean tells from zero with power 0.8."""
        runs, pictures, _, seeds = self._of_interval()
        levels = (LEVEL, 2 * POWER - 1)
        return float(sum(half_of_interval(runs, pictures, 0.0, seeds, self.item_counts[1], level) for level in levels))

    def power(self, difference: float, tries: int = 100_000) -> float:
        """Share of comparisons of this size that see a true difference of `difference`: neither tie nor undecided.

        Simulated: seeds of both models vary alike, and the other variances that the interval estimates are drawn anew
        for every comparison. That a verdict needs `FEWEST_SEEDS` is not asked here.
        """
        runs, pictures, luck, seeds = self._of_interval()
        rng, last = np.random.default_rng(0), self.item_counts[1] - 1
        count = max(2, round(seeds))
        of_seeds = rng.normal(0.0, (runs * seeds / 2) ** 0.5, (2, tries, count))
        between = of_seeds[0] - of_seeds[1]
        means = rng.normal(difference, pictures**0.5, tries) + between.mean(1)
        freedoms = (last, max(1.0, (seeds - 1) * last))
        drawn = [v * rng.chisquare(n, tries) / n for v, n in zip((pictures + luck, luck), freedoms, strict=True)]
        shared = np.maximum(0.0, drawn[0] - drawn[1])
        least = least_variance(drawn[1], seeds)
        halves = half_of_interval(between.var(1, ddof=1) / seeds, shared, least, seeds, self.item_counts[1])
        ours, theirs = of_seeds.var(2, ddof=1)
        unlike = half_of_unlike(ours, theirs, count, count)
        return float((np.abs(means) > np.maximum(halves, unlike)).mean())

    def _of_interval(self) -> tuple[float, float, float, float]:
        """Parts of the variance of the mean as `interval` sees them: runs, pictures, luck; and the number of seeds."""
        parts, seeds = self._parts(), self.run_counts[1] if self.runs else 1.0
        return float(parts[1:].sum()), float(parts[0].sum()), float(parts[1:, 1:].sum()), seeds

    def needed(self, difference: float) -> dict[str, int | None]:
        """Level → how many groups of it show `difference`, all else as it is; None if no number does.

        A coarse level brings its finer levels along: more pictures with as many questions each as now. Names that end
        with `TOGETHER`: the coarsest seeds and the pictures, if both grow by the same factor.
        """
        counts: dict[str, int | None] = {}
        if self.runs:
            counts[self.runs[0]] = self._least(difference, FEWEST_SEEDS, lambda n: self._sized(seeds=n))
        if len(self.runs) == 2:
            counts[self.runs[1]] = self._least(difference, 1, lambda n: self._sized(within=n))
        counts[self.items[0]] = self._least(difference, 2, lambda n: self._sized(pictures=n))
        if self.runs:
            growth = self.item_counts[1] / self.run_counts[1]
            seeds = self._least(difference, FEWEST_SEEDS, lambda n: self._sized(seeds=n, pictures=max(2, n * growth)))
            counts[self.runs[0] + TOGETHER] = seeds
            counts[self.items[0] + TOGETHER] = None if seeds is None else max(2, math.ceil(seeds * growth))
        return counts

    def items_needed(self, difference: float) -> int | None:
        """Questions that show `difference` with the same seeds; None if no number does."""
        pictures = self._least(difference, 2, lambda n: self._sized(pictures=n))
        return None if pictures is None else math.ceil(pictures * self.item_counts[-1] / self.item_counts[1])

    def _sized(
        self, *, seeds: float | None = None, within: float | None = None, pictures: float | None = None
    ) -> Spread:
        """The effects in a comparison of another size; `within`: runs of each of the coarsest seeds."""
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
        """The smallest count that shows `difference`; None beyond `MOST`, and for a difference of zero."""
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

    The last level of each must tell every run or item apart. Levels that repeat another are merged (`distinct_levels`).
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
    """1, then for each level the number of equal groups that have the same weight in a mean."""
    shares = [np.bincount(groups, weights) / weights.sum() for groups in levels]
    return (1.0, *(1 / float((share**2).sum()) for share in shares))


def _without_negatives(parts: np.ndarray) -> np.ndarray:
    """Set estimates below zero to zero, and reduce the others so that the sum stays (at least zero).

    The sum, for example over both kinds of seed, is known better than its split.
    """
    positive = np.maximum(parts, 0.0)
    return positive * max(0.0, float(parts.sum())) / positive.sum() if positive.any() else positive


def distinct_levels(levels: Sequence[Level]) -> list[Level]:
    """Drop levels with a single group, and merge levels with the same groups."""
    distinct: list[Level] = []
    for name, groups in levels:
        if groups.max() == 0:
            continue
        if distinct and distinct[-1][1].max() == groups.max():
            distinct[-1] = (f"{distinct[-1][0]} and {name}", groups)
        else:
            distinct.append((name, groups))
    return distinct


def components(scores: np.ndarray, runs: Sequence[np.ndarray], items: Sequence[np.ndarray]) -> np.ndarray:
    """[1 + A, 1 + B] variances of the effects of every level of runs with every level of items; [0, 0] is zero.

    Half the mean squared difference of two scores is the variance of the effects that they do not share (Koch 1968).
    Pairs are sorted by the finest level of runs and of items that they share; the means are subtracted from each other.
    The estimates have no bias. For equal numbers they are the estimates of the analysis of variance.
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
